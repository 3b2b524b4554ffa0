"""The outer loop of all methods: step, log, validate and checkpoint if due."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.record import INITIAL_NAME
from dstill.artifacts.run_folder import RunFolder
from dstill.errors import CollapseError
from dstill.evaluation.networks import evaluate_set, prepared
from dstill.evaluation.protocols import load_protocol
from dstill.methods.base import Method, Metrics, Problem, method_class
from dstill.support import seeding
from dstill.support.crew import ALONE, Crew, Group, Parcel
from dstill.support.stopping import between_steps

_LONGEST_SECONDS = 60.0
_CHEAP_SECONDS = 0.5
_LARGEST_SHARE = 20.0  # least seconds of work per second of storing
_CHECK_EVERY = 100  # iterations
_RUNAWAY = 1e4  # standard deviations of real pixels; images of every method end below a hundred


@dataclass(frozen=True)
class Cadence:
    """How often things happen, in iterations; 0 for never.

    Attributes:
        checkpoint: store the state. If iterations are slow, it is also stored once a minute has passed; if storing is slow
            (half a second or more), less often, so that it takes at most a twentieth of the time.
        validate: train a network on the set so far, under the protocol `quick`, and measure it on the validation part.
        picture: pass the set so far to the painter, also after the last iteration.
        keep: pass the set so far to the keeper; after the last iteration only if it is due.
        until: after this moment, by `time.perf_counter`, no iteration begins, and the set so far is the result.
    """

    checkpoint: int = 25
    validate: int = 0
    picture: int = 0
    keep: int = 0
    until: float = math.inf


class _Due:
    """Decides whether the state should be stored now, see `Cadence`."""

    def __init__(self, every: int) -> None:
        self.every, self.cost, self.last = every, 0.0, time.perf_counter()

    def __call__(self, done: int) -> bool:
        since = time.perf_counter() - self.last
        wanted = self.every > 0 and (done % self.every == 0 or since > _LONGEST_SECONDS)
        return wanted and since >= _LARGEST_SHARE * self.cost

    def stored(self, seconds: float) -> None:
        """Records that the state has just been stored, and how long that took."""
        self.cost, self.last = seconds if seconds > _CHEAP_SECONDS else 0.0, time.perf_counter()


def make_method(problem: Problem, crew: Crew = ALONE) -> Method:
    """The recipe's method, started on the problem."""
    method = method_class(problem.recipe.method)()
    method.crew = crew
    method.start(problem)
    return method


def run_method(
    problem: Problem,
    folder: RunFolder | None = None,
    *,
    cadence: Cadence = Cadence(),
    observer: Callable[[int, int, Metrics], None] | None = None,
    painter: Callable[[int, DistilledSet], None] | None = None,
    keeper: Callable[[int, DistilledSet], None] | None = None,
    crew: Crew = ALONE,
) -> DistilledSet:
    """Runs a method and returns the distilled set. Resumes from the folder's checkpoint if there is one.

    The generator of an iteration depends only on the seed and the iteration, so that a resumed run equals an uninterrupted
    one bit for bit on the CPU. On SIGINT and SIGTERM, the current step is finished and its state stored before the run ends.

    Args:
        problem: what to work on.
        folder: folder for metrics and checkpoints; without one, nothing is written.
        cadence: how often to checkpoint and to validate.
        observer: called after each iteration with its number, the total, and the metrics.
        painter: called with the number of iterations done and the set so far, as often as `cadence.picture` says.
        keeper: called likewise, as often as `cadence.keep` says.
        crew: the processes that share the draws, led by this one; the others run `follow`.

    Raises:
        CollapseError: the method gives up, or its images run away.
    """
    method = make_method(problem, crew)
    restored = folder.restore() if folder else None
    if restored is None:
        begin, state = 0, method.initialise(seeding.generator(problem.seed, "initialise"))
        if folder and method.iterations():
            method.result(state).save(folder.path / INITIAL_NAME)
    else:
        begin, state = restored[0], {name: tensor.to(problem.device) for name, tensor in restored[1].items()}
    crew.gathered({0: Parcel({"iteration": begin}, state)})
    total = method.iterations()
    validate, due, stopped = _validator(problem, cadence), _Due(cadence.checkpoint), False
    with between_steps() as asked_to_stop:
        for iteration in range(begin, total):
            started = time.perf_counter()
            crew.call()
            metrics = method.step(state, iteration, seeding.generator(problem.seed, "step", iteration))
            row: Metrics = {"iteration": iteration, **metrics, "seconds": time.perf_counter() - started}
            done = iteration + 1
            last = done == total or time.perf_counter() > cadence.until
            if done % _CHECK_EVERY == 0 or last:
                _refuse_runaway(method.result(state), done)
            if cadence.validate and (done % cadence.validate == 0 or last):
                row["validation_accuracy"] = validate(method.result(state))
            # The checkpoint is last: a run that is killed repeats what came after the one before.
            if painter is not None and cadence.picture and (done % cadence.picture == 0 or last):
                painter(done, method.result(state))
            if keeper is not None and cadence.keep and done % cadence.keep == 0:
                keeper(done, method.result(state))
            if folder:
                folder.log(row)
                if due(done):
                    stored = time.perf_counter()
                    folder.checkpoint(done, state)
                    due.stored(time.perf_counter() - stored)
            if observer is not None:
                observer(iteration, total, row)
            stopped = asked_to_stop()
            if stopped and folder:
                folder.checkpoint(done, state)
            if stopped or last:
                break
    if stopped:
        raise KeyboardInterrupt  # if the signal itself did not end the process
    return method.result(state)


def follow(problem: Problem, group: Group) -> None:
    """Takes its share of the draws of `run_method`, which another process of the group runs on the same problem."""
    method = make_method(problem, group)
    (start,) = group.gathered({}).values()
    iteration, state = int(start.values["iteration"]), {name: one.to(problem.device) for name, one in start.tensors.items()}
    while group.called():
        method.step(state, iteration, seeding.generator(problem.seed, "step", iteration))
        iteration += 1


def _refuse_runaway(distilled: DistilledSet, done: int) -> None:
    """Raises `CollapseError` if pixels lie where no image is."""
    largest = float(distilled.images.detach().abs().max())
    if not largest <= _RUNAWAY:
        raise CollapseError(
            f"the run collapsed: after {done} iterations a pixel lies {largest:.1g} standard deviations from the mean, where "
            "no image is: lower distill.lr_images"
        )


def _validator(problem: Problem, cadence: Cadence) -> Callable[[DistilledSet], float]:
    """Returns a function that measures a set on the validation part, never on test images.

    If the problem is a hold-out, nothing has been trained on that part. If the set is distilled from all training images, the
    part consists of training images; the curve then only monitors the run, and nothing is chosen by it.
    """
    real = problem.real
    if not cadence.validate:
        return lambda _: float("nan")
    split = real.test if real.judged_on == "validation" else real.holdout(problem.seed).test
    images = prepared(split, problem.preprocess, problem.device)
    protocol = load_protocol("quick")

    def validate(distilled: DistilledSet) -> float:
        (score,) = evaluate_set(distilled, images, protocol, networks=1, seed=problem.seed, stream=("validate",))
        return score

    return validate
