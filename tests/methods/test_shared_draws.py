"""Every method that averages draws ends with the same bits in any number of processes, also when that number changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.record import INITIAL_NAME
from dstill.artifacts.run_folder import RunFolder
from dstill.distillation.folder import processes
from dstill.distillation.loop import Cadence, follow, run_method
from dstill.methods.base import Problem
from dstill.support.crew import Crew, Group
from dstill.support.mates import together

from .test_drawing import DRAWING, KINDS, problem_of  # noqa: F401 - a fixture

DRAWS = 4
LIKE: dict[str, str] = {"dc": "dsa", "ftd": "mtt", "tesla": "mtt", "datm": "mtt", "ast": "mtt", "rat-bptt": "bptt"}
MORE: dict[str, dict[str, Any]] = {
    "mtt": {"soft_labels": "learned", "batch_syn": 4, "image_momentum": 0.5},
    "tesla": {"soft_labels": "expert"},
    "dm": {"image_ema": 0.5, "image_momentum": 0.5},
    "rat-bptt": {"window": 2},
}


def settings_of(name: str) -> dict[str, Any]:
    return {**KINDS[LIKE.get(name, name)], **MORE.get(name, {}), "draws": DRAWS}


def within(group: Group, number: int) -> Group:
    """A group of its own for one of several runs of the same processes."""
    return Group(PrefixStore(f"run {number}", group.store), group.number, group.size)


def follow_all(problems: Sequence[Problem], group: Group) -> None:
    for number, problem in enumerate(problems):
        follow(problem, within(group, number))


class Interrupted(Exception):
    pass


def interrupt(iteration: int, total: int, row: dict[str, float]) -> None:
    if iteration == 0:
        raise Interrupted


def run(problem: Problem, path: Path, crew: Crew | None = None, *, whole: bool = True) -> DistilledSet | None:
    """Runs, or goes on with, what is in a folder; a run that is not to be whole is interrupted after one iteration."""
    options: dict[str, Any] = {} if crew is None else {"crew": crew}
    options |= {} if whole else {"observer": interrupt}
    try:
        return run_method(problem, RunFolder(path, {}), cadence=Cadence(checkpoint=1), **options)
    except Interrupted:
        return None
    finally:
        if isinstance(crew, Group):
            crew.end()


def assert_same(one: DistilledSet | None, other: DistilledSet | None) -> None:
    assert one is not None and other is not None
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels) and one.alpha == other.alpha


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_processes_changes_no_bit(size: int, problem_of: Callable[..., Problem], tmp_path: Path) -> None:  # noqa: F811
    problems = {name: problem_of(name, **settings_of(name)) for name in DRAWING}
    twice = [problem for problem in problems.values() for _ in range(2)]
    with together(follow_all, twice, size, size) as group:
        assert isinstance(group, Group) and group.size == size
        for number, (name, problem) in enumerate(problems.items()):
            alone = run(problem, tmp_path / name / "whole")
            assert alone is not None and not torch.equal(alone.images, initial_images(tmp_path / name / "whole")), name
            for place, first in ((2 * number, "shared"), (2 * number + 1, "alone")):
                path = tmp_path / name / first
                assert run(problem, path, within(group, place) if first == "shared" else None, whole=False) is None
                assert_same(run(problem, path, within(group, place) if first == "alone" else None), alone)
                rows, expected = (RunFolder(one, {}).metrics() for one in (path, tmp_path / name / "whole"))
                assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected], name


def initial_images(path: Path) -> torch.Tensor:
    return load_file(path / INITIAL_NAME)["images"]


def test_one_card_takes_all_draws_and_no_process_is_idle(problem_of: Callable[..., Problem]) -> None:  # noqa: F811
    recipe, cpu = problem_of("dm", draws=3).recipe, torch.device("cpu")
    assert [processes(recipe, cpu, workers) for workers in (1, 2, 8)] == [1, 2, 3]
    assert [processes(recipe, torch.device("cuda"), workers) for workers in (8, "auto")] == [1, 1]  # type: ignore[list-item]
