"""From the rows of a reproduction to the jobs that make their sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dstill.api.apart import request
from dstill.config import recipes
from dstill.config.settings import Recipe
from dstill.data.catalog import DATASETS
from dstill.data.real import RealSet, Split
from dstill.errors import DstillError, suggest
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Choice, Evaluation, Recording, Seeds, at_least_one
from dstill.reproductions.spec import Case, Reproduction, Row, Scale, ScaleName, load_reproduction

_Named = TypeVar("_Named", Row, Case)


@dataclass(frozen=True)
class Work:
    """A row of a case, resolved.

    Attributes:
        row: the row.
        case: the case.
        job: the job of the first set.
        options: what the request contains beside the job's recipe and data.
        sets: number of sets. Each has its own run and file, so that another machine can resume the work of this one.
        validation: images that were set aside to choose among the sets of a run.
    """

    row: Row
    case: Case
    job: Job
    options: dict[str, Any]
    sets: int
    validation: Split | None = None

    def seeded(self, index: int) -> Job:
        """The job of one set, with its own seed and the experts that all sets share."""
        return replace(self.job, seeds=Seeds(self.job.seeds.images + index, self.job.seeds.experts))

    def request(self, index: int) -> dict[str, Any]:
        """What the numbers of one set depend on."""
        seeds = self.seeded(index).seeds
        apart = {"expert_seed": seeds.experts} if index else {}
        return request(self.job, {**self.options, "seed": seeds.images, **apart})

    def name(self, index: int) -> str:
        """File name of one set, without the extension."""
        return row_name(self.row, self.case, index)


def row_name(row: Row, case: Case, index: int) -> str:
    """File name of a set of a row, without the extension."""
    return f"{row.name}-{case.name}" + (f"-set{index}" if index else "")


def chosen(
    what: str, scale: ScaleName, only: Sequence[str], cases: Sequence[str], sets: int | None
) -> tuple[Reproduction, Scale, list[Row]]:
    """The reproduction, the scale with these cases and this number of sets, and the rows to run.

    Raises:
        DstillError: the reproduction, the scale, a row or a case is unknown.
    """
    at_least_one(sets=sets)
    reproduction = load_reproduction(what)
    if scale not in reproduction.scales:
        raise DstillError(f"{what} has no scale {scale!r}: take one of {', '.join(reproduction.scales)}")
    settings = reproduction.scales[scale]
    where = f"{what} at scale {scale}"
    rows = _picked(reproduction.rows_at(scale), only, f"{where} has no row")
    settings = settings.model_copy(
        update={"sets": sets or settings.sets, "cases": _picked(settings.cases, cases, f"{where} has no case")}
    )
    return reproduction, settings, rows


def _picked(every: list[_Named], names: Sequence[str], lacking: str) -> list[_Named]:
    """Those with one of these names, or all if none is given."""
    known = [one.name for one in every]
    for name in names:
        if name not in known:
            raise DstillError(f"{lacking} {name!r}; {suggest(name, known)}")
    return [one for one in every if not names or one.name in names]


def task_of(one: Work, checkpoint_every: int = 25) -> Task:
    """The task of each run of a row."""
    judging = {key: one.options[key] for key in ("nets", "networks", "random", "whole")}
    recording = Recording(
        validate_every=one.options["validate_every"],
        checkpoint_every=checkpoint_every,
        keep_every=one.options.get("keep_every", 0),
    )
    return Task(one.options["sets"], Evaluation(**judging), recording)


def planned_task(one: Work) -> Task:
    """The task of a run, with the networks that look at its sets and measure the two that could be handed out."""
    task, every = task_of(one), one.options.get("keep_every", 0)
    if not every:
        return task
    each = one.options["networks"] or load_protocol(one.job.recipe.protocol).networks
    looking = one.options["look_networks"] * (one.job.recipe.distill.iterations // every)
    return replace(task, evaluation=replace(task.evaluation, networks=3 * each + looking))


def apportioned(settings: Scale, real: RealSet, seed: int) -> tuple[RealSet, Split | None]:
    """The data that a scale's runs see, and the validation part if it is to choose among the sets of a run."""
    if settings.judged_on == "validation":
        return real.holdout(seed), None
    if not settings.kept:
        return real, None
    held = real.holdout(seed)
    return replace(real, train=held.train, fingerprint="", read_as={}), held.test


def resolved(
    settings: Scale,
    row: Row,
    case: Case,
    data: tuple[RealSet, Split | None] | None,
    seed: int,
    place: Workplace,
) -> Work:
    """A row and case, resolved for the data of `apportioned`, or for the published shape if these are None."""
    real, validation = data or (None, None)
    choice = Choice(row.method, case.ipc, _named(settings, row, case))
    shape = DATASETS[case.data].shape if real is None else None
    job = Job.resolve(case.data if real is None else real, choice, seed, place, shape=shape)
    job = replace(job, recipe=_changed(job.recipe, settings, row, case))
    return Work(row, case, job, _options(settings, case, job.recipe, seed), settings.sets, validation)


def _named(settings: Scale, row: Row, case: Case) -> str | None:
    """The recipe to start from. A tuned one is used only if the row names it."""
    if settings.recipe is None and row.recipe:
        return f"{case.data}/{row.recipe}-ipc{case.ipc}"
    return settings.recipe or recipes.published(case.data, row.method, case.ipc)


def _changed(recipe: Recipe, settings: Scale, row: Row, case: Case) -> Recipe:
    """The recipe with the shared changes that apply to it (the scale's, the case's), the row's, and the scale's for the row."""
    everyone = [*settings.changes, *settings.case_changes.get(case.name, [])]
    shared = [change for change in everyone if applies(change, recipe)]
    return recipes.changed(recipe, [*shared, *row.changes, *settings.row_changes.get(row.name, [])], f"row {row.name}")


def applies(change: str, recipe: Recipe) -> bool:
    """Whether a recipe has the setting that a shared change sets."""
    section, _, rest = change.partition("=")[0].partition(".")
    if section == "experts":
        return recipe.experts is not None
    if section == "distill":
        return bool(recipe.distill.iterations) and rest.partition(".")[0] in type(recipe.distill).model_fields
    return True


def _options(settings: Scale, case: Case, recipe: Recipe, seed: int) -> dict[str, Any]:
    """What a request contains beside recipe and data."""
    looks = settings.looks if case.looks is None else case.looks
    judging = {"networks": settings.networks, "nets": settings.nets, "random": False, "whole": False}
    found = {"sets": 1, **judging, "seed": seed, "validate_every": _every(recipe, looks)}
    if settings.kept:
        found |= {"keep_every": _every(recipe, settings.kept), "look_networks": settings.look_networks}
    return found


def _every(recipe: Recipe, times: int) -> int:
    """The iterations between two of so many events; 0 for none."""
    return max(1, recipe.distill.iterations // times) if times and recipe.distill.iterations else 0
