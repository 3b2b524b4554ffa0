"""What a budget buys: the settings of a run that ends in time.

The choice follows from the shape of the data, the speed of the machine and the minutes, and from nothing else. Settings are
tried from the fullest to the quickest: narrower networks, and for each width the recipe's own form and the method's next
quicker one. The first that leave time for a worthwhile number of iterations are taken, and iterations fill what is left. If
none do, the narrowest network is taken, in the first form that leaves time for the fewest iterations that make sense. Of the
whole time, at most a quarter goes to the evaluation, and at most a seventh to coresets as rivals: a quarter if a single one
takes as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dstill.config.measured import reached_nearby
from dstill.config.recipes import changed
from dstill.config.settings import Passes, Recipe, TrainingConfig
from dstill.data.catalog import Shape
from dstill.errors import DstillError
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.job import Job, Task
from dstill.planning.announce import rough
from dstill.planning.clock import Clock
from dstill.planning.evaluating import Measured, evaluation_stages, network_seconds, networks_seconds
from dstill.planning.plan import plan_job
from dstill.planning.stages import Stage
from dstill.support.workers import most_workers

PREPROCESS = "standardise"
"""Preprocessing of a run for which no method is named. ZCA gains two points on CIFAR-10, and its file has 38 MB."""
RIVALS = ("random", "herding", "kmeans")
"""The coresets that a set is compared with on the validation part, unless its method was named."""

BY_ITERATION = ("distilling", "validation")
"""The stages whose time grows with the number of iterations. They alternate."""

_QUICKEST = "dm"
_SMALL = 16  # pixels, below which it leads
_MANY, _ENOUGH = 5, 200  # images per class from which on it leads, if the other method can take fewer iterations than these
_WIDTHS = (64, 32)  # narrower networks that are tried; wider ones than the recipe's are not
_EXPERTS = (50, 20, 10, 5, 3, 2, 1)  # numbers of experts that are tried
_FOR_EXPERTS, _FOR_EVALUATION, _FOR_RIVALS = 0.45, 0.25, 0.14  # most of the budget that each may take
_FOR_ONE_RIVAL = 0.25  # the same for the quickest comparison, so that hardly any set is handed out unchecked
_QUICK = "quick"  # protocol of short budgets, and of the comparison with rivals

Until = Literal["distilling", "evaluation"]


class Rivals(BaseModel):
    """The coresets that a set is compared with.

    Attributes:
        methods: how they are chosen; empty for no comparison.
        epochs: of the network whose features choose them.
        networks: fresh networks that measure each set on the validation part.
        seconds: what all of this takes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = ()
    epochs: int = 1
    networks: int = 1
    seconds: float = 0.0

    @property
    def stages(self) -> list[Stage]:
        """What the comparison takes, as a stage; none if there is no comparison."""
        note = f"{', '.join(self.methods)}: compared on the validation part"
        named = Stage(name="coresets", seconds=self.seconds, peak_bytes=0, disk_bytes=0, note=note)
        return [named] if self.methods else []


class Offer(BaseModel):
    """What a budget buys.

    Attributes:
        recipe: the settings, with as many iterations as fit.
        networks: fresh networks of the evaluation.
        random: whether random images are measured on the test set too.
        rivals: the coresets that the set is compared with.
        stages: what each part is expected to take.
        most: iterations of the recipe; more are never chosen.
        spare: seconds that are left; below 0 if the offer does not fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    networks: int
    random: bool
    rivals: Rivals
    stages: tuple[Stage, ...]
    most: int
    spare: float

    @property
    def iterations(self) -> int:
        return self.recipe.distill.iterations


def method_for(shape: Shape) -> str:
    """The method to begin with if none is named: the one that leads in `results/budget` on data of this kind.

    Example:
        >>> method_for(Shape(3, (32, 32), 10, 50_000, 10_000)), method_for(Shape(1, (8, 8), 10, 1437, 360))
        ('rat-bptt', 'dm')
    """
    return "rat-bptt" if shape.side >= _SMALL else _QUICKEST


def best_offer(job: Job, task: Task, seconds: float, clock: Clock, until: Until = "evaluation") -> Offer:
    """`offered`; or the offer of the quickest method, if there is a choice and the first one can take few iterations only.

    With one image of each class, a few iterations by the first are still better. Settings that the user has made for a method
    leave no choice.
    """
    offer = offered(job, task, seconds, clock, until)
    free = task.chooses and not any(change.startswith("distill.") for change in job.changes)
    if free and job.recipe.decoded_ipc >= _MANY and offer.iterations < min(_ENOUGH, offer.most):
        return offered(job.by(_QUICKEST), task, seconds, clock, until)
    return offer


def offered(job: Job, task: Task, seconds: float, clock: Clock, until: Until = "evaluation") -> Offer:
    """The fullest settings that leave time for a worthwhile number of iterations; else the quickest.

    Args:
        job: the job, with the recipe to start from. What the user has set in it stays.
        task: how many sets, how they are measured, and whether coresets compete.
        seconds: time from now to the end of the command.
        clock: how long a batch takes.
        until: whether the sets are measured.

    Raises:
        DstillError: not even one iteration fits.
    """
    for recipe, wanted in _ladder(job.recipe, widths=() if task.experts is not None else _WIDTHS):
        offer = _priced(job.with_recipe(_kept(job, recipe)), task, seconds, clock, until)
        if offer.spare >= 0 and offer.iterations >= min(wanted, offer.most):
            return offer
    if offer.spare < 0:
        raise DstillError(
            f"{rough(seconds)} are not enough, {rough(2 * (seconds - offer.spare))} would be: allow more, or make the task "
            "smaller, with --image-size, --networks 1 or --set net.width=16"
        )
    return offer


def _kept(job: Job, recipe: Recipe) -> Recipe:
    """The recipe with what the user has set."""
    return changed(recipe, job.changes, "--set")


def _ladder(recipe: Recipe, widths: Sequence[int]) -> Iterator[tuple[Recipe, int]]:
    """Settings from the fullest to the quickest, and the number of iterations from which on they are taken."""
    own, form, ipc = recipe.net.width, recipe.distill, recipe.decoded_ipc
    quicker = form.quicker(ipc)
    for width in [own, *[one for one in widths if own is not None and one < own]]:
        narrow = recipe.model_copy(update={"net": recipe.net.model_copy(update={"width": width})})
        yield narrow, form.worthwhile
        if quicker is not None:
            yield narrow.model_copy(update={"distill": quicker}), form.worthwhile
    while quicker is not None:
        yield narrow.model_copy(update={"distill": quicker}), form.fewest
        quicker = quicker.quicker(ipc)


def _priced(job: Job, task: Task, seconds: float, clock: Clock, until: Until) -> Offer:
    """The offer of these settings: what stands beside the distillation is chosen first, and iterations fill the rest."""
    job = _with_experts(job, task, _FOR_EXPERTS * seconds, clock)
    if until == "evaluation":
        job, task = _evaluated(job, task, _FOR_EVALUATION * seconds, clock)
    rivals = _rivals(job, seconds, clock) if task.rivals else Rivals()
    stages = list(plan_job(job, task, clock, until).stages)
    first = next((i for i, stage in enumerate(stages) if stage.name == "evaluation"), len(stages))
    stages[first:first] = rivals.stages
    most, left = job.recipe.distill.iterations, seconds - sum(stage.seconds for stage in stages)
    if most:
        job = with_iterations(job, math.floor(_fitting(most, stages, left)))
        iterations = job.recipe.distill.iterations
        share = iterations / most
        left += sum((1 - share) * stage.seconds for stage in stages if stage.name in BY_ITERATION)
        stages = [_scaled(one, share, iterations) if one.name in BY_ITERATION else one for one in stages]
    return Offer(
        recipe=job.recipe,
        networks=task.evaluation.networks or load_protocol(job.recipe.protocol).networks,
        random=task.evaluation.random,
        rivals=rivals,
        stages=tuple(stages),
        most=most,
        spare=left,
    )


def _fitting(most: int, stages: Sequence[Stage], left: float) -> float:
    """Iterations that fit if the stages, with `most` of them, leave so many seconds."""
    distilling = sum(stage.seconds for stage in stages if stage.name in BY_ITERATION)
    return min(most, max(1, most * (1 + left / distilling))) if distilling else most


def with_iterations(job: Job, iterations: int) -> Job:
    """The job with another number of iterations, unless the user has set it."""
    distill = job.recipe.distill.model_copy(update={"iterations": iterations})
    return job.with_recipe(_kept(job, job.recipe.model_copy(update={"distill": distill})))


def _scaled(stage: Stage, share: float, iterations: int) -> Stage:
    return stage.model_copy(update={"seconds": share * stage.seconds, "note": f"{iterations} iterations"})


def _with_experts(job: Job, task: Task, most: float, clock: Clock) -> Job:
    """As many experts as may be trained in this time, at least one; or as many as are given."""
    if not job.method.needs_experts:
        return job
    config = job.recipe.experts or job.recipe.expert_config
    fewer = [config.count, *[one for one in _EXPERTS if one < config.count]]
    for count in fewer if task.experts is None else [len(task.experts)]:
        experts = config.model_copy(update={"count": count})
        job = job.with_recipe(_kept(job, job.recipe.model_copy(update={"experts": experts})))
        if plan_job(job, task, clock, "experts").seconds <= most:
            break
    return job


def _evaluated(job: Job, task: Task, most: float, clock: Clock) -> tuple[Job, Task]:
    """The most thorough evaluation that may be made in this time, or else the quickest."""
    asked, own = task.evaluation, job.recipe.protocol
    counts = [asked.networks] if asked.networks else [None, 3, 2]
    choices = [(own, count, random) for count in counts for random in ([True, False] if asked.random else [False])]
    choices += [(_QUICK, count, False) for count in ([asked.networks] if asked.networks else [2, 1])]
    processes = most_workers(job.place.workers, job.place.device)
    for protocol, count, random in choices:
        job = job.with_recipe(_kept(job, job.recipe.model_copy(update={"protocol": protocol})))
        recipe, evaluation = job.recipe, replace(asked, networks=count, random=random)
        measured = Measured(recipe.net, recipe.augmentation, recipe.ipc, recipe.decoded_ipc, task.sets)
        stages = evaluation_stages(measured, load_protocol(recipe.protocol), evaluation, clock, processes)
        if sum(stage.seconds for stage in stages) <= most:
            break
    return job, replace(task, evaluation=evaluation)


def _rivals(job: Job, seconds: float, clock: Clock) -> Rivals:
    """The best coresets that may be made and compared in their share of the time; else a single one in a larger share."""
    some: list[tuple[tuple[str, ...], int, int]] = [(RIVALS, epochs, networks) for networks in (2, 1) for epochs in (10, 3, 1)]
    some += [(("kmeans",), epochs, networks) for networks in (2, 1) for epochs in (3, 1)]
    one: list[tuple[tuple[str, ...], int, int]] = [(("kmeans",), 1, 1), (("random",), 0, 1)]
    for choices, share in ((some, _FOR_RIVALS), (one, _FOR_ONE_RIVAL)):
        for methods, epochs, networks in choices:
            takes = _rivals_seconds(job, len(methods), epochs, networks, clock)
            if takes <= share * seconds:
                return Rivals(methods=methods, epochs=epochs, networks=networks, seconds=takes)
    return Rivals()


def _rivals_seconds(job: Job, methods: int, epochs: int, networks: int, clock: Clock) -> float:
    recipe, train = job.recipe, clock.shape.train
    training = network_seconds(recipe.net, TrainingConfig(epochs=epochs), clock)
    describing = 2 * clock.passes(recipe.net, Passes("forward", 1, train)) if epochs else 0.0
    number, aside = (methods + 1) * networks, max(1, train // 10)
    processes, quick = most_workers(job.place.workers, job.place.device), load_protocol(_QUICK)
    comparing = networks_seconds(recipe.net, number, recipe.decoded_ipc, recipe.augmentation, quick, aside, clock, processes)
    return training + describing + comparing


def described(offer: Offer, name: str, shape: Shape, minutes: float, more: Offer | None, longer: float) -> list[str]:
    """What a budget buys, in a few lines.

    Args:
        offer: the offer.
        name: what the data are called.
        shape: their shape.
        minutes: the budget.
        more: the offer of a longer budget, if there is one.
        longer: the longer budget in minutes.
    """
    recipe = offer.recipe
    lines = [f"in {rough(60 * minutes)}, {name} at {recipe.ipc} image(s) per class: {_choice(offer)}"]
    lines.append(f"of this, {', '.join(f'{one.name} {rough(one.seconds)}' for one in offer.stages if one.seconds)}")
    if any(stage.name == "evaluation" for stage in offer.stages):
        measured = f"the set is measured with {offer.networks} networks by protocol {recipe.protocol}"
        measured += ", beside random images" if offer.random else ""
        if offer.rivals.methods:
            rivals = ", ".join(offer.rivals.methods)
            measured += f"; first it competes with {rivals} on images set aside, and the best is handed out"
        lines.append(measured)
    if more is not None:
        lines.append(f"{rough(60 * longer)} would buy {_choice(more)}")
    known = reached_nearby(shape.side, shape.classes, recipe.ipc)
    told = ", ".join(f"{one.accuracy:.0f} % in {rough(60 * one.minutes)}" for one in known)
    lines.append(
        f"so far measured: {known[0].data} at IPC {known[0].ipc}, on one core: {told}; coresets {known[-1].coreset:.0f} %"
    )
    return lines


def _choice(offer: Offer) -> str:
    recipe, parts = offer.recipe, [offer.recipe.method]
    parts += [f"{recipe.net.name} of width {recipe.net.width}" if recipe.net.width else recipe.net.name]
    if recipe.experts is not None:
        parts += [f"{recipe.experts.count} expert(s) of {recipe.expert_config.epochs} epochs"]
    of_draws = f" of {recipe.distill.draws} draws" if recipe.distill.draws > 1 else ""
    parts += [f"{recipe.distill.iterations:,} iterations{of_draws}"] if recipe.distill.iterations else []
    return ", ".join(parts)
