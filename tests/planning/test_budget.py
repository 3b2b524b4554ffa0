"""What a budget buys follows from the shape of the data, the speed of the machine and the minutes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.steady import Steady

import dstill
from dstill.api.budgeted import leaves_choice, with_method
from dstill.data.catalog import Shape
from dstill.data.real import RealSet
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Budget, Choice, Evaluation, Recording
from dstill.planning import budget as budgets
from dstill.planning.budget import Offer, best_offer, described, offered
from dstill.planning.plan import plan_job

CIFAR = Shape(3, (32, 32), 10, 50_000, 10_000)


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace.of(dstill.Machine(device="cpu", cache=tmp_path), False)


def job_of(real: RealSet, place: Workplace, shape: Shape = CIFAR, **choice: Any) -> Job:
    """A job on the tiny images that claims another shape, since a choice depends on nothing else."""
    choice = {"method": choice.pop("method", None) or budgets.method_for(shape), **choice} if "recipe" not in choice else choice
    job = Job.resolve(real, Choice(**choice), 0, place)
    return replace(job, shape=shape)


def whole(offer: Offer) -> float:
    return sum(stage.seconds for stage in offer.stages)


@given(
    second=st.floats(1e-6, 1e-2),
    minutes=st.floats(2, 600),
    method=st.sampled_from([None, "rat-bptt", "ast", "dm", "mtt", "kmeans", "frepo"]),
    ipc=st.sampled_from([1, 10]),
)
def test_what_is_offered_fits_and_fills_the_time(
    tiny_real: RealSet, tmp_path_factory: pytest.TempPathFactory, second: float, minutes: float, method: str | None, ipc: int
) -> None:
    place = Workplace.of(dstill.Machine(device="cpu", cache=tmp_path_factory.getbasetemp()), False)
    job, clock = job_of(tiny_real, place, method=method, ipc=ipc), Steady(CIFAR, second)
    try:
        offer = offered(job, Task(rivals=method is None), 60 * minutes, clock)
    except dstill.DstillError as error:
        assert "are not enough" in str(error)
        return
    assert whole(offer) == pytest.approx(60 * minutes - offer.spare)
    assert offer.spare >= 0
    iterations = offer.recipe.distill.iterations
    if 0 < iterations < offer.most:  # then another one would not fit
        (distilling,) = [stage.seconds for stage in offer.stages if stage.name == "distilling"]
        assert offer.spare < 1.001 * distilling / iterations
    assert offer.rivals.seconds <= (0.14 if len(offer.rivals.methods) > 1 else 0.25) * 60 * minutes
    assert all(one.seconds <= 0.45 * 60 * minutes for one in offer.stages if one.name == "experts") or (
        offer.recipe.experts is not None and offer.recipe.experts.count == 1
    )


@pytest.mark.parametrize("method", ["rat-bptt", "mtt", "dm"])
def test_more_time_buys_no_less(tiny_real: RealSet, place: Workplace, method: str) -> None:
    job, clock = job_of(tiny_real, place, method=method), Steady(CIFAR, 1e-3)
    offers = [offered(job, Task(), 60.0 * minutes, clock) for minutes in (5, 20, 80, 320, 1280, 10_000)]
    widths = [offer.recipe.net.width or 0 for offer in offers]
    assert widths == sorted(widths)
    assert widths[0] < 128
    assert widths[-1] == 128
    for one, other in itertools.pairwise(offers):
        same = one.recipe.net == other.recipe.net and one.recipe.distill.work == other.recipe.distill.work
        assert not same or one.iterations <= other.iterations
    assert len({offer.recipe.distill.iterations for offer in offers}) > 1


def test_the_quicker_forms_of_a_method_are_taken_in_turn(tiny_real: RealSet, place: Workplace) -> None:
    job, clock = job_of(tiny_real, place, recipe="cifar10/rat-bptt-ipc10"), Steady(CIFAR, 2e-3)
    offers = [offered(job, Task(), 60.0 * minutes, clock) for minutes in (0.5, 3, 1000, 100_000)]
    steps = [one.recipe.distill.total_steps for one in offers]  # type: ignore[attr-defined]
    assert steps == sorted(steps)
    assert steps[0] < 40
    assert steps[1] == 40
    assert 60 <= offers[1].iterations < 2000, "few, but enough not to shorten the trainings further"
    assert steps[-1] == 200


def test_experts_are_as_many_as_fit(tiny_real: RealSet, place: Workplace) -> None:
    job = job_of(tiny_real, place, method="mtt")
    counts = []
    for minutes in (20, 80, 400, 10_000):
        experts = offered(job, Task(), 60.0 * minutes, Steady(CIFAR, 1e-3)).recipe.experts
        assert experts is not None
        counts.append(experts.count)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] == 100


def test_what_the_user_has_set_stays(tiny_real: RealSet, place: Workplace) -> None:
    changes = ["net.width=48", "experts.count=3", "distill.iterations=7", "protocol=mtt", "distill.max_start_epoch=4"]
    job = job_of(tiny_real, place, method="mtt", changes=changes)
    offer = offered(job, Task(evaluation=Evaluation(networks=4)), 3600, Steady(CIFAR, 2e-4))
    recipe = offer.recipe
    assert (recipe.net.width, recipe.distill.iterations, recipe.protocol, offer.networks) == (48, 7, "mtt", 4)
    assert recipe.experts is not None
    assert recipe.experts.count == 3
    assert recipe.expert_config.epochs == 5


def test_a_width_that_the_user_has_set_stays_however_little_time_there_is(tiny_real: RealSet, place: Workplace) -> None:
    job = job_of(tiny_real, place, changes=["net.width=96"])
    assert offered(job, Task(), 600, Steady(CIFAR, 2e-3)).recipe.net.width == 96


def test_a_network_is_never_widened(tiny_real: RealSet, place: Workplace) -> None:
    recipe = dstill.load_recipe("cifar10/rat-bptt-ipc10")
    narrow = recipe.model_copy(update={"net": recipe.net.model_copy(update={"width": 16})})
    for minutes in (1, 10_000):
        assert (
            offered(job_of(tiny_real, place, recipe=narrow), Task(), 60.0 * minutes, Steady(CIFAR, 2e-3)).recipe.net.width == 16
        )


def test_a_recipe_of_few_iterations_is_kept_whole_if_all_of_them_fit(tiny_real: RealSet, place: Workplace) -> None:
    job = job_of(tiny_real, place, changes=["distill.iterations=50"])
    recipe = offered(job, Task(), 36_000, Steady(CIFAR, 1e-4)).recipe
    assert (recipe.net.width, recipe.distill.iterations) == (128, 50)


def test_iterations_that_do_not_fit_are_refused(tiny_real: RealSet, place: Workplace) -> None:
    job = job_of(tiny_real, place, method="dm", changes=["distill.iterations=10000000"])
    with pytest.raises(dstill.DstillError, match=r"10 min are not enough, \d+ \w+ would be: allow more"):
        offered(job, Task(), 600, Steady(CIFAR, 2e-4))


def test_the_evaluation_is_as_thorough_as_fits(tiny_real: RealSet, place: Workplace) -> None:
    job, clock = job_of(tiny_real, place), Steady(CIFAR, 2e-3)
    offers = [offered(job, Task(), 60.0 * minutes, clock) for minutes in (0.1, 0.5, 8, 60)]
    assert [(one.recipe.protocol, one.networks, one.random) for one in (offers[0], offers[-1])] == [
        ("quick", 1, False),
        ("rat", 5, True),
    ]
    assert [one.networks for one in offers] == sorted(one.networks for one in offers)
    assert not offered(job, Task(evaluation=Evaluation(random=False)), 3600, clock).random, "the user wants none"


def test_rivals_are_the_better_the_more_time_there_is(tiny_real: RealSet, place: Workplace) -> None:
    small = Shape(3, (32, 32), 10, 1000, 1000)
    job, clock = job_of(tiny_real, place, small), Steady(small, 2e-3)
    rivals = [offered(job, Task(rivals=True), 60.0 * minutes, clock).rivals for minutes in (0.03, 0.06, 0.15, 0.3, 600)]
    assert [one.methods for one in rivals] == [(), ("random",), ("kmeans",), *[("random", "herding", "kmeans")] * 2]
    assert (rivals[-1].epochs, rivals[-1].networks) == (10, 2)
    assert offered(job, Task(), 36_000, clock).rivals.methods == ()
    stages = [stage.name for stage in offered(job, Task(rivals=True), 36_000, clock).stages]
    assert stages == ["distilling", "coresets", "evaluation", "random images"], "in the order of the work"


def test_a_method_is_chosen_only_if_none_is_named(tiny_real: RealSet, place: Workplace) -> None:
    budget = Budget.of(5)
    assert leaves_choice(Choice(), budget)
    assert not leaves_choice(Choice(), None)
    assert not leaves_choice(Choice("dm"), budget)
    assert not leaves_choice(Choice(recipe="smoke"), budget)
    assert with_method(Choice(), tiny_real, place)[0].method == "dm", "images of 8 pixels"
    assert with_method(Choice(), "digits", place)[1].name == "digits"
    changes = with_method(Choice(changes={"preprocess": "zca"}), tiny_real, place)[0].changes
    assert list(changes)[-1] == 'preprocess="zca"', "the user's is last"


@pytest.mark.parametrize(
    ("ipc", "minutes", "chooses", "changes", "method"),
    [
        (10, 5, True, (), "dm"),
        (10, 5, False, (), "rat-bptt"),
        (10, 5, True, ("distill.lr_images=0.01",), "rat-bptt"),
        (10, 200, True, (), "rat-bptt"),
        (1, 5, True, (), "rat-bptt"),
    ],
)
def test_many_images_in_little_time_are_left_to_the_quickest_method(
    tiny_real: RealSet, place: Workplace, ipc: int, minutes: float, chooses: bool, changes: tuple[str, ...], method: str
) -> None:
    job = job_of(tiny_real, place, ipc=ipc, changes=["preprocess=standardise", *changes])
    offer = best_offer(job, Task(chooses=chooses), 60 * minutes, Steady(CIFAR, 4e-3))
    assert offer.recipe.method == method
    assert offer.recipe.preprocess == "standardise", "what is set is set for both"
    assert offer.recipe.ipc == ipc


def test_the_lines_say_what_was_chosen_and_what_more_would_buy(tiny_real: RealSet, place: Workplace) -> None:
    job, clock = job_of(tiny_real, place), Steady(CIFAR, 2e-3)
    offer, longer = (offered(job, Task(rivals=True), 60.0 * minutes, clock) for minutes in (10, 30))
    lines = described(offer, "photos", CIFAR, 10, longer, 30)
    assert len(lines) == 5
    assert lines[0].startswith("in 10 min, photos at 1 image(s) per class: rat-bptt, convnet of width 32, ")
    assert f"{offer.iterations:,} iterations" in lines[0]
    assert "distilling" in lines[1]
    assert "coresets" in lines[1]
    assert f"{offer.networks} networks by protocol {offer.recipe.protocol}" in lines[2]
    assert "competes with random, herding, kmeans" in lines[2]
    assert lines[3].startswith("30 min would buy rat-bptt")
    assert f"{longer.iterations:,} iterations" in lines[3]
    assert lines[4].startswith("so far measured: cifar10 at IPC 1, on one core: ")
    alone = offered(job, Task(), 600.0, clock, "distilling")
    assert not any("measured with" in line for line in described(alone, "photos", CIFAR, 10, None, 30)), (
        "distil measures nothing"
    )


def test_looks_at_the_validation_part_are_as_many_as_iterations_allow(tiny_real: RealSet, place: Workplace) -> None:
    job, clock = job_of(tiny_real, place, method="dm"), Steady(CIFAR, 2e-3)
    offers = [offered(job, Task(recording=Recording(validate_every=every)), 600.0, clock) for every in (0, 20)]
    assert offers[0].iterations > offers[1].iterations > 20, "each look takes from the time of the iterations"
    for offer, every in zip(offers, (0, 20), strict=True):
        assert whole(offer) == pytest.approx(600.0 - offer.spare) and 0 <= offer.spare < 10
        looking = Task(recording=Recording(validate_every=every))
        planned = {stage.name: stage.seconds for stage in plan_job(job.with_recipe(offer.recipe), looking, clock).stages}
        chosen = {stage.name: stage.seconds for stage in offer.stages}
        assert chosen["distilling"] == pytest.approx(planned["distilling"])
        looked = [some.get("validation", 0.0) for some in (chosen, planned)]
        assert looked[0] == pytest.approx(looked[1], rel=20 / offer.iterations), "they may differ by one look"


def test_given_experts_keep_their_network_and_take_no_time(tiny_real: RealSet, place: Workplace, tmp_path: Path) -> None:
    few = {"changes": ["net.width=4", "experts.count=2"], "machine": dstill.Machine(cache=tmp_path)}
    trajectories = dstill.train_experts(tiny_real, method="mtt", recipe="smoke", **few)
    job, clock = job_of(tiny_real, place, method="mtt"), Steady(CIFAR, 1e-2)
    own, given = (offered(job, Task(experts=experts), 600.0, clock, "distilling") for experts in (None, trajectories))
    assert own.recipe.net.width == 32 and given.recipe.net.width == job.recipe.net.width == 128
    assert "experts" in [stage.name for stage in own.stages] and [stage.name for stage in given.stages] == ["distilling"]
    assert given.recipe.expert_config.count == len(trajectories)


@pytest.mark.parametrize("minutes", [0, -1, float("inf"), float("nan")])
def test_a_budget_is_a_number_of_minutes(minutes: float) -> None:
    with pytest.raises(dstill.DstillError, match="minutes must be above 0"):
        Budget.of(minutes)
