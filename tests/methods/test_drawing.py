"""Updates that average draws: the same gradients whoever takes which draw, and one bad draw spoils nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dstill.artifacts.distilled import DistilledSet
from dstill.config.registry import methods
from dstill.config.settings import DistillConfig, NetConfig, Recipe, settings_class
from dstill.data import preprocess as preprocessing
from dstill.data.real import RealSet
from dstill.distillation.loop import make_method
from dstill.errors import CollapseError, DstillError
from dstill.experts.trajectory import Trajectories
from dstill.jobs.checks import check_early
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Choice, Machine
from dstill.methods.base import Metrics, Problem, State, method_class
from dstill.methods.distribution_matching import DistributionMatchingConfig
from dstill.methods.drawing import DrawingMethod, Drawn, Mean, Told, averaged, mean_metrics
from dstill.methods.frepo import FrepoConfig
from dstill.methods.guard import Guard
from dstill.support import seeding
from dstill.support.crew import Alone
from dstill.unrolling.unroll import unroll

# One of each kind, with an update that is SGD without momentum where the method has one.
KINDS: dict[str, dict[str, Any]] = {
    "mtt": {"student_steps": 4, "max_start_epoch": 2, "image_momentum": 0.0, "lr_images": 1.0, "alpha_init": 0.1},
    "bptt": {"total_steps": 3, "batch_real": 12, "alpha_init": 0.05},
    "dm": {"batch_real": 6, "image_momentum": 0.0, "lr_images": 0.1},
    "dsa": {"batch_real": 6, "image_momentum": 0.0, "lr_images": 0.1, "outer_steps": 3, "inner_epochs": 2},
    "cafe": {"batch_real": 6, "batch_query": 4, "window": 2, "max_outer": 3, "max_inner": 2, "settled": 0.01},
    "frepo": {"batch_real": 20, "pool": 4, "max_age": 2, "lr": 0.01},
}
DRAWING = sorted(name for name, info in methods().items() if info.family != "selection")


@pytest.fixture
def problem_of(tiny_real: RealSet, trajectories: Trajectories) -> Callable[..., Problem]:
    def make(name: str, **settings: Any) -> Problem:
        kind = settings_class(name)
        small = {**KINDS.get(name, {}), "iterations": 3, **settings}
        if name == "frepo":
            small["net"] = NetConfig(name="convnet-widening", norm="batch", width=4, depth=2)
        recipe = Recipe(
            data="tiny",
            method=name,
            ipc=2,
            net=NetConfig(width=4, depth=2),
            augmentation="flip",
            distill=kind(**{"initialisation": "noise", **small}),
        )
        preprocess = preprocessing.fit("standardise", tiny_real.train.images)
        return Problem(tiny_real, preprocess, recipe, trajectories, torch.device("cpu"), 5)

    return make


def started(problem: Problem) -> tuple[DrawingMethod, State]:
    method = make_method(problem)
    assert isinstance(method, DrawingMethod)
    return method, method.initialise(seeding.generator(0, "initialise"))


def source(iteration: int, number: int) -> torch.Generator:
    return seeding.generator(5, "step", iteration, *((number,) if number else ()))


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def told(drawn: Drawn, number: int = 0) -> Told:
    return Told.of(number, Told.parcel(drawn), torch.device("cpu"))


def mean(drawn: Sequence[Drawn], some: Sequence[Told]) -> dict[str, Tensor]:
    """The mean gradients of some of these draws, by numbers."""
    chosen = [drawn[one.number].gradients for one in some]
    return {name: torch.stack([gradients[name] for gradients in chosen]).sum(0) / len(chosen) for name in chosen[0]}


def stepped(method: DrawingMethod, state: State, iteration: int = 0) -> dict[str, float]:
    return method.step(state, iteration, source(iteration, 0))


def test_every_method_that_steps_averages_draws() -> None:
    for name in DRAWING:
        assert method_class(name).averages_draws and settings_class(name)(draws=3).draws == 3
    with pytest.raises(ValueError, match=r"draws 5 must not exceed pool 4"):
        FrepoConfig(pool=4, draws=5)


@pytest.mark.parametrize("name", KINDS)
def test_a_draw_depends_on_seed_iteration_and_number_alone(name: str, problem_of: Callable[..., Problem]) -> None:
    def first(draws: int, number: int) -> Drawn:
        method, state = started(problem_of(name, draws=draws))
        return next(method.draw(state, 1, number, source(1, number)))

    for number in (0, 1):
        few, many = first(2, number), first(4 if name != "frepo" else 2, number)
        assert few.metrics == many.metrics
        assert all(torch.equal(few.gradients[key], many.gradients[key]) for key in few.gradients)
    one, other = first(2, 0), first(2, 1)
    assert not torch.equal(one.gradients["images"], other.gradients["images"])


@pytest.mark.parametrize("name", ["mtt", "dm"])
@pytest.mark.parametrize(("scaling", "factor"), [("none", 1.0), ("root", math.sqrt(3)), ("linear", 3.0)])
def test_an_update_follows_the_mean_of_the_draws(
    name: str, scaling: str, factor: float, problem_of: Callable[..., Problem]
) -> None:
    method, state = started(problem_of(name, draws=3, draw_scaling=scaling))
    before = copied(state)
    drawn = [next(method.draw(before, 0, k, source(0, k))) for k in range(3)]
    row = stepped(method, state)
    mean = torch.stack([one.gradients["images"].double() for one in drawn]).mean(0)
    expected = before["images"].double() - KINDS[name]["lr_images"] * factor * mean
    torch.testing.assert_close(state["images"].double(), expected, rtol=1e-5, atol=1e-6)
    assert row["loss"] == pytest.approx(sum(one.metrics["loss"] for one in drawn) / 3)


def test_step_sizes_of_alpha_labels_and_adam_grow_with_the_draws(problem_of: Callable[..., Problem]) -> None:
    def moved(name: str, entry: str, **settings: Any) -> Tensor:
        method, state = started(problem_of(name, draws=4, **settings))
        before = copied(state)
        stepped(method, state)
        return state[entry] - before[entry]

    for name, entry, settings in (
        ("mtt", "alpha", {"lr_alpha": 1e-3}),
        ("mtt", "labels", {"soft_labels": "learned"}),
        ("bptt", "images", {"lr_images": 1e-3}),
        ("bptt", "log_alpha", {"lr_alpha": 1e-3}),
        ("frepo", "images", {"lr": 1e-3}),
        ("dsa", "images", {"outer_steps": 1, "lr_images": 1e-3}),
    ):
        plain, scaled = (moved(name, entry, draw_scaling=scaling, **settings) for scaling in ("none", "root"))
        torch.testing.assert_close(scaled, 2 * plain, rtol=1e-3, atol=2e-6)
    assert DistillConfig().draw_factor == 1.0


@pytest.mark.parametrize("name", KINDS)
def test_draws_with_several_updates_see_each_other(name: str, problem_of: Callable[..., Problem]) -> None:
    """Independent of `step`: all draws go on after each update, until all of them have ended."""
    method, state = started(problem_of(name, draws=2))
    mine, row = copied(state), stepped(method, state)
    own = [method.draw(mine, 0, k, source(0, k)) for k in range(2)]
    ended: list[Drawn] = []
    while own:
        drawn = [next(draw) for draw in own]
        method.update(mine, 0, [told(one, k) for k, one in enumerate(drawn)], lambda some: mean(drawn, some))  # noqa: B023
        ended += [one for one in drawn if one.last]
        own = [draw for draw, one in zip(own, drawn, strict=True) if not one.last]
    assert len(ended) == 2
    assert all(torch.equal(state[key], mine[key]) for key in state)
    assert row["loss"] == pytest.approx(sum(one.metrics["loss"] for one in ended) / 2)


def test_each_draw_of_the_pool_trains_a_network_of_its_own(problem_of: Callable[..., Problem]) -> None:
    method, state = started(problem_of("frepo", draws=3))
    taken: list[set[int]] = [set(), set(), set()]
    for i in range(8):
        before = copied(state)
        stepped(method, state, i)
        changed = {n for n in range(4) if not torch.equal(before["pool.weights"][n], state["pool.weights"][n])}
        assert len(changed) == 3
        for n in changed:
            taken[n % 3].add(n)
    assert taken == [{0, 3}, {1}, {2}]


def drawn(value: float, loss: float = 1.0) -> Told:
    return told(Drawn({"images": torch.full((2,), value), "alpha": torch.tensor(1.0)}, {"loss": loss}))


def test_a_bad_draw_is_left_out_of_the_mean_and_counted() -> None:
    guard, state = Guard(True, 1.0, draws=3), {"skipped": torch.zeros((), dtype=torch.int64), "m": torch.ones(2)}
    for bad in (drawn(math.nan), drawn(1.0, math.nan), drawn(3e30)):
        good = [drawn(1.0), drawn(3.0)]
        assert guard.usable(state, 0, [good[0], bad, good[1]], ["m"]) == good
    assert int(state["skipped"]) == 3 and state["m"].tolist() == [1.0, 1.0]
    assert guard.usable(state, 0, [drawn(math.inf)] * 3, ["m"]) == []
    assert int(state["skipped"]) == 6 and state["m"].tolist() == [0.0, 0.0]
    assert not guard.allows(state, 0, [drawn(1.0)] * 2, [torch.tensor(math.inf)]), "a bad step costs all its draws"
    assert int(state["skipped"]) == 8


@pytest.mark.parametrize(
    ("name", "what"), [("dm", "images"), ("dc", "images"), ("cafe", "images"), ("frepo", "images or labels")]
)
def test_images_that_are_no_longer_finite_are_a_collapse(
    name: str, what: str, problem_of: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, state = started(problem_of(name))
    monkeypatch.setattr(
        DrawingMethod, "_mean", lambda self, taken, drawn: {n: torch.full(s, math.nan) for n, s in drawn[0].shapes.items()}
    )
    with pytest.raises(CollapseError, match=f"the synthetic {what} are no longer finite: lower distill.lr"):
        stepped(method, state)


def test_the_share_of_skipped_draws_is_one_of_all_draws() -> None:
    guard, state = Guard(True, 0.5, draws=4), {"skipped": torch.zeros((), dtype=torch.int64)}
    for i in range(5):
        guard.usable(state, i, [drawn(math.nan)] * 2 + [drawn(1.0)] * 2)  # 10 of 20
    with pytest.raises(CollapseError, match="13 of 24"):
        guard.usable(state, 5, [drawn(math.nan)] * 3 + [drawn(1.0)])


def test_draws_with_a_large_loss_are_passed_over_one_by_one() -> None:
    guard = Guard(True, 0.5, draws=50, skip_above=1.0)
    state = {"skipped": torch.zeros((), dtype=torch.int64), "passed_over": torch.zeros((), dtype=torch.int64)}
    assert len(guard.usable(state, 0, [drawn(1.0, 2.0)] * 49 + [drawn(1.0, 1.0)])) == 1
    assert (int(state["passed_over"]), int(state["skipped"])) == (49, 0)
    guard.usable(state, 1, [drawn(1.0, 2.0)] * 50)  # 99 of 100
    state["passed_over"] = torch.tensor(50)
    with pytest.raises(CollapseError, match="each of the first 100 segments"):
        guard.usable(state, 1, [drawn(1.0, 2.0)] * 50)


@pytest.mark.parametrize("name", ["mtt", "bptt"])
def test_students_leave_memory_to_the_other_processes(
    name: str, problem_of: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Three(Alone):
        size = 3

    method, state = started(problem_of(name))
    method.crew, sharers = Three(), list[int]()
    where = {"mtt": "trajectory_matching", "bptt": "bptt"}[name]
    monkeypatch.setattr(
        f"dstill.methods.{where}.unroll", lambda *given, **more: sharers.append(more["sharers"]) or unroll(*given, **more)
    )
    stepped(method, state)
    assert sharers == [3]


def test_soft_labels_of_several_segments_are_their_mean(problem_of: Callable[..., Problem]) -> None:
    method, state = started(problem_of("mtt", draws=2, soft_labels="expert", gradient="tesla"))
    before = copied(state)
    labels = [next(method.draw(before, 0, k, source(0, k))).kept["labels"] for k in range(2)]
    stepped(method, state)
    torch.testing.assert_close(state["labels"], (labels[0] + labels[1]) / 2)


@pytest.mark.parametrize("name", ["dm", "dsa", "cafe", "frepo"])
def test_every_method_can_return_a_moving_average(name: str, problem_of: Callable[..., Problem]) -> None:
    method, state = started(
        problem_of(name, image_ema=0.75, outer_steps=1) if name == "dsa" else problem_of(name, image_ema=0.75)
    )
    updates = 0
    average = state["images"].clone()
    inner = method.update

    def update(state: State, iteration: int, drawn: list[Told], mean: Mean) -> dict[str, float]:
        nonlocal average, updates
        told = inner(state, iteration, drawn, mean)
        if drawn[0].shapes:
            average, updates = 0.75 * average + 0.25 * state["images"], updates + 1
        return told

    method.update = update  # type: ignore[method-assign, assignment]
    stepped(method, state)
    assert updates >= 1
    torch.testing.assert_close(averaged(state, "images"), average)
    torch.testing.assert_close(method.result(state).images, average)
    assert float((average - state["images"]).abs().max()) > 0
    plain, state = started(problem_of(name))
    stepped(plain, state)
    assert torch.equal(plain.result(state).images, state["images"])


def test_every_process_knows_of_a_draw_what_an_update_needs() -> None:
    one = Drawn({"images": torch.ones(2, 3), "alpha": torch.tensor(1.0)}, {"loss": 2.0}, {"labels": torch.ones(3)}, last=False)
    known = told(one, 4)
    assert (known.number, known.metrics, known.last, known.sound) == (4, {"loss": 2.0}, False, True)
    assert {name: list(shape) for name, shape in known.shapes.items()} == {"images": [2, 3], "alpha": []}
    assert torch.equal(known.kept["labels"], torch.ones(3))
    for bad in (Drawn({"images": torch.tensor([1.0, math.nan])}), Drawn({}, {"loss": math.inf})):
        assert not told(bad).sound
    assert mean_metrics([{"a": 1, "b": 2.0}]) == {"a": 1, "b": 2.0}
    segments: list[Metrics] = [{"loss": 2.0, "start_epoch": 0, "expert": 4}, {"loss": 0.2, "start_epoch": 19, "expert": 1}]
    assert mean_metrics(segments[:1]) == segments[0]
    assert mean_metrics(segments) == {"loss": 1.1}, "no start epoch has both losses"


def test_a_method_without_draws_refuses_them(tiny_real: RealSet) -> None:
    job = Job.resolve(tiny_real, Choice("random", 1), 0, Workplace.of(Machine(device="cpu"), False))
    several = job.with_recipe(job.recipe.model_copy(update={"distill": job.recipe.distill.model_copy(update={"draws": 2})}))
    with pytest.raises(DstillError, match=r"'random' does not average draws: leave distill\.draws at 1"):
        check_early(several)
    check_early(replace(job))


def test_the_method_of_the_page_on_extending_averages_draws(problem_of: Callable[..., Problem]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
    (block,) = (block for block in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "DrawingMethod" in block)
    names: dict[str, Any] = {}
    exec(compile(block, "extending.md", "exec"), names)

    class Whole(names["Mine"]):  # type: ignore[misc]
        Settings = DistributionMatchingConfig

        def initialise(self, generator: torch.Generator) -> State:
            return {"images": torch.zeros(2, 3)}

        def loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
            return (images * torch.randn(2, 3, generator=generator)).sum()

        def result(self, state: State) -> DistilledSet:
            raise NotImplementedError

    method = Whole()
    method.start(problem_of("dm", draws=2))
    state = method.initialise(source(0, 0))
    row = stepped(method, state)
    draws = [torch.randn(2, 3, generator=source(0, k)) for k in (0, 1)]
    assert row == {"loss": 0.0}
    torch.testing.assert_close(state["images"], -0.1 * math.sqrt(2) * (draws[0] + draws[1]) / 2)
