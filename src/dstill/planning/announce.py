"""What a command says before its work begins: what it is about to do, and roughly how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import Protocol, TrainingConfig
from dstill.data.real import RealSet
from dstill.jobs.job import Job, Task, Workplace, shape_of
from dstill.jobs.options import Evaluation
from dstill.nets.networks import evaluation_nets
from dstill.planning.clock import QUICK, Clock
from dstill.planning.evaluating import Measured, evaluation_stages, network_seconds
from dstill.planning.plan import plan_job
from dstill.planning.stages import Stage
from dstill.support.progress import Reporter, Silent, expect
from dstill.support.workers import most_workers

_WORTH_NAMING = 0.01  # share of the whole time
_LONG = 30 * 60.0  # seconds, above which a budget is offered


def announce(
    job: Job, task: Task, until: Literal["experts", "distilling", "evaluation"] = "evaluation", done: float = 0.0
) -> None:
    """Says how long a run, or its stages up to one of them, will take, and tells those who show progress what to expect.

    Times come from a calibration of a few seconds. Nothing is measured if nobody is told.

    Args:
        job: the job.
        task: what is done with it.
        until: the last stage.
        done: share of the distillation that an earlier call has done.
    """
    if type(job.place.reporter) is Silent:
        return
    stages = [
        one.model_copy(update={"seconds": (1 - done) * one.seconds}) if one.name in ("distilling", "validation") else one
        for one in plan_job(job, task, Clock(job.shape, job.place.device, QUICK), until).stages
    ]
    _say(job.place.reporter, stages)
    if until != "experts" and sum(stage.seconds for stage in stages) > _LONG:
        job.place.reporter.note("--minutes 10 (minutes=10 in Python) chooses settings that end in ten minutes")


def announce_evaluation(
    first: DistilledSet,
    sets: int,
    real: RealSet,
    protocol: Protocol,
    evaluation: Evaluation,
    place: Workplace,
    rounds: int = 1,
    looks: int = 0,
) -> None:
    """Says how long an evaluation will take.

    Args:
        first: one of the sets.
        sets: their number.
        real: the real data.
        protocol: how networks are trained.
        evaluation: what is measured beside the sets.
        place: where the work is done.
        rounds: how often all of this is done.
        looks: networks that are trained each time to be measured on a validation part.
    """
    if type(place.reporter) is Silent:
        return
    measured = Measured(first.net, first.augmentation, first.ipc, first.ipc * first.parts**2, sets)
    processes = most_workers(place.workers, place.device)
    clock = Clock(shape_of(real), place.device, QUICK)
    stages = evaluation_stages(measured, protocol, evaluation, clock, processes)
    if looks:
        beside = Evaluation(nets=evaluation.nets[:1], networks=looks, random=False)
        (validation,) = evaluation_stages(measured, protocol, beside, clock, processes)
        stages.append(validation.model_copy(update={"name": "validation"}))
    _say(place.reporter, [one.model_copy(update={"seconds": rounds * one.seconds, "times": rounds}) for one in stages])


def announce_scores(
    like: DistilledSet,
    real: RealSet,
    protocol: Protocol,
    evaluation: Evaluation,
    place: Workplace,
    *,
    ways: int,
    augmentations: int,
    labelling: TrainingConfig | None,
) -> None:
    """Says how long it will take to score a set.

    Args:
        like: the set.
        real: the real data.
        protocol: how networks are trained.
        evaluation: the network, and how many.
        place: where the work is done.
        ways: of training on the set that are measured.
        augmentations: with each of which random images are measured.
        labelling: how the network is trained that labels random images; None if there is none.
    """
    if type(place.reporter) is Silent:
        return
    measured = Measured(like.net, like.augmentation, like.ipc, like.ipc * like.parts**2)
    processes, clock = most_workers(place.workers, place.device), Clock(shape_of(real), place.device, QUICK)
    rounds = {"evaluation": ways, "random images": augmentations, "whole set": 1}
    stages = [
        one.model_copy(update={"seconds": rounds[one.name] * one.seconds, "times": rounds[one.name]})
        for one in evaluation_stages(measured, protocol, replace(evaluation, random=True, whole=True), clock, processes)
    ]
    if labelling is not None:
        seconds = network_seconds(evaluation_nets(like.net, evaluation.nets)[0], labelling, clock)
        training = Stage(name="trained network", told="network epochs", seconds=seconds, peak_bytes=0, disk_bytes=0)
        evaluated, random, whole = stages
        stages = [training, evaluated, whole, random]  # random images come last if they are labelled
    _say(place.reporter, stages)


def _say(reporter: Reporter, stages: Sequence[Stage]) -> None:
    expect(reporter, [stage.expectation for stage in stages])
    if stages:
        reporter.note(sentence(stages))


def sentence(stages: Sequence[Stage]) -> str:
    """How long the stages of a plan take, in one line.

    Example:
        >>> sizes = {"peak_bytes": 0, "disk_bytes": 0}
        >>> stages = Stage(name="experts", seconds=600, **sizes), Stage(name="distilling", seconds=1200, **sizes)
        >>> sentence(stages)
        'this takes about 30 min: experts 10 min, distilling 20 min'
    """
    whole = sum(stage.seconds for stage in stages)
    parts = [f"{one.name} {rough(one.seconds)}" for one in stages if one.seconds > _WORTH_NAMING * whole]
    return f"this takes about {rough(whole)}" + (f": {', '.join(parts)}" if len(parts) > 1 else "")


def rough(seconds: float) -> str:
    """A duration with as many digits as an estimate has.

    Example:
        >>> rough(0.2), rough(42), rough(64), rough(754), rough(7260), rough(400_000)
        ('1 s', '40 s', '1 min', '13 min', '2 h', '5 days')
    """
    for unit, size, step in (("s", 1, 5 if seconds > 10 else 1), ("min", 60, 1), ("h", 3600, 1)):
        count = max(1, step * round(seconds / size / step))
        if count < {"s": 60, "min": 100, "h": 48}[unit]:
            return f"{count} {unit}"
    return f"{round(seconds / 86400)} days"
