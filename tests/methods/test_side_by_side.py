"""Draws side by side: the same bits as one after another on a CPU, and steps that are really taken together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.recording import Graph, OnTheProcessor, Watched

from dstill.data.catalog import Shape
from dstill.derivatives import cuda_graphs
from dstill.derivatives.cuda_graphs import Recorder
from dstill.methods.base import Problem, State
from dstill.methods.unrolling_method import UnrollingMethod, at_once
from dstill.support.crew import Alone
from dstill.unrolling.student import Student

from .test_drawing import problem_of, source, started  # noqa: F401 - a fixture

MATCHING = {"student_steps": 4, "max_start_epoch": 2, "lr_images": 1.0, "alpha_init": 0.1, "batch_syn": 4}
METHODS: dict[str, dict[str, Any]] = {
    "ast": MATCHING,
    "mtt": {**MATCHING, "soft_labels": "expert-differentiated"},
    "rat-bptt": {"total_steps": 9, "window": 4, "batch_real": 12, "soft_labels": "learned", "batch_syn": 4},
}


def taken(problem: Problem, streams: int, recorder: Recorder, *, native: bool) -> tuple[State, list[dict[str, float]]]:
    """The state and the metrics of three iterations."""
    method, state = started(replace(problem, streams=streams))
    assert isinstance(method, UnrollingMethod)
    method.student = Student(problem.network(), native=native)
    method.student._call = recorder
    if not native:
        written = method.student.derivatives(torch.zeros(1))
        assert written is not None
        written.piece = None  # a card processes a batch in one piece
    return state, [method.step(state, iteration, source(iteration, 0)) for iteration in range(3)]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_draws_side_by_side_change_no_bit(
    name: str,
    native: bool,
    problem_of: Callable[..., Problem],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda_graphs, "CALLS_BEFORE", 2)
    problem = problem_of(name, draws=3, **METHODS[name])
    before, rows = taken(problem, 1, watched := Watched(), native=native)
    assert {size for _, size in watched.groups} == {1}
    for streams in (2, 3):
        # Native units are not recorded, so there the groups are counted alone.
        recorder = Watched() if native else OnTheProcessor()
        after, others = taken(problem, streams, recorder, native=native)
        assert others == rows
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        if isinstance(recorder, Watched):
            together = [function for function, size in recorder.groups if size == streams]
            assert together.count("_written_tangents") == 3 * 4, "all tangents of the first round of each iteration"
            assert sum(size for _, size in recorder.groups) == len(watched.groups)
        else:
            graphs = [one.graph for key, one in recorder.recordings.items() if one is not None and key[1] == streams]
            assert len(graphs) >= 2 and all(isinstance(graph, Graph) and graph.replays > 0 for graph in graphs)


def test_draws_of_a_round_divide_the_memory_with_those_of_other_processes(
    problem_of: Callable[..., Problem],  # noqa: F811
) -> None:
    class Three(Alone):
        size = 3

        def share(self, draws: int) -> range:
            return range(0, draws, 3)

    problem = problem_of("ast", draws=5, **MATCHING)
    for streams in (1, 4):
        method, _ = started(replace(problem, streams=streams))
        assert isinstance(method, UnrollingMethod)
        assert (method.beside, method.sharers) == (streams, streams)
    method.crew = Three()
    assert (method.beside, method.sharers) == (2, 6)
    assert at_once(4, 0) == 1, "a process that has no draw"


@pytest.mark.parametrize("name", ["ast", "rat-bptt"])
@pytest.mark.parametrize("memory", ["keep", "auto", "recompute"])
def test_a_plan_counts_the_students_of_a_round(
    name: str,
    memory: str,
    problem_of: Callable[..., Problem],  # noqa: F811
) -> None:
    problem = problem_of(name, **{**METHODS[name], "memory": memory})
    real, method = problem.real, type(started(problem)[0])
    assert issubclass(method, UnrollingMethod)
    shape = Shape(real.channels, real.size, real.classes, 0, 0)
    one, two, three = (method.peak_bytes(problem.recipe, shape, problem.device, students) for students in (1, 2, 3))
    assert one == method.peak_bytes(problem.recipe, shape, problem.device)
    assert two - one == pytest.approx(one) and three - two == pytest.approx(one)
