"""`dstill.run` from images to result.json, for every method, with interruptions at every stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts.result import Claim, Result
from dstill.cli.show import describe
from dstill.config.registry import METHODS
from dstill.data.real import RealSet

PROTOCOL = (
    "{name: tiny, version: 1, passes: 4, batch_size: 8, momentum: 0.9, weight_decay: 5e-4, lr: 0.05, lr_factor: 0.5, "
    "networks: 2}"
)
TINY = ("net.width=4", "distill.student_steps=4")
MATCHING = sorted(name for name, info in METHODS.items() if info.needs_experts)


class Watch:
    """A reporter that records everything, and interrupts at a given point of a stage."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stop, self.notes = stop, list[str]()
        self.seen: dict[str, list[float]] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        if done == round(done):  # a slow machine also tells how far it is within an epoch
            self.seen.setdefault(stage, []).append(done)
        if self.stop == (stage, done):
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one cache of experts, and for the protocol."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "tiny.yaml").write_text(PROTOCOL)
    return folder


@pytest.fixture
def launch(tiny_real: RealSet, shared: Path) -> Callable[..., Result]:
    def run(out: Path, method: str, *changes: str, **options: Any) -> Result:
        settings = [f"protocol={shared / 'tiny.yaml'}", *(TINY if METHODS[method].needs_experts else ["net.width=4"]), *changes]
        machine = dstill.Machine(cache=options.pop("cache", shared / "cache"), workers=options.pop("workers", None))
        recording = dstill.Recording(**{key: options.pop(key) for key in list(options) if key.endswith("_every")})
        options = {"recipe": "smoke", "machine": machine, "recording": recording, **options}
        return dstill.run(tiny_real, method=method, out=out, changes=settings, **options)

    return run


def timeless(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    a, b = DistilledSet.load(one), DistilledSet.load(other)
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)
    assert a.alpha == b.alpha
    assert timeless(one) == timeless(other)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_goes_from_images_to_a_result(method: str, launch: Callable[..., Result], tmp_path: Path) -> None:
    result = launch(tmp_path, method, ipc=2)
    assert Result.load(tmp_path / "result.json") == result
    assert (result.method, result.ipc, result.sets, result.measured_on) == (method, 2, 1, "test")
    assert (result.protocol.name, result.protocol.version, result.accuracy.n) == ("tiny", 1, 2)
    assert result.random is not None
    files = {path.name for path in (tmp_path / "set-0").iterdir()}
    expected = {"distilled.safetensors", "distilled.png", "real.webp", "recipe.yaml", "settings.json", "cost.json"}
    expected |= set() if METHODS[method].family == "selection" else {"metrics.jsonl", "curves.png", "initial.safetensors"}
    expected |= {"experts.json"} if METHODS[method].needs_experts else set()
    expected |= {"initialisation.json"} if method == "ast" else set()
    assert files == expected
    assert (tmp_path / "report.html").exists()
    one = DistilledSet.load(tmp_path / "set-0")
    assert one.images.shape == (6, 3, 8, 8)
    assert one.class_ids.shape == (6,)
    assert one.labels.is_floating_point() == (METHODS[method].labels == "soft") == (result.labels == "soft")
    assert (one.alpha is None) == (METHODS[method].family != "trajectory matching" and method != "bptt")
    assert result.cost is not None and result.cost.seconds > 0
    assert dstill.load_recipe(str(tmp_path / "set-0" / "recipe.yaml")) == one.recipe
    assert one.accuracy is not None
    assert one.accuracy == Claim.of(result)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_same_seed_gives_the_same_images_and_accuracies(method: str, launch: Callable[..., Result], tmp_path: Path) -> None:
    # The second run trains its own experts.
    one, other = launch(tmp_path / "a", method), launch(tmp_path / "b", method, cache=tmp_path / "cache")
    assert (one.accuracy, one.random, one.alpha) == (other.accuracy, other.random, other.alpha)
    a, b = (DistilledSet.load(tmp_path / name / "set-0") for name in "ab")
    assert torch.equal(a.images, b.images)
    assert torch.equal(a.labels, b.labels)


def test_the_first_run_of_a_cache_whitens_as_the_later_ones_do(tiny_real: RealSet, tmp_path: Path) -> None:
    # With only three images, the memory layout of the whitening matrix affects the rounding of their product.
    first, later = (
        dstill.distill(tiny_real, method="random", ipc=1, changes=["preprocess=zca"], machine=dstill.Machine(cache=tmp_path))
        for _ in range(2)
    )
    assert torch.equal(first.images, later.images)


def test_another_seed_gives_other_images(launch: Callable[..., Result], tmp_path: Path) -> None:
    launch(tmp_path / "a", "mtt")
    launch(tmp_path / "b", "mtt", seed=1)
    a, b = (DistilledSet.load(tmp_path / name / "set-0") for name in "ab")
    assert not torch.equal(a.images, b.images)


def test_matching_moves_the_images(launch: Callable[..., Result], tmp_path: Path) -> None:
    launch(tmp_path / "a", "mtt", "distill.iterations=1")
    launch(tmp_path / "b", "mtt", "distill.iterations=5")
    a, b = (DistilledSet.load(tmp_path / name / "set-0") for name in "ab")
    assert not torch.equal(a.images, b.images)
    assert [row["iteration"] for row in timeless(tmp_path / "b" / "set-0")] == [0, 1, 2, 3, 4]


def test_validating_more_often_changes_no_other_number(launch: Callable[..., Result], tmp_path: Path) -> None:
    launch(tmp_path / "a", "ast")
    launch(tmp_path / "b", "ast", validate_every=3)
    rows = timeless(tmp_path / "b" / "set-0")
    assert [row["iteration"] for row in rows if "validation_accuracy" in row] == [2, 4]
    for row in rows:
        row.pop("validation_accuracy", None)
    assert rows == timeless(tmp_path / "a" / "set-0")


# Interruptions


@pytest.mark.parametrize("method", MATCHING)
def test_a_run_of_any_method_continued_between_checkpoints_equals_the_uninterrupted_one(
    method: str, launch: Callable[..., Result], tmp_path: Path
) -> None:
    whole = launch(tmp_path / "whole", method, "distill.iterations=9", "distill.batch_syn=2")
    for at in (1, 5, 9):
        out = tmp_path / str(at)
        with pytest.raises(KeyboardInterrupt):
            launch(
                *(out, method, "distill.iterations=9", "distill.batch_syn=2"),
                checkpoint_every=3,
                progress=Watch(("distilling", at)),
            )
        watch = Watch()
        again = launch(out, method, "distill.iterations=9", "distill.batch_syn=2", checkpoint_every=3, progress=watch)
        # The observer runs after the checkpoint of the same iteration; after the last one, only the result remains.
        assert watch.seen.get("distilling", []) == list(range(at // 3 * 3 + 1, 10))
        assert_same(out / "set-0", tmp_path / "whole" / "set-0")
        assert (again.accuracy, again.random) == (whole.accuracy, whole.random)


def test_a_run_interrupted_again_and_again_equals_the_uninterrupted_one(launch: Callable[..., Result], tmp_path: Path) -> None:
    launch(tmp_path / "whole", "ast", "distill.iterations=8")
    for at in (2, 3, 5, 7):
        with pytest.raises(KeyboardInterrupt):
            launch(*(tmp_path / "out", "ast", "distill.iterations=8"), checkpoint_every=2, progress=Watch(("distilling", at)))
    launch(tmp_path / "out", "ast", "distill.iterations=8")
    assert_same(tmp_path / "out" / "set-0", tmp_path / "whole" / "set-0")


def test_a_killed_process_continues_from_its_last_checkpoint(tmp_path: Path) -> None:
    code = """
import os, signal, sys, torch, dstill
torch.set_num_threads(1)
out, cache, at = sys.argv[1], sys.argv[2], int(sys.argv[3])

class Kill:
    def note(self, text): pass
    def progress(self, stage, done, total, detail=""):
        if stage == "distilling":
            print(done, flush=True)
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)

changes = ["distill.iterations=7", "net.width=4", "distill.student_steps=4"]
dstill.distill(
    "digits",
    recipe="smoke",
    method="ast",
    changes=changes,
    out=out,
    machine=dstill.Machine(cache=cache),
    recording=dstill.Recording(checkpoint_every=3),
    progress=Kill(),
)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(name: str, at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / "cache"), str(at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    assert start("out", 5).returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "distilled.safetensors").exists()
    assert start("out", 0).stdout.split() == ["4", "5", "6", "7"]
    dstill.distill(
        "digits",
        recipe="smoke",
        method="ast",
        changes=["distill.iterations=7", "net.width=4", "distill.student_steps=4"],
        out=tmp_path / "whole",
        machine=dstill.Machine(cache=tmp_path / "cache"),
    )
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_a_metrics_line_that_was_half_written_is_written_again(launch: Callable[..., Result], tmp_path: Path) -> None:
    launch(tmp_path / "whole", "mtt")
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path / "out", "mtt", checkpoint_every=2, progress=Watch(("distilling", 3)))
    with (tmp_path / "out" / "set-0" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "loss": 1.')
    launch(tmp_path / "out", "mtt")
    assert_same(tmp_path / "out" / "set-0", tmp_path / "whole" / "set-0")


def test_only_the_missing_experts_are_trained_after_an_interruption(launch: Callable[..., Result], tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    # Two experts of three epochs: stop in the second epoch of the second one.
    with pytest.raises(KeyboardInterrupt):
        launch(tmp_path / "a", "mtt", cache=cut, progress=Watch(("expert epochs", 5)))
    (kept,) = cut.glob("experts/*/*")
    assert kept.name == "expert-000.safetensors"
    stamp = kept.stat().st_mtime_ns
    watch = Watch()
    launch(tmp_path / "a", "mtt", cache=cut, progress=watch)
    assert watch.seen["expert epochs"] == [4, 5, 6]
    assert kept.stat().st_mtime_ns == stamp
    launch(tmp_path / "b", "mtt", cache=whole)
    for one, other in zip(sorted(cut.glob("experts/*/*")), sorted(whole.glob("experts/*/*")), strict=True):
        assert one.relative_to(cut) == other.relative_to(whole)
        assert one.read_bytes() == other.read_bytes()


def test_a_fourth_expert_changes_none_of_the_first_three(tiny_real: RealSet, tmp_path: Path) -> None:
    def train(*changes: str) -> dstill.Trajectories:
        return dstill.train_experts(
            tiny_real, recipe="smoke", method="mtt", changes=["net.width=4", *changes], machine=dstill.Machine(cache=tmp_path)
        )

    three = train("experts.count=3")
    before = [path.read_bytes() for path in three.paths]
    four = train("experts.count=4")
    assert four.folder == three.folder
    assert [path.read_bytes() for path in four.paths[:3]] == before
    assert not torch.equal(four.rows(3, 0, 1), four.rows(2, 0, 1))


def test_a_share_of_the_experts_can_be_trained_elsewhere(tiny_real: RealSet, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "smoke", "method": "mtt", "changes": ["net.width=4"]}
    part = dstill.train_experts(tiny_real, only=[1], machine=dstill.Machine(cache=tmp_path / "a"), **options)
    whole = dstill.train_experts(tiny_real, machine=dstill.Machine(cache=tmp_path / "b"), **options)
    assert [path.name for path in part.paths] == ["expert-001.safetensors"]
    assert part.paths[0].read_bytes() == whole.paths[1].read_bytes()


def test_an_expert_number_below_zero_is_refused_before_it_can_spoil_the_cache(tiny_real: RealSet, tmp_path: Path) -> None:
    with pytest.raises(DstillError, match="numbered from 0, got -1"):
        dstill.train_experts(tiny_real, recipe="smoke", method="mtt", only=[-1], machine=dstill.Machine(cache=tmp_path))
    assert not (tmp_path / "experts").exists()


def test_random_has_no_experts_to_train(tiny_real: RealSet, tmp_path: Path) -> None:
    with pytest.raises(DstillError, match="'random' needs no experts"):
        dstill.train_experts(tiny_real, method="random", machine=dstill.Machine(cache=tmp_path))


# Finished runs and other settings


def test_a_finished_run_distils_nothing_and_says_the_same(launch: Callable[..., Result], tmp_path: Path) -> None:
    first = launch(tmp_path, "ast")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "set-0").glob("*.png")}
    watch = Watch()
    again = launch(tmp_path, "ast", progress=watch)
    assert "distilling" not in watch.seen
    assert "expert epochs" not in watch.seen
    assert any("finished: nothing to do" in note for note in watch.notes)
    assert (again.accuracy, again.random) == (first.accuracy, first.random)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_what_is_missing_beside_a_finished_set_is_made_up(launch: Callable[..., Result], tmp_path: Path) -> None:
    launch(tmp_path, "mtt")
    beside = [tmp_path / "set-0" / name for name in ("recipe.yaml", "distilled.png", "curves.png")]
    before = [path.read_bytes() for path in beside]
    for path in beside:  # as if the process had been killed right after the set was written
        path.unlink()
    launch(tmp_path, "mtt")
    assert [path.read_bytes() for path in beside] == before


def test_two_sets_share_their_experts_and_differ_in_their_seeds(launch: Callable[..., Result], tmp_path: Path) -> None:
    result = launch(tmp_path, "mtt", sets=2)
    one, other = (DistilledSet.load(tmp_path / f"set-{k}") for k in range(2))
    assert (one.seed, other.seed) == (0, 1)
    assert not torch.equal(one.images, other.images)
    stamps = [json.loads((tmp_path / f"set-{k}" / "settings.json").read_text()) for k in range(2)]
    assert stamps[0]["experts"] == stamps[1]["experts"]
    assert (result.sets, result.accuracy.n) == (2, 4)
    assert result.accuracy.between_sets is not None


def test_a_second_set_is_added_to_a_run_of_one(launch: Callable[..., Result], tmp_path: Path) -> None:
    launch(tmp_path, "mtt")
    first = DistilledSet.load(tmp_path / "set-0").images
    assert launch(tmp_path, "mtt", sets=2).sets == 2
    assert torch.equal(DistilledSet.load(tmp_path / "set-0").images, first)


@pytest.mark.parametrize(
    ("changes", "options", "difference"),
    [
        (["distill.iterations=6"], {}, "recipe.distill.iterations: 5 there, 6 now"),
        ([], {"seed": 3}, "seed: 0 there, 3 now"),
        ([], {"ipc": 2}, "recipe.ipc: 1 there, 2 now"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    changes: list[str], options: dict[str, Any], difference: str, launch: Callable[..., Result], tmp_path: Path
) -> None:
    launch(tmp_path, "mtt")
    before = (tmp_path / "set-0" / "distilled.safetensors").read_bytes()
    with pytest.raises(DstillError) as caught:
        launch(tmp_path, "mtt", *changes, **options)
    assert difference in str(caught.value)
    assert "pass another -o, or remove the folder" in str(caught.value)
    assert (tmp_path / "set-0" / "distilled.safetensors").read_bytes() == before


def test_other_settings_are_refused_before_experts_are_trained(launch: Callable[..., Result], tmp_path: Path) -> None:
    launch(tmp_path / "out", "mtt", cache=tmp_path / "cache")
    with pytest.raises(DstillError, match=r"experts\.lr"):
        launch(tmp_path / "out", "mtt", "experts.lr=0.02", cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "experts").iterdir())) == 1


# Mistakes are reported before the long work


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (["protocol=astt"], {}, "unknown protocol 'astt'; did you mean ast"),
        ([], {"evaluation": dstill.Evaluation(nets=["convnet", "vgg12"])}, "unknown network 'vgg12'; did you mean vgg11"),
        (["net.norm=batch"], {}, "running statistics"),
        (["net.name=convnot"], {}, "did you mean convnet"),
        ([], {"sets": 0}, "sets must be at least 1, got 0"),
        ([], {"evaluation": dstill.Evaluation(networks=0)}, "networks must be at least 1, got 0"),
        ([], {"ipc": 21}, "has 20 training images, fewer than the 21"),
    ],
)
def test_a_mistake_is_refused_before_experts_are_trained(
    changes: list[str], options: dict[str, Any], message: str, tiny_real: RealSet, tmp_path: Path
) -> None:
    with pytest.raises(DstillError, match=message):
        dstill.run(
            tiny_real,
            recipe="smoke",
            method="mtt",
            changes=changes,
            out=tmp_path / "o",
            machine=dstill.Machine(cache=tmp_path / "c"),
            **options,
        )
    assert not (tmp_path / "c" / "experts").exists()


def test_what_is_chosen_on_a_holdout_is_measured_on_validation(tiny_real: RealSet, shared: Path, tmp_path: Path) -> None:
    changes = [f"protocol={shared / 'tiny.yaml'}", *TINY]
    result = dstill.run(
        tiny_real.holdout(0),
        recipe="smoke",
        method="mtt",
        changes=changes,
        out=tmp_path,
        machine=dstill.Machine(cache=shared / "cache"),
    )
    assert (result.measured_on, result.random) == ("validation", None)


def test_a_set_says_which_networks_were_measured_on_what(tiny_real: RealSet, shared: Path, tmp_path: Path) -> None:
    changes = [f"protocol={shared / 'tiny.yaml'}", "net.width=4"]
    held = tiny_real.holdout(0)
    dstill.run(
        held,
        recipe="smoke",
        method="random",
        changes=changes,
        out=tmp_path,
        evaluation=dstill.Evaluation(nets=["vgg11"]),
        machine=dstill.Machine(cache=shared / "cache"),
    )
    distilled = DistilledSet.load(tmp_path / "set-0")
    said = "fresh vgg11 networks on real images held out of the training set"
    assert said in str(distilled.accuracy)
    assert said in describe(tmp_path / "set-0")
    assert said in (distilled.export("hf", tmp_path / "hub") / "README.md").read_text()
    assert "fresh vgg11 networks" in (tmp_path / "report.html").read_text()


def test_judging_on_other_data_than_the_set_was_made_of_is_said(
    launch: Callable[..., Result], tiny_real: RealSet, tmp_path: Path
) -> None:
    launch(tmp_path, "random")
    watch = Watch()
    for data in (tiny_real, tiny_real.holdout(0)):
        dstill.evaluate(tmp_path / "set-0", data, networks=1, random=False, progress=watch)
    assert ["the set was not distilled from" in note for note in watch.notes if not note.startswith("this takes")] == [True]
