"""What is asked of the public functions happens, and happens with the seed, the experts and the settings that are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dstill
from dstill import DistilledSet, Seeds
from dstill.data.real import RealSet, Split
from dstill.experts.trajectory import Trajectories
from dstill.nets.convnet import ConvNet

TINY = ["net.width=4", "experts.batch_size=20"]


def small(channels: int, classes: int, size: tuple[int, int]) -> torch.nn.Module:
    return ConvNet(channels, classes, size, width=4, depth=1)


class Blind(torch.nn.Linear):
    """A network that sees nothing: it takes every image for the first class."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 0 * super().forward(input.flatten(1))


def blind(channels: int, classes: int, size: tuple[int, int]) -> torch.nn.Module:
    return Blind(channels * size[0] * size[1], classes)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    machine = dstill.Machine(device="cpu", cache=tmp_path / "cache")
    return {"recipe": "smoke", "changes": TINY, "machine": machine, "progress": False}


def seeds_of(folder: Path) -> set[int]:
    return {Trajectories(one).headers[0]["seed"] for one in (folder / "cache" / "experts").iterdir()}


def test_images_and_experts_have_seeds_of_their_own(tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]) -> None:
    other = dstill.distill(tiny_real, method="mtt", seed=Seeds(images=7, experts=0), out=tmp_path / "a", **options)
    assert other.seed == 7 and seeds_of(tmp_path) == {0}
    one = dstill.distill(tiny_real, method="mtt", seed=0, **options)
    assert not torch.equal(one.images, other.images)
    dstill.distill(tiny_real, method="mtt", seed=7, **options)
    assert seeds_of(tmp_path) == {0, 7}


def test_each_set_of_a_run_has_the_next_seed_and_all_share_the_experts(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    judged = dstill.Evaluation(networks=1, random=False)
    dstill.run(tiny_real, method="mtt", sets=2, seed=4, out=tmp_path / "r", evaluation=judged, **options)
    sets = [DistilledSet.load(tmp_path / "r" / f"set-{k}") for k in range(2)]
    assert [one.seed for one in sets] == [4, 5] and seeds_of(tmp_path) == {4}
    alone = dstill.distill(tiny_real, method="mtt", seed=Seeds(5, 4), **options)
    assert torch.equal(alone.images, sets[1].images)


def test_the_evaluation_of_a_run_is_that_of_evaluate_with_its_seed(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    judged = dstill.Evaluation(nets=["convnet", small], networks=2, whole=True)
    result = dstill.run(tiny_real, method="random", seed=3, out=tmp_path / "r", evaluation=judged, **options)
    place = {"machine": options["machine"], "progress": False}
    again = dstill.evaluate(
        tmp_path / "r" / "set-0", tiny_real, nets=["convnet", small], networks=2, whole=True, seed=3, **place
    )
    assert (result.accuracy, result.nets, result.random, result.whole) == (
        again.accuracy,
        again.nets,
        again.random,
        again.whole,
    )
    assert list(result.nets) == ["convnet", f"{__name__}:small"] and result.accuracy == result.nets["convnet"]
    assert result.accuracy.n == 2 and result.random is not None and result.whole is not None
    other = dstill.evaluate(tmp_path / "r" / "set-0", tiny_real, networks=2, seed=4, random=False, **place)
    assert other.accuracy.values != result.accuracy.values


def test_every_network_of_an_evaluation_is_another_one(tiny_real: RealSet, options: dict[str, Any]) -> None:
    syn = dstill.distill(tiny_real, method="random", **options)
    place = {"machine": options["machine"], "progress": False}
    accuracies = dstill.evaluate(syn, tiny_real, protocol="quick", networks=4, random=False, **place).accuracy.values
    assert len(set(accuracies)) > 1, "four equal accuracies would be those of one network"


def test_every_kind_of_network_is_measured_itself_on_the_test_images(tiny_real: RealSet, options: dict[str, Any]) -> None:
    test = Split(tiny_real.test.images, torch.zeros_like(tiny_real.test.labels))
    real = RealSet("one class", tiny_real.train, test, tiny_real.class_names)
    syn = dstill.distill(real, method="random", **options)
    judged: dict[str, Any] = {"networks": 2, "random": False, "progress": False, "machine": options["machine"]}
    kinds = dstill.evaluate(syn, real, nets=["convnet", blind], protocol="quick", **judged).nets
    assert kinds[f"{__name__}:blind"].values == (1.0, 1.0), "only the test images are all of the first class"
    assert max(kinds["convnet"].values) < 1.0


def test_images_per_class_may_be_asked_for_beside_a_recipe(tiny_real: RealSet, options: dict[str, Any]) -> None:
    recipe = dstill.distill(tiny_real, method="random", **options).recipe
    two = dstill.distill(tiny_real, recipe=recipe, ipc=2, progress=False)
    assert (two.ipc, len(two.images)) == (2, 6)


def test_a_run_looks_stores_and_paints_as_often_as_it_is_asked(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstill.artifacts.run_folder import RunFolder

    stored: list[int] = []
    monkeypatch.setattr(RunFolder, "checkpoint", lambda self, done, state: stored.append(done))
    recording = dstill.Recording(validate_every=2, checkpoint_every=3, picture_every=4, keep_every=2)
    dstill.distill(tiny_real, method="dm", out=tmp_path / "o", recording=recording, **options)
    rows = [json.loads(line) for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] + 1 for row in rows if "validation_accuracy" in row] == [2, 4, 5]
    assert stored == [3]
    assert sorted(path.name for path in (tmp_path / "o" / "frames").iterdir()) == ["0000004.png", "0000005.png"]
    kept = {path.name: dstill.DistilledSet.load(path) for path in sorted((tmp_path / "o").glob("after-*"))}
    assert list(kept) == ["after-0000002.safetensors", "after-0000004.safetensors"]
    two, four = (one.images for one in kept.values())
    assert not two.equal(four)
    fewer = dstill.distill(tiny_real, method="dm", distill={"iterations": 2}, **options)
    assert fewer.images.equal(two), "what is kept is the set after so many iterations"


def test_a_run_keeps_how_its_data_were_read_as_far_as_it_is_told(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    kept: dict[str, dict[str, Any]] = {"name": {"source": "digits"}, "part": {"source": "digits", "train_fraction": 0.5}}
    dstill.distill("digits", method="random", out=tmp_path / "name", **options)
    part = dstill.load_real("digits", train_fraction=0.5)
    dstill.distill(part, method="random", out=tmp_path / "part", **options)
    dstill.distill(tiny_real, method="random", out=tmp_path / "arrays", **options)
    for name in ("name", "part"):
        assert json.loads((tmp_path / name / "source.json").read_text()) == kept[name]
    assert not (tmp_path / "arrays" / "source.json").exists()


def test_settings_are_resolved_once_and_every_stage_has_the_same(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstill.config import recipes

    resolved: list[str | None] = []
    resolve = recipes.resolve
    monkeypatch.setattr(recipes, "resolve", lambda *given, **more: resolved.append(given[0]) or resolve(*given, **more))
    judged = dstill.Evaluation(networks=1, random=False)
    dstill.run(tiny_real, method="ast", ipc=2, out=tmp_path / "r", evaluation=judged, **options)
    assert resolved == ["smoke"], "a run resolves its settings once"
    recipe = DistilledSet.load(tmp_path / "r" / "set-0").recipe
    assert recipe is not None and (recipe.method, recipe.ipc, recipe.net.width) == ("ast", 2, 4)
    (experts,) = (tmp_path / "cache" / "experts").iterdir()
    header = Trajectories(experts).headers[0]
    assert header["net"]["width"] == 4 and header["experts"]["batch_size"] == 20
    assert header["preprocess"] == recipe.preprocess and header["augmentation"] == recipe.augmentation


def test_a_selection_looks_through_a_network_trained_as_its_settings_say(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    for epochs in (1, 3):
        dstill.distill(tiny_real, method="herding", distill={"training": {"epochs": epochs}}, **options)
    assert len(list((tmp_path / "cache" / "networks").iterdir())) == 2


def test_experts_that_are_given_may_be_shorter_than_the_recipes(tiny_real: RealSet, options: dict[str, Any]) -> None:
    """The check of `experts.epochs` is for experts that the recipe trains."""
    experts = dstill.train_experts(tiny_real, method="mtt", **options)
    strange = {**options, "changes": [*TINY, "experts.epochs=1"]}
    with pytest.raises(dstill.DstillError, match="too short"):
        dstill.distill(tiny_real, method="mtt", **strange)
    assert len(dstill.distill(tiny_real, method="mtt", experts=experts, **strange).images) == 3
