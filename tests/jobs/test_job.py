"""Whatever must exist before a set is distilled is made once."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.steady import Steady

import dstill
from dstill import DistilledSet, DstillError
from dstill.config.recipes import load_recipe, resolve
from dstill.data.catalog import DATASETS, Shape, content_of
from dstill.data.real import RealSet
from dstill.experts.trajectory import Trajectories, recorded_epochs
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Choice
from dstill.planning.plan import plan_job

SETTINGS: dict[str, Any] = {
    "method": "ast",
    "recipe": "smoke",
    "changes": ["net.width=4", "experts.count=2", "distill.initialisation=representative", "distill.feature_epochs=5"],
}


def changed(*changes: str) -> dict[str, Any]:
    return {"changes": [*SETTINGS["changes"], *changes]}


class _Counting:
    """Records the stages of the reported progress."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def note(self, text: str) -> None:
        """Nothing."""

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        if detail and done == round(done):  # an epoch has ended
            self.stages.append(stage)


def test_the_expert_that_describes_images_is_trained_once_and_to_its_full_length(tiny_real: RealSet, tmp_path: Path) -> None:
    planned = dstill.plan(tiny_real, machine=dstill.Machine(cache=tmp_path), **SETTINGS)
    reporter = _Counting()
    experts = dstill.train_experts(tiny_real, progress=reporter, machine=dstill.Machine(cache=tmp_path), **SETTINGS)
    assert [recorded_epochs(path) for path in experts.paths] == [5, experts.epochs]
    assert reporter.stages.count("expert epochs") == 5 + experts.epochs
    notes = [stage.note for stage in planned.stages if "expert" in stage.name]
    assert notes == [f"1 of 5 epochs for the initialisation, 1 of {experts.epochs} epochs"]

    reporter = _Counting()
    dstill.distill(tiny_real, progress=reporter, machine=dstill.Machine(cache=tmp_path), **SETTINGS)
    assert "expert epochs" not in reporter.stages


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recording": dstill.Recording(logs=["tensorbord"])}, "unknown log 'tensorbord'"),
        ({"init": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"ipc": 100}, "fewer than the 100"),
        ({"net": "resnet19"}, "unknown network"),
        (changed("augmentation=crop_flpi"), "flpi"),
        (changed("experts.epochs=1"), "experts.epochs 1 is too short, matching needs"),
        (changed("net.norm=group", "distill.precision=bfloat16"), "use float32 for ConvNet"),
        (changed("net.norm=group", "experts.precision=bfloat16"), "use float32 for ConvNet"),
        (changed("distill.gradient=graph", "distill.precision=bfloat16"), "gradient graph is plain autograd"),
    ],
)
def test_what_is_wrong_is_said_before_an_expert_is_trained(
    tiny_real: RealSet, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(DstillError, match=message):
        dstill.distill(tiny_real, machine=dstill.Machine(cache=tmp_path), **{**SETTINGS, **wrong})
    assert not (tmp_path / "experts").exists()


def test_what_does_not_fit_is_said_before_anything_is_trained(tiny_real: RealSet, tmp_path: Path) -> None:
    """Initial images; experts of another network; a validation part from a class with one image."""
    two = dstill.distill(tiny_real, method="random", recipe="smoke", ipc=2)
    with pytest.raises(DstillError, match=r"1 of .* are wanted in each"):
        dstill.distill(tiny_real, init=two, machine=dstill.Machine(cache=tmp_path), **SETTINGS)
    rows = torch.cat([(tiny_real.train.labels > 0).nonzero()[:, 0], (tiny_real.train.labels == 0).nonzero()[:1, 0]])
    lonely = replace(tiny_real, train=tiny_real.train.take(rows), fingerprint="")
    looking = dstill.Recording(validate_every=1)
    for command in (dstill.distill, dstill.run):
        with pytest.raises(DstillError, match=f"class {tiny_real.class_names[0]!r} has 1 image"):
            command(lonely, out=tmp_path / "out", recording=looking, machine=dstill.Machine(cache=tmp_path), **SETTINGS)
    assert not (tmp_path / "experts").exists()

    other = {**SETTINGS, "changes": ["net.width=3", "experts.count=1"]}
    experts = dstill.train_experts(tiny_real, machine=dstill.Machine(cache=tmp_path / "other"), **other)
    with pytest.raises(DstillError, match=r"have \d+ parameters, the recipe's network \d+"):
        dstill.distill(tiny_real, experts=experts, machine=dstill.Machine(cache=tmp_path), **SETTINGS)
    longer = {**SETTINGS, **changed("net.width=3", "distill.max_start_epoch=30")}
    with pytest.raises(DstillError, match=r"matching needs \d+"):
        dstill.distill(tiny_real, experts=experts, machine=dstill.Machine(cache=tmp_path), **longer)
    assert not (tmp_path / "experts").exists()


def test_a_folder_of_a_run_from_other_images_is_refused_before_an_expert_is_trained(tiny_real: RealSet, tmp_path: Path) -> None:
    place, begun = dstill.Machine(cache=tmp_path / "begun"), tmp_path / "out" / "set-0"
    given = dstill.distill(tiny_real, method="random", recipe="smoke", changes=["net.width=4"], machine=place)
    dstill.distill(tiny_real, init=given, out=begun, machine=place, **SETTINGS)
    elsewhere = dstill.Machine(cache=tmp_path / "elsewhere")
    for other in (None, replace(given, images=2 * given.images)):
        with pytest.raises(DstillError, match=r"holds a run with other settings \(initial: "):
            dstill.distill(tiny_real, init=other, out=begun, machine=elsewhere, **SETTINGS)
        with pytest.raises(DstillError, match=r"holds a run with other settings \(initial: "):
            dstill.run(tiny_real, init=other, out=tmp_path / "out", machine=elsewhere, **SETTINGS)
    assert not (tmp_path / "elsewhere" / "experts").exists()


def test_a_set_of_other_classes_is_no_start(tiny_real: RealSet, tmp_path: Path) -> None:
    place = dstill.Machine(cache=tmp_path)
    given = dstill.distill(tiny_real, method="random", recipe="smoke", changes=["net.width=4"], machine=place)
    turned = dstill.load_real(tiny_real, classes=tiny_real.class_names[::-1])
    with pytest.raises(DstillError, match="start from a set of these classes, in this order"):
        dstill.distill(turned, init=given, machine=place, **SETTINGS)
    dstill.distill(turned, init=replace(given, class_names=("0", "1", "2")), machine=place, **SETTINGS)


def test_the_name_of_another_method_does_not_change_settings(tiny_real: RealSet) -> None:
    recipe = load_recipe("cifar10/ast-ipc1")
    with pytest.raises(DstillError, match="is for method 'ast', not 'mtt'"):
        dstill.plan(tiny_real, recipe=recipe, method="mtt")


def test_a_set_that_starts_from_given_images_needs_no_expert_to_describe_any(tiny_real: RealSet, tmp_path: Path) -> None:
    given = dstill.distill(
        tiny_real, method="random", recipe="smoke", changes=["net.width=4"], machine=dstill.Machine(device="cpu")
    )
    job = Job.resolve(tiny_real, Choice(**SETTINGS), 0, Workplace.of(dstill.Machine(cache=tmp_path), False))
    notes = [plan_job(job, task, Steady(job.shape, 1e-3), "experts").stages[0].note for task in (Task(), Task(initial=given))]
    assert ["for the initialisation" in note for note in notes] == [True, False], "nor is one planned"
    dstill.distill(tiny_real, init=given, machine=dstill.Machine(cache=tmp_path), **SETTINGS)
    (folder,) = (tmp_path / "experts").iterdir()
    assert Trajectories(folder).epochs == max(recorded_epochs(path) for path in Trajectories(folder).paths) < 5


def test_experts_of_other_inputs_are_refused(tiny_real: RealSet, tmp_path: Path) -> None:
    experts = dstill.train_experts(tiny_real, machine=dstill.Machine(cache=tmp_path), **SETTINGS)
    dstill.distill(tiny_real, experts=experts.folder, machine=dstill.Machine(cache=tmp_path), **SETTINGS)
    with pytest.raises(DstillError, match=r"other preprocess \(zca, not standardise\): pass --set preprocess=zca"):
        dstill.distill(
            tiny_real,
            experts=experts,
            machine=dstill.Machine(cache=tmp_path),
            **{**SETTINGS, **changed("preprocess=standardise")},
        )
    with pytest.raises(DstillError, match="other data"):
        dstill.distill(tiny_real.holdout(0), experts=experts, machine=dstill.Machine(cache=tmp_path), **SETTINGS)


def test_a_selection_by_another_network_is_another_run(tiny_real: RealSet, tmp_path: Path) -> None:
    def select(seed: int | None, out: str) -> DistilledSet:
        settings: dict[str, Any] = {"recipe": "smoke", "method": "herding", "changes": ["net.width=4"]}
        both = 0 if seed is None else dstill.Seeds(0, seed)
        cache = dstill.Machine(cache=tmp_path / "cache")
        return dstill.distill(tiny_real, seed=both, out=tmp_path / out, machine=cache, **settings)

    first = select(None, "a")
    assert torch.equal(select(0, "a").images, first.images)
    with pytest.raises(DstillError, match="expert_seed: 0 there, 1 now"):
        select(1, "a")
    assert not torch.equal(select(1, "b").images, first.images)


def test_experts_of_another_network_with_as_many_parameters_are_refused(tiny_real: RealSet, tmp_path: Path) -> None:
    with_group_norm = {**SETTINGS, "changes": ["net.width=8", "net.norm=group", "experts.count=1"]}
    experts = dstill.train_experts(tiny_real, machine=dstill.Machine(cache=tmp_path), **with_group_norm)
    options: dict[str, Any] = {"experts": experts, "init": None, "machine": dstill.Machine(cache=tmp_path)}
    ours = {**SETTINGS, "changes": ["net.width=8", "experts.count=1"]}
    with pytest.raises(DstillError, match=r"another network: pass --set net\.name=convnet net\.width=8 .*net\.norm=group, or"):
        dstill.distill(tiny_real, **options, **ours)
    dstill.distill(tiny_real, **options, **with_group_norm)
    named_by_default = {**SETTINGS, "changes": ["net.width=8", "net.norm=instance", "experts.count=1"]}
    own = dstill.train_experts(tiny_real, machine=dstill.Machine(cache=tmp_path), **named_by_default)
    dstill.distill(tiny_real, **{**options, "experts": own}, **ours)


def test_no_whitening_of_images_that_are_small_on_one_side_alone() -> None:
    def kind(size: tuple[int, int]) -> str:
        return resolve(None, "mine", Shape(1, size, 10), method="mtt", ipc=1)[0].preprocess

    assert (kind((32, 32)), kind((32, 1000)), kind((1000, 32))) == ("zca", "standardise", "standardise")


@pytest.mark.parametrize("option", ["threads", "workers", "streams"])
def test_a_machine_works_with_at_least_one_of_each(option: str) -> None:
    with pytest.raises(DstillError, match=f"{option} must be at least 1.*, got 0"):
        dstill.plan("digits", method="random", recipe="smoke", machine=dstill.Machine(**{option: 0}), progress=False)


def pictures(root: Path) -> Path:
    """A folder of three classes with two images each, in both splits."""
    for split, name, value in itertools.product(("train", "test"), ("cat", "dog", "owl"), (10, 200)):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (value, value, value)).save(root / split / name / f"{value}.png")
    return root


@pytest.mark.parametrize("name", ["woof", "cifar10", "imagenet-subset", "mnist"])
@pytest.mark.parametrize("method", ["ast", "mtt", "dm"])
def test_what_a_folder_is_called_does_not_choose_its_settings(name: str, method: str, tmp_path: Path) -> None:
    place = Workplace.of(dstill.Machine(device="cpu", cache=tmp_path / "cache"), False)
    found = [Job.resolve(pictures(tmp_path / called), Choice(method), 0, place) for called in (name, "dogs")]
    plain, other = (job.recipe.model_copy(update={"data": "only a note"}) for job in found)
    assert plain == other
    assert found[0].origin.replace(f"for {name} at", "for dogs at") == found[1].origin


def test_a_copy_that_holds_a_known_set_gets_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = dict.fromkeys(("cat", "dog", "owl"), 2)
    entry = replace(DATASETS["cifar10"], shape=Shape(3, (16, 16), 3, 6, 6), content=content_of(counts))
    monkeypatch.setitem(DATASETS, "cifar10", entry)
    place = Workplace.of(dstill.Machine(device="cpu", cache=tmp_path / "cache"), False)
    job = Job.resolve(pictures(tmp_path / "anything"), Choice("ast"), 0, place)
    assert (job.name, job.recipe, job.origin) == ("anything", load_recipe("cifar10/ast-ipc1"), "recipe cifar10/ast-ipc1")


def test_draws_side_by_side_are_for_nvidia_cards_and_reach_the_problem(tiny_real: RealSet, tmp_path: Path) -> None:
    where: dict[str, Any] = {"device": "cpu", "cache": tmp_path}
    with pytest.raises(DstillError, match="streams 2 needs an NVIDIA card, and the device is cpu: leave it at 1"):
        Workplace.of(dstill.Machine(**where, streams=2))
    assert Workplace.of(dstill.Machine(**where)).streams == 1
    place = replace(Workplace.of(dstill.Machine(**where), False), streams=3)
    job = Job.resolve(tiny_real, Choice("dm", recipe="smoke"), 0, place)
    assert job.problem(0, None).streams == 3


def test_streams_of_a_card_reach_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstill.jobs.job.resolve_device", torch.device)
    place = Workplace.of(dstill.Machine(device="cuda", cache=tmp_path, streams=3), False)
    assert (place.device.type, place.streams) == ("cuda", 3)


class _Noting(_Counting):
    """Records the notes."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_what_was_read_is_said_once_by_whoever_reads_it(tmp_path: Path) -> None:
    line = "pics has 3 classes: cat, dog, owl; 6 train, 6 test images of 3x16x16"
    root, machine = pictures(tmp_path / "pics"), dstill.Machine(device="cpu", cache=tmp_path / "cache")
    fast: dict[str, Any] = {"machine": machine, "changes": ["net.width=4", "net.depth=1", "protocol=quick"]}
    reporter = _Noting()
    syn = dstill.distill(root, method="random", progress=reporter, **fast)
    assert reporter.notes.count(line) == 1
    for say in (
        lambda progress: dstill.evaluate(syn, root, networks=1, random=False, machine=machine, progress=progress),
        lambda progress: dstill.judge(syn, root, networks=1, whole=False, machine=machine, progress=progress),
        lambda progress: dstill.plan(root, method="random", progress=progress, **fast),
    ):
        reporter = _Noting()
        say(reporter)
        assert reporter.notes.count(line) == 1
    reporter = _Noting()
    dstill.distill(dstill.load_real(root), method="random", progress=reporter, **fast)
    assert line not in reporter.notes
