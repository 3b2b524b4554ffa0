"""A run within a budget of minutes: settings are chosen to fit, and stored, so that the run can be resumed."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dstill.artifacts.files import write_text
from dstill.artifacts.record import METRICS_NAME, read_metrics
from dstill.artifacts.run_folder import IDENTITY_NAME
from dstill.config import recipes
from dstill.config.settings import Recipe, canonical
from dstill.data.real import RealSet, Source, load_real
from dstill.distillation.folder import identity_of_initial, sharing
from dstill.distillation.loop import Cadence, run_method
from dstill.errors import DamagedFileError, DstillError
from dstill.jobs.job import Job, Task, Workplace, shape_of
from dstill.jobs.options import Budget, Choice
from dstill.methods.base import Problem
from dstill.planning.budget import (
    BY_ITERATION,
    PREPROCESS,
    Offer,
    Rivals,
    Until,
    best_offer,
    described,
    method_for,
    with_iterations,
)
from dstill.planning.clock import QUICK, Clock
from dstill.support.progress import expect
from dstill.support.workers import Workers

NAME = "budget.json"
_LONGER = 3  # times the budget, of the offer that is shown beside it
_PACE_SHARE, _PACE_SECONDS = 0.03, (2.0, 20.0)  # of the budget, for measuring the pace
_LATE = 0.7  # share of the time planned for a stage below which it is cut
_GRACE = 0.05  # share of the budget by which a distillation may be late


class Chosen(BaseModel):
    """What was chosen for a budget, as it is stored in the run folder.

    Attributes:
        asked: what was asked for. Another request needs another folder.
        offer: what was chosen.
        settled: whether the number of iterations follows from the measured pace.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    asked: dict[str, Any]
    offer: Offer
    settled: bool = False

    @classmethod
    def load(cls, folder: Path, asked: dict[str, Any]) -> Chosen | None:
        """What a folder holds; None if nothing was chosen there yet.

        Raises:
            DstillError: it was chosen for another request, or the file is damaged.
        """
        path = folder / NAME
        if not path.exists():
            return None
        try:
            found = cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DamagedFileError(f"{path} is damaged: remove the folder ({error})") from error
        there = found.asked
        changed = [
            f"{key}: {there.get(key)} there, {asked.get(key)} now" for key in there | asked if there.get(key) != asked.get(key)
        ]
        if changed:
            raise DstillError(f"{folder} holds a run of another request ({'; '.join(changed)}): pass another -o, or remove it")
        return found

    def save(self, folder: Path) -> None:
        write_text(folder / NAME, self.model_dump_json(indent=1) + "\n")


class Budgeted:
    """A job within a budget: its settings are chosen, or read from an earlier call, and said.

    Args:
        job: the job, with the recipe to start from.
        budget: the time of the whole call.
        task: what is done with the job.
        folder: where the choice is stored; None for nowhere.
        until: whether the sets are measured.
    """

    def __init__(self, job: Job, budget: Budget, task: Task, folder: Path | None, until: Until = "evaluation") -> None:
        self.job, self.budget, self.folder = job, budget, folder
        self._task, self._until, reporter = task, until, job.place.reporter
        stored = None if folder is None else Chosen.load(folder, self._asked())
        if stored is None and folder is not None:
            _refuse_finished(folder)
        if stored is not None:
            self.chosen = stored
            reporter.note(f"the settings that were chosen in an earlier call are used again: {folder}/{NAME}")
        else:
            offer, longer = self._offers()
            self._keep(Chosen(asked=self._asked(), offer=offer))
            for line in described(offer, job.name, job.shape, budget.minutes, longer, _LONGER * budget.minutes):
                reporter.note(line)
            if task.rivals and not offer.rivals.methods:
                reporter.note("there is no time to compare the set with coresets: allow more, or pass a smaller --image-size")
        expect(reporter, [stage.expectation for stage in self.chosen.offer.stages])

    def _asked(self) -> dict[str, Any]:
        """What identifies the request. What is rarely asked for is left out where it is not."""
        task, rare = self._task, identity_of_initial(self._task.initial)
        rare |= {} if task.experts is None else {"experts": task.experts.identity}
        rare |= {} if task.evaluation.random else {"random": False}
        return {
            **rare,
            "minutes": self.budget.minutes,
            "recipe": canonical(self.job.recipe, exclude={"note"}),
            "data": self.job.real.fingerprint,
            "seeds": list(self.job.seeds),
            "sets": task.sets,
            "networks": task.evaluation.networks,
        }

    def _offers(self) -> tuple[Offer, Offer | None]:
        """What the budget buys, and what a longer one would, if that is something else."""
        tell, clock = self.job.place.reporter.progress, Clock(self.job.shape, self.job.place.device, QUICK)
        tell("calibrating", 0, 1)
        offer = best_offer(self.job, self._task, self.budget.left, clock, self._until)
        longer = best_offer(self.job, self._task, 60 * _LONGER * self.budget.minutes, clock, self._until)
        tell("calibrating", 1, 1)
        return offer, longer if longer.recipe != offer.recipe else None

    def _keep(self, chosen: Chosen) -> None:
        self.chosen = chosen
        if self.folder is not None:
            chosen.save(self.folder)

    @property
    def recipe(self) -> Recipe:
        """The chosen settings."""
        return self.chosen.offer.recipe

    def task(self) -> Task:
        """The task with the chosen evaluation; with less of it if there is no longer time for all."""
        offer, planned, left = self.chosen.offer, self._planned("evaluation", "random images"), self.budget.left
        networks, random = offer.networks, offer.random
        if left < _LATE * planned:
            networks, random = max(1, min(networks, int(networks * left / planned))), False
            self.job.place.reporter.note(f"time is short: the set is measured with {networks} network(s)")
        return replace(self._task, evaluation=replace(self._task.evaluation, networks=networks, random=random))

    def rivals(self) -> Rivals:
        """The chosen rivals; only the quickest if there is no longer time for all."""
        rivals, left = self.chosen.offer.rivals, self.budget.left - self._planned("evaluation")
        if left >= _LATE * rivals.seconds:
            return rivals
        self.job.place.reporter.note("time is short: only random images compete")
        return rivals.model_copy(update={"methods": ("random",), "networks": 1})

    def _planned(self, *names: str) -> float:
        return sum(stage.seconds for stage in self.chosen.offer.stages if stage.name in names)

    def settle(self, problem: Problem) -> Recipe:
        """Measures the pace of the method on the problem, and corrects the number of iterations by it, once for each folder.

        Returns:
            The settings to distil with.
        """
        if self.chosen.settled or not self.recipe.distill.iterations:
            return self.recipe
        least, most = _PACE_SECONDS
        share = min(max(_PACE_SHARE * 60 * self.budget.minutes, least), most)
        each = _pace(problem, share, self.job.place.workers)
        looking = self._planned("validation") / (self._task.sets * self.recipe.distill.iterations)
        iterations = int(self._time_to_distil() / self._task.sets / (each + looking))
        recipe = with_iterations(self.job.with_recipe(self.recipe), max(1, min(self.chosen.offer.most, iterations))).recipe
        offer = self.chosen.offer.model_copy(update={"recipe": recipe})
        self._keep(self.chosen.model_copy(update={"offer": offer, "settled": True}))
        self.job.place.reporter.note(f"an iteration takes {each:.2g} s here: {recipe.distill.iterations:,} iterations")
        return recipe

    def _time_to_distil(self) -> float:
        """Seconds from now to the moment when the stage after the distillation and its validation must begin."""
        stages = self.chosen.offer.stages
        last = max((i for i, stage in enumerate(stages) if stage.name in BY_ITERATION), default=len(stages))
        return self.budget.left - sum(stage.seconds for stage in stages[last + 1 :])

    def until(self, sets_left: int) -> float:
        """The moment after which the next of so many sets is finished as it is; a little later than planned."""
        return time.perf_counter() + self._time_to_distil() / sets_left + _GRACE * 60 * self.budget.minutes

    def tell_if_cut(self, folder: Path) -> None:
        """Says if a distillation ended before its last iteration."""
        done, wanted = len(read_metrics(folder / METRICS_NAME)), self.recipe.distill.iterations
        if 0 < done < wanted:
            slower = "since the machine was slower than measured"
            self.job.place.reporter.note(f"ended after {done:,} of {wanted:,} iterations, {slower}")


def _refuse_finished(folder: Path) -> None:
    """Refuses a folder that holds sets which were not made within a budget, since the best set of a budget is copied there.

    Raises:
        DstillError: there is such a set.
    """
    if any((place / IDENTITY_NAME).exists() for place in (folder, *folder.glob("set-*"))):
        raise DstillError(f"{folder} holds a run without a budget: pass another -o, or remove the folder")


def leaves_choice(choice: Choice, budget: Budget | None) -> bool:
    """Whether the budget chooses the method too."""
    return budget is not None and choice.method is None and choice.recipe is None


def with_method(choice: Choice, source: Source, place: Workplace) -> tuple[Choice, RealSet]:
    """A choice that names no method, with one that suits the data; and the data, which are loaded for that."""
    real = load_real(source, progress=place.reporter)
    changes = [f"preprocess={PREPROCESS}", *recipes.assignments(choice.changes)]
    return replace(choice, method=method_for(shape_of(real)), changes=changes), real


def _pace(problem: Problem, most: float, workers: Workers) -> float:
    """Seconds of an iteration, measured for about so many seconds. The first, which warms up, counts only if it is alone."""
    seconds: list[float] = []
    with sharing(problem, workers) as crew:
        cadence = Cadence(checkpoint=0, until=time.perf_counter() + most)
        run_method(problem, cadence=cadence, observer=lambda done, total, row: seconds.append(row["seconds"]), crew=crew)
    return statistics.fmean(seconds[1:] or seconds)
