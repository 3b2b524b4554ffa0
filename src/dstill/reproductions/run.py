"""The public function that works out a table or figure of the paper, at a scale that the user chooses."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dstill.api.apart import request, run_apart
from dstill.api.job import at_least_one, cache_folder, resolve_for, resolve_recipe, shape_of
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.files import atomic, write_text
from dstill.artifacts.record import RunRecord
from dstill.artifacts.run_folder import IDENTITY_NAME
from dstill.config import yamls
from dstill.config.settings import Recipe, canonical, digest
from dstill.data.catalog import DATASETS, Shape
from dstill.data.real import RealSet, load_real
from dstill.errors import DstillError, reason_of, suggest
from dstill.experts.trajectory import Trajectories
from dstill.planning.clock import Clock
from dstill.planning.plan import Given, Plan, plan_run, processes, together
from dstill.reproductions.following import accumulated_error
from dstill.reproductions.page import Entries, Entry, Sets, page
from dstill.reproductions.spec import Case, Reproduction, Row, Scale, ScaleName, load_reproduction
from dstill.support.console import Reporter, Silent, duration
from dstill.support.devices import processor, resolve_device
from dstill.support.workers import Workers, cores, refuse_import
from dstill.version import __version__

# What decides how a set is judged, but not how it is distilled; of a protocol its content, the recipe has its name.
_JUDGING = ("networks", "nets", "random", "whole", "protocol")


@dataclass(frozen=True)
class _Job:
    """A row of a case, resolved.

    Attributes:
        row: the row.
        case: the case.
        recipe: its settings.
        options: arguments of `run` for the first set.
        sets: how many sets are asked for, each in a run and a file of its own: what one machine has done, another goes on from.
    """

    row: Row
    case: Case
    recipe: Recipe
    options: dict[str, Any]
    sets: int

    def options_of(self, index: int) -> dict[str, Any]:
        """Arguments of `run` for one set: its own seed, and the experts that all sets share."""
        seed = self.options["seed"]
        return self.options if index == 0 else {**self.options, "seed": seed + index, "expert_seed": seed}


@dataclass(frozen=True)
class _Call:
    """One call of `reproduce`.

    Attributes:
        reproduction: what is made.
        folder: where results go.
        runs: where run folders go.
        elsewhere: arguments of `run` that do not decide its numbers.
        reporter: receives progress.
    """

    reproduction: Reproduction
    folder: Path
    runs: Path
    elsewhere: dict[str, Any]
    reporter: Reporter


def _name(row: Row, case: Case, index: int) -> str:
    """File name of a set of a row, without its ending."""
    return f"{row.name}-{case.name}" + (f"-set{index}" if index else "")


def reproduce(
    what: str,
    *,
    scale: ScaleName = "smoke",
    sources: Mapping[str, Any] | None = None,
    only: Sequence[str] = (),
    sets: int | None = None,
    out: str | Path = "results",
    runs: str | Path = "runs/reproduce",
    seed: int = 0,
    device: str = "auto",
    cache: str | Path | None = None,
    workers: Workers = 1,
    checkpoint_every: int = 25,
    reporter: Reporter | None = None,
) -> Path:
    """Runs what a table or figure of the paper needs, and writes ours beside the published figures.

    Every row is an ordinary `run` in a process of its own. Rows that any reproduction has finished with the same settings
    are read, experts are shared, and an interrupted call continues where it stopped.

    Args:
        what: `table1` … `table8`, `fig3` … `fig11`.
        scale: `smoke`, seconds on the digits; `cpu`, hours on a few cores; `gpu`, minutes a row on a large card, of
            `table3` and `fig6` alone; `paper`, as published.
        sources: by data set name, what `load_real` takes instead of the name.
        only: names of rows to run; the others are shown if they are there, else as pending.
        sets: distilled sets a row, the scale's number if left out. A later call with more makes those that `out`
            lacks.
        out: results go to `<out>/<what>/<scale>`: settings, a JSON file for each set of a row, figures, and `page.md`.
        runs: folder of run folders, shared by all reproductions.
        seed: decides everything random.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts for every run.
        workers: processes that train experts and networks at once.
        checkpoint_every: store the state every so many iterations; 0 for never.
        reporter: receives progress.

    Returns:
        The results folder. A row that fails keeps its reason there; the others go on.

    Raises:
        DstillError: an unknown name of a reproduction, a row or a data set, or a scale that it lacks.
    """
    refuse_import("reproduce")
    reporter, where = reporter or Silent(), resolve_device(device)
    reproduction, settings, rows = _chosen(what, scale, only, sets)
    reals = {case.data: load_real((sources or {}).get(case.data, case.data)) for case in settings.cases}
    jobs = [
        _Job(row, case, recipe, _options(settings, recipe, seed), settings.sets)
        for case in settings.cases
        for row in rows
        for recipe in [_recipe(settings, row, case, reals[case.data], where)]
    ]
    folder = Path(out) / what / scale
    write_text(folder / "reproduction.yaml", yamls.dump(canonical(reproduction)))
    given = {case.data: _given(reals[case.data], where, cache_folder(cache), workers) for case in settings.cases}
    planned = _planned(jobs, given, folder, what)
    missing = [(job, index) for job in jobs for index in _missing(folder, job, reals[job.case.data])]
    total = sum(job.sets for job in jobs)
    reporter.note(f"{what}, {scale}: about {duration(planned.seconds)} for {len(missing)} of {total} run(s)")
    elsewhere = {"device": device, "cache": cache, "workers": workers, "checkpoint_every": checkpoint_every}
    call = _Call(reproduction, folder, Path(runs), elsewhere, reporter)
    for job, index in missing:
        reporter.note(f"{what}: {job.row.title}, {job.case}" + (f", set {index}" if index else ""))
        _work(call, job, index, reals[job.case.data])
        _write_page(what, reproduction, scale, folder)
    _write_page(what, reproduction, scale, folder)
    return folder


def plan_reproduction(
    what: str,
    *,
    scale: ScaleName = "smoke",
    only: Sequence[str] = (),
    sets: int | None = None,
    device: str = "auto",
    cache: str | Path | None = None,
    workers: Workers = 1,
) -> Plan:
    """What a reproduction takes on this machine if nothing of it is there yet, from a calibration of some seconds.

    Nothing is loaded: the shapes of the data are those of their published versions.

    Raises:
        DstillError: an unknown name of a reproduction or a row, or a scale that it lacks.
    """
    where = resolve_device(device)
    _, settings, rows = _chosen(what, scale, only, sets)
    plans, clocks = list[Plan](), dict[Shape, Clock]()
    for case in settings.cases:
        shape = DATASETS[case.data].shape
        assert shape is not None
        given = Given(shape, None, where, cache_folder(cache), processes(workers, where))
        clock = clocks.setdefault(shape, Clock(shape, where))
        for row in rows:
            named = _named(settings, row, case)
            resolved = resolve_for(
                case.data, shape, named, method=row.method, ipc=case.ipc, net=None, changes=[], device=where, reporter=Silent()
            )
            recipe = _changed(resolved, settings, row)
            plans.append(
                _plan_job(_Job(row, case, recipe, _options(settings, recipe, 0), settings.sets), settings.sets, given, clock)
            )
    return together(plans, f"{what} at scale {scale}")


def _chosen(what: str, scale: ScaleName, only: Sequence[str], sets: int | None) -> tuple[Reproduction, Scale, list[Row]]:
    at_least_one(sets=sets)
    reproduction = load_reproduction(what)
    if scale not in reproduction.scales:
        raise DstillError(f"{what} has no scale {scale!r}: take one of {', '.join(reproduction.scales)}")
    settings = reproduction.scales[scale]
    rows = reproduction.rows_at(scale)
    for name in only:
        if name not in {row.name for row in rows}:
            raise DstillError(f"{what} has no row {name!r} at scale {scale}; {suggest(name, [row.name for row in rows])}")
    settings = settings.model_copy(update={"sets": sets or settings.sets})
    return reproduction, settings, [row for row in rows if not only or row.name in only]


def _recipe(settings: Scale, row: Row, case: Case, real: RealSet, device: torch.device) -> Recipe:
    resolved = resolve_recipe(real, _named(settings, row, case), row.method, case.ipc, None, [], device, Silent())
    return _changed(resolved, settings, row)


def _named(settings: Scale, row: Row, case: Case) -> str | None:
    """The recipe to start from: one tuned here only where the row says so."""
    from dstill.config import recipes

    if settings.recipe is None and row.recipe:
        return f"{case.data}/{row.recipe}-ipc{case.ipc}"
    return settings.recipe or recipes.published(case.data, row.method, case.ipc)


def _changed(recipe: Recipe, settings: Scale, row: Row) -> Recipe:
    """The scale's changes, as far as the method knows what they change, then the row's own, then those of the row here."""
    from dstill.config import recipes

    shared = [change for change in settings.changes if applies(change, recipe)]
    return recipes.changed(recipe, [*shared, *row.changes, *settings.row_changes.get(row.name, [])], f"row {row.name}")


def applies(change: str, recipe: Recipe) -> bool:
    """Whether a recipe has what a shared change changes."""
    section, _, rest = change.partition("=")[0].partition(".")
    if section == "experts":
        return recipe.experts is not None
    if section == "distill":
        return bool(recipe.distill.iterations) and rest.partition(".")[0] in type(recipe.distill).model_fields
    return True


def _options(settings: Scale, recipe: Recipe, seed: int) -> dict[str, Any]:
    every = max(1, recipe.distill.iterations // settings.looks) if settings.looks and recipe.distill.iterations else 0
    judging = {"networks": settings.networks, "nets": settings.nets, "random": False, "whole": False}
    return {"sets": 1, **judging, "seed": seed, "validate_every": every}


def _given(real: RealSet, device: torch.device, cache: Path, workers: Workers) -> Given:
    return Given(shape_of(real), real, device, cache, processes(workers, device))


def _planned(jobs: Sequence[_Job], given: Mapping[str, Given], folder: Path, what: str) -> Plan:
    plans, clocks = list[Plan](), dict[Shape, Clock]()
    for job in jobs:
        one = given[job.case.data]
        assert one.real is not None
        sets = len(_missing(folder, job, one.real))
        if sets:
            plans.append(_plan_job(job, sets, one, clocks.setdefault(one.shape, Clock(one.shape, one.device))))
    return together(plans, what)


def _plan_job(job: _Job, sets: int, given: Given, clock: Clock) -> Plan:
    made = plan_run(job.recipe, given, clock, **{**job.options, "sets": sets})
    return made.model_copy(update={"title": f"{job.row.title}, {job.case}"})


def _work(call: _Call, job: _Job, index: int, real: RealSet) -> None:
    """Makes one set of a row, and writes its file."""
    options, name = job.options_of(index), _name(job.row, job.case, index)
    asked = request(real, job.recipe, options)
    # Sets are not distilled twice to be judged in another way.
    distilled = {key: value for key, value in asked.items() if key not in _JUDGING}
    run = call.runs / f"{job.case.name}-{job.recipe.method}-{digest(distilled)}"
    first, following, failure = run / "set-0", list[float](), None
    try:
        run_apart(real, job.recipe, run, options, call.elsewhere, call.reporter)
        if "accumulated_error" in call.reproduction.measures:
            following = _followed(first, job.recipe, call.elsewhere)
    except Exception as error:  # whatever it is, it concerns this row alone
        failure = error
        call.reporter.note(f"{name} failed: {reason_of(error)}")
    picture = f"{name}.webp" if index == 0 and (first / "distilled.png").exists() else ""
    entry = Entry(
        row=job.row.name,
        case=job.case.name,
        set=index,
        request=asked,
        record=RunRecord.read(run, 1, failure),
        following=tuple(following),
        picture=picture,
        environment=_environment(resolve_device(call.elsewhere["device"])),
    )
    write_text(call.folder / f"{name}.json", entry.model_dump_json(indent=1) + "\n")
    if picture:
        small_picture(first / "distilled.png", call.folder / picture)


def small_picture(source: Path, target: Path) -> None:
    """Writes a picture as WebP of at most 400 pixels in width, as a results folder keeps one for every row."""
    with Image.open(source) as image, atomic(target) as temporary:
        image.convert("RGB").reduce(-(-image.width // 400)).save(temporary, format="WEBP", quality=75, method=6)


def _followed(distilled: Path, recipe: Recipe, elsewhere: dict[str, Any]) -> list[float]:
    """The accumulated error along the first of the experts that the set was distilled from."""
    named = json.loads((distilled / IDENTITY_NAME).read_text(encoding="utf-8"))["experts"]
    config = recipe.expert_config
    trajectories = Trajectories(cache_folder(elsewhere["cache"]) / "experts" / named, config.count, config.epochs)
    return accumulated_error(DistilledSet.load(distilled), trajectories, 0, resolve_device(elsewhere["device"]))


def _environment(device: torch.device) -> dict[str, str]:
    return {
        "dstill": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, {cores()} core(s)",
        "device": device.type,
        "threads": str(torch.get_num_threads()),
    }


def _missing(folder: Path, job: _Job, real: RealSet) -> list[int]:
    """Numbers of the sets that are yet to be made."""
    return [index for index in range(job.sets) if not _finished(folder, job, index, real)]


def _finished(folder: Path, job: _Job, index: int, real: RealSet) -> bool:
    """Whether the set's file was made by the same request. A run that failed is tried again unless it collapsed."""
    path = folder / f"{_name(job.row, job.case, index)}.json"
    if not path.exists():
        return False
    entry = Entry.load(path)
    same = entry.request == json.loads(json.dumps(request(real, job.recipe, job.options_of(index))))
    return same and (entry.record.result is not None or entry.record.collapsed)


def _write_page(what: str, reproduction: Reproduction, scale: ScaleName, folder: Path) -> None:
    """The page and the figure of whatever rows are there."""
    rows, cases = reproduction.rows_at(scale), reproduction.scales[scale].cases
    entries = {(row.name, case.name): found for case in cases for row in rows if (found := _sets(folder, row, case))}
    drawn = [_draw(reproduction, case, rows, entries, folder) for case in cases] if reproduction.figure else []
    text = page(what, reproduction, scale, entries, [name for names in drawn for name in names])
    write_text(folder / "page.md", text)


def _sets(folder: Path, row: Row, case: Case) -> Sets | None:
    """The sets of a row that are there, in order, without any that an earlier call made with other settings."""
    name = _name(row, case, 0)
    found = [Entry.load(path) for path in (*folder.glob(f"{name}.json"), *folder.glob(f"{name}-set*.json"))]
    entries = sorted(found, key=lambda entry: entry.set)
    return Sets([entry for entry in entries if _shared(entry) == _shared(entries[0])]) if entries else None


def _shared(entry: Entry) -> dict[str, Any]:
    """What the requests of all sets of a row have in common."""
    asked = dict(entry.request)
    seed, expert_seed = asked.pop("seed"), asked.pop("expert_seed", None)
    return {**asked, "seed": seed - entry.set, "expert_seed": seed if expert_seed is None else expert_seed}


def _draw(reproduction: Reproduction, case: Case, rows: Sequence[Row], entries: Entries, folder: Path) -> list[str]:
    """Draws the figure of one case; the names of the files."""
    from dstill.reporting import figures

    there = [(row.title, entries[row.name, case.name]) for row in rows if (row.name, case.name) in entries]
    records = {title: sets.record for title, sets in there}
    stem = f"figure-{case.name}"
    if not there:
        return []
    match reproduction.figure:
        case "images":
            pictures = {title: folder / sets.entries[0].picture for title, sets in there if sets.entries[0].picture}
            if not pictures:
                return []
            figures.sheet(pictures, folder / f"{stem}.png")
        case "bars":
            scores = {name: record.result.accuracy for name, record in records.items() if record.result}
            values = {name: (100 * score.mean, 100 * score.std) for name, score in scores.items()}
            figures.save(figures.bars(values, "accuracy %"), folder / f"{stem}.png")
        case "experts":
            figures.save(figures.expert_curves(records), folder / f"{stem}.png")
        case "inner_loss":
            figures.save(figures.inner_loss(records), folder / f"{stem}.png")
        case "initialisation":
            figures.save(figures.initialisation(next(iter(records.values()))), folder / f"{stem}.png")
        case str(key):
            figures.save(figures.curves(records, key), folder / f"{stem}.png")
            if key == "validation_accuracy":
                figures.save(figures.curves(records, key, "seconds"), folder / f"{stem}-seconds.png")
                return [f"{stem}.png", f"{stem}-seconds.png"]
    return [f"{stem}.png"]
