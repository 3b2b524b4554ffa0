"""A folder belongs to one run: to its data, its settings, its seed, its experts and the images that it starts from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dstill.artifacts import pictures
from dstill.config.settings import NetConfig, Recipe
from dstill.data import preprocess
from dstill.data.real import RealSet
from dstill.distillation.folder import Watcher, distill_into
from dstill.distillation.loop import Cadence
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories, save_expert
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Choice, Machine
from dstill.methods.base import Problem
from dstill.nets.networks import build
from dstill.support.crew import Crew
from dstill.support.progress import Silent

NET = NetConfig(width=4, depth=1)


def problem(real: RealSet, experts: Trajectories | None = None, **settings: Any) -> Problem:
    small = {"iterations": 1, "student_steps": 2, "expert_epochs": 2, "max_start_epoch": 1}
    recipe = Recipe.model_validate({"data": "tiny", "method": "mtt", "ipc": 1, "net": NET, "distill": {**small, **settings}})
    return Problem(real, preprocess.fit("standardise", real.train.images), recipe, experts, torch.device("cpu"), 0)


def distil(one: Problem, out: Path, seed: int = 0) -> torch.Tensor:
    return distill_into(out, one, known(one, seed), Cadence(), Silent()).images


def known(one: Problem, seed: int = 0) -> dict[str, Any]:
    """What a run with these settings is known by before its experts are trained."""
    return Job.resolve(one.real, Choice(recipe=one.recipe), seed, Workplace.of(Machine(device="cpu"), False)).identity(seed)


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """Two, of which nobody asks what they have learned."""
    net = build(NET, 3, 3, (8, 8), torch.Generator().manual_seed(0))
    start = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    for index in range(2):
        steps = 0.01 * torch.randn(3, len(start), generator=torch.Generator().manual_seed(index)).cumsum(0)
        save_expert(tmp_path / "experts", index, start + steps, {"record": {"accuracy": [0.1] * 2, "step_lengths": [1.0] * 2}})
    return tmp_path / "experts"


def test_what_decides_a_set_decides_whose_a_folder_is(tiny_real: RealSet, experts: Path, tmp_path: Path) -> None:
    one = problem(tiny_real, Trajectories(experts, 1))
    images, initial = distil(one, tmp_path / "run"), distil(one, tmp_path / "initial")
    assert torch.equal(images, initial)
    assert torch.equal(distil(one, tmp_path / "run"), images), "the same run again is finished"
    relabelled = replace(tiny_real.test, labels=tiny_real.test.labels.flip(0))
    others = {
        "expert_count": problem(tiny_real, Trajectories(experts)),
        "lr_images": problem(tiny_real, Trajectories(experts, 1), lr_images=1.0),
        "data": problem(replace(tiny_real, test=relabelled, fingerprint=""), Trajectories(experts, 1)),
    }
    for name, other in others.items():
        with pytest.raises(DstillError, match=f"holds a run with other settings .*{name}"):
            distil(other, tmp_path / "run")
    with pytest.raises(DstillError, match=r"holds a run with other settings .*seed"):
        distil(one, tmp_path / "run", seed=1)


def test_a_folder_keeps_real_images_of_each_class(tiny_real: RealSet, experts: Path, tmp_path: Path) -> None:
    distil(problem(tiny_real, Trajectories(experts, 1)), tmp_path / "run")
    squares = pictures.load_real(tmp_path / "run" / "real.webp", 3)
    for square, rows in zip(squares, tiny_real.train.by_class(3), strict=True):
        first = pictures.image_of(tiny_real.train.images[int(rows[0])])
        assert square.crop((0, 0, 8, 8)).tobytes() == first.tobytes()


def test_a_run_from_other_images_is_another_run(tiny_real: RealSet, experts: Path, tmp_path: Path) -> None:
    one = problem(tiny_real, Trajectories(experts, 1))
    start = distill_into(tmp_path / "first", one, known(one), Cadence(), Silent())
    given = replace(one, initial=start)
    distil(given, tmp_path / "run")
    distil(given, tmp_path / "run")
    for other in (one, replace(one, initial=replace(start, images=start.images + 0.1))):
        with pytest.raises(DstillError, match=r"holds a run with other settings .*initial"):
            distil(other, tmp_path / "run")


class Slow(Crew):
    def straggler(self) -> str:
        return "process 1 is slow"


def test_a_process_that_holds_up_the_others_is_told_once(tiny_real: RealSet, monkeypatch: pytest.MonkeyPatch) -> None:
    told, silent = list[str](), Silent()
    monkeypatch.setattr(silent, "note", told.append)
    watcher = Watcher(problem(tiny_real), silent)
    for iteration in range(150):
        watcher(iteration, 400, {"seconds": 1.0})
    assert told == [], "alone, a process waits for nobody"
    watcher.crew = Slow()
    for iteration in range(150, 199):
        watcher(iteration, 400, {"seconds": 1.0})
    assert told == [], "the first iterations say little about the pace"
    for iteration in range(199, 400):
        watcher(iteration, 400, {"seconds": 1.0})
    assert told == ["process 1 is slow"]
