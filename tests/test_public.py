"""What `import dstill` offers: names that can be found, classes instead of names, mappings, progress, and notebooks."""

from __future__ import annotations

import inspect
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dstill
from dstill import DistilledSet, DstillError
from dstill.data.real import RealSet
from dstill.nets.convnet import ConvNet
from dstill.support.console import ConsoleReporter, NotebookReporter, reporter_of
from dstill.support.progress import Silent

SMOKE: dict[str, Any] = {"recipe": "smoke", "progress": False}
FUNCTIONS = [name for name in dstill.__all__ if inspect.isfunction(getattr(dstill, name))]


def test_dir_lists_every_public_name_and_each_can_be_had() -> None:
    assert set(dstill.__all__) <= set(dir(dstill))
    assert {name for name in dir(dstill) if not name.startswith("_")} == {*dstill.__all__} - {"__version__"}
    for name in dstill.__all__:
        assert getattr(dstill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = dstill.distil  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_public_function_says_what_it_takes_gives_and_raises(name: str) -> None:
    function = getattr(dstill, name)
    said = inspect.getdoc(function) or ""
    for section in ("Args:", "Returns:", "Raises:", "Example:"):
        assert section in said, f"dstill.{name} has no {section}"
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in said, f"dstill.{name} does not document {parameter}"


def test_no_public_function_takes_more_than_a_reader_can_hold() -> None:
    counts = {name: len(inspect.signature(getattr(dstill, name)).parameters) for name in FUNCTIONS}
    assert max(counts.values()) <= 17, counts


def test_settings_may_be_mappings_or_assignments(tiny_real: RealSet) -> None:
    nested = {"net": {"width": 4}, "distill": {"iterations": 2}}
    dotted = {"net.width": 4, "distill.iterations": 2}
    strings = ["net.width=4", "distill.iterations=2"]
    sets = [dstill.distill(tiny_real, method="dm", changes=changes, **SMOKE) for changes in (nested, dotted, strings)]
    sets.append(dstill.distill(tiny_real, method="dm", changes={"net.width": 4}, distill={"iterations": 2}, **SMOKE))
    for one in sets:
        assert torch.equal(one.images, sets[0].images) and one.recipe == sets[0].recipe
    recipe = sets[0].recipe
    assert recipe is not None and (recipe.net.width, recipe.distill.iterations) == (4, 2)
    with pytest.raises(DstillError, match="did you mean iterations"):
        dstill.distill(tiny_real, method="dm", distill={"iteration": 2}, **SMOKE)
    with pytest.raises(DstillError, match="mapping or a list"):
        dstill.distill(tiny_real, method="dm", changes="net.width=4", **SMOKE)


def test_experts_may_be_changed_or_given(tiny_real: RealSet, tmp_path: Path) -> None:
    machine = dstill.Machine(cache=tmp_path)
    fast: dict[str, Any] = {"method": "mtt", "changes": {"net.width": 4}, "machine": machine, **SMOKE}
    experts = dstill.train_experts(tiny_real, experts={"count": 3}, **fast)
    assert len(experts) == 3
    given = dstill.distill(tiny_real, experts=experts, **fast)
    changed = dstill.distill(tiny_real, experts={"count": 3}, **fast)
    assert torch.equal(given.images, changed.images)


def make_net(channels: int, classes: int, size: tuple[int, int]) -> torch.nn.Module:
    return ConvNet(channels, classes, size, width=4, depth=1)


@pytest.mark.parametrize(
    ("net", "name", "width"),
    [
        (ConvNet, "convnet", 128),
        (make_net, f"{__name__}:make_net", None),
        ("dstill.nets.convnet:ConvNet", "dstill.nets.convnet:ConvNet", 128),
        ({"name": "convnet", "width": 8}, "convnet", 8),
    ],
)
def test_a_network_may_be_a_name_a_class_a_function_or_a_mapping(
    net: Any, name: str, width: int | None, tiny_real: RealSet, tmp_path: Path
) -> None:
    short = tmp_path / "short.yaml"
    short.write_text("{name: s, version: 1, passes: 1, batch_size: 8, momentum: 0.9, weight_decay: 0, lr: 0.01, networks: 1}")
    syn = dstill.distill(tiny_real, method="random", net=net, **SMOKE)
    assert syn.recipe is not None and syn.recipe.net.name == name
    result = dstill.evaluate(syn, tiny_real, protocol=str(short), nets=[net] if callable(net) else (), random=False)
    assert list(result.nets) == [name]


def test_what_cannot_be_imported_again_is_refused(tiny_real: RealSet) -> None:
    with pytest.raises(DstillError, match="define it at the top level of a module"):
        dstill.distill(tiny_real, method="random", net=lambda *shape: make_net(*shape), **SMOKE)
    with pytest.raises(DstillError, match="no class of dstill"):
        dstill.distill(tiny_real, method=f"{__name__}:make_net", **SMOKE)


def test_a_method_may_be_a_class(tiny_real: RealSet) -> None:
    from dstill.methods.distribution_matching import DistributionMatching

    by_class, by_name = (dstill.distill(tiny_real, method=method, **SMOKE) for method in (DistributionMatching, "dm"))
    assert by_class.method == "dm" and torch.equal(by_class.images, by_name.images)


def test_a_set_is_made_of_tensors_with_little_said(tiny_real: RealSet) -> None:
    rows = torch.cat([rows[:2] for rows in tiny_real.train.by_class(3)])
    pixels, labels = tiny_real.train.images[rows], tiny_real.train.labels[rows]
    mine = DistilledSet.from_tensors(pixels, labels, real=tiny_real)
    assert (mine.ipc, mine.class_names, mine.data_fingerprint) == (2, tiny_real.class_names, tiny_real.fingerprint)
    assert torch.allclose(mine.pixels(), pixels / 255, atol=1e-6)
    assert abs(float(mine.images.mean())) < 0.5, "standardised by the real data"
    again = DistilledSet.from_tensors(mine.images.numpy(), labels.numpy(), real=tiny_real, preprocess=mine.preprocess)
    assert torch.equal(again.images, mine.images)
    accuracy = dstill.evaluate(mine, tiny_real, protocol="quick", networks=1, random=False).accuracy
    assert accuracy.mean > 0.5

    plain = DistilledSet.from_tensors(np.zeros((4, 1, 8, 8), np.uint8), [0, 1, 1, 2])
    assert (plain.class_names, plain.ipc, float(plain.images.max())) == (("0", "1", "2"), 2, 0.0)
    soft = DistilledSet.from_tensors(torch.rand(4, 1, 8, 8), torch.zeros(4, 2))
    assert (soft.ipc, soft.classes, soft.labels.dtype) == (2, 2, torch.float32)
    with pytest.raises(DstillError, match="class ids reach"):
        DistilledSet.from_tensors(torch.rand(2, 1, 8, 8), [0, 5], class_names=["a", "b"])


def test_sets_and_results_show_themselves_in_a_notebook(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = dstill.Evaluation(networks=1)
    result = dstill.run(tiny_real, method="random", out=tmp_path / "r", evaluation=once, **SMOKE)
    table = result._repr_html_()
    assert "<td>random</td>" in table and "random real images" in table and f"{100 * result.accuracy.mean:.1f}" in table
    syn = DistilledSet.load(tmp_path / "r" / "set-0")
    assert 'src="data:image/png;base64,' in syn._repr_html_() and "DistilledSet(&#x27;random&#x27;" in syn._repr_html_()
    shown: list[str] = []
    monkeypatch.setattr(Image.Image, "show", lambda self, title: shown.append(f"{title} {self.size}"))
    syn.show()
    assert shown == [f"{syn!r} (200, 68)"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_where_somebody_can_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(reporter_of(), Silent), "nobody looks at the output of a test"
    assert isinstance(reporter_of(True), ConsoleReporter)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(reporter_of(), ConsoleReporter)
    assert isinstance(reporter_of(False), Silent)
    mine = Silent()
    assert reporter_of(mine) is mine

    class Kernel:
        @staticmethod
        def get_ipython() -> Any:
            return type("ZMQInteractiveShell", (), {})()

    monkeypatch.setitem(sys.modules, "IPython", Kernel())  # type: ignore[arg-type]
    assert isinstance(reporter_of(), NotebookReporter)


def test_a_notebook_has_a_bar_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = NotebookReporter()
    reporter.note("a note\x1b[2J")
    for stage in ("experts", "distilling"):
        for done in (1, 2, 3):
            reporter.progress(stage, done, 3, f"loss {done}")
    out, err = capsys.readouterr()
    assert out == "a note\\x1b[2J\n"
    assert "experts: 100%" in err and "distilling: 100%" in err and "3/3" in err and "loss 3" in err
