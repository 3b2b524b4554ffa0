"""`reproduce` makes a table or figure of the paper, at a scale that the user chooses."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dstill.api.apart import environment, run_apart
from dstill.api.rows import Hands
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.files import atomic, check_writable, write_text
from dstill.artifacts.record import RunRecord
from dstill.artifacts.run_folder import IDENTITY_NAME
from dstill.config import yamls
from dstill.config.settings import canonical, digest
from dstill.data.catalog import Shape
from dstill.data.real import Source, load_real
from dstill.errors import reason_of
from dstill.experts.trajectory import Trajectories
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Executor, Machine
from dstill.planning.clock import Clock
from dstill.planning.plan import plan_job, together
from dstill.planning.stages import Plan
from dstill.reproductions.drawing import draw
from dstill.reproductions.following import accumulated_error
from dstill.reproductions.looking import Looks, look
from dstill.reproductions.page import Entry, Sets, page
from dstill.reproductions.resolving import Work, apportioned, chosen, planned_task, resolved, row_name, task_of
from dstill.reproductions.spec import Case, Reproduction, Row, ScaleName
from dstill.support.console import Progress, duration
from dstill.support.progress import Silent
from dstill.support.workers import refuse_import

# Determines how a set is evaluated, but not how it is distilled. The recipe names the protocol, whose content may change.
_JUDGING = ("networks", "nets", "random", "whole", "protocol", "look_networks")


@dataclass(frozen=True)
class _Call:
    """One call of `reproduce`.

    Attributes:
        what: name of the table or figure.
        reproduction: the table or figure.
        scale: how much is run.
        folder: folder of the results.
        runs: folder of the run folders.
        checkpoint_every: iterations between two checkpoints.
    """

    what: str
    reproduction: Reproduction
    scale: ScaleName
    folder: Path
    runs: Path
    checkpoint_every: int


def reproduce(
    what: str,
    *,
    scale: ScaleName = "smoke",
    sources: Mapping[str, Source] | None = None,
    only: Sequence[str] = (),
    cases: Sequence[str] = (),
    sets: int | None = None,
    out: str | Path = "results",
    runs: str | Path = "runs/reproduce",
    seed: int = 0,
    checkpoint_every: int = 25,
    machine: Machine = Machine(),
    executor: str | Executor | None = None,
    progress: Progress = None,
) -> Path:
    """Runs what a table or figure of the paper needs, and writes our figures beside the published ones.

    Every row is an ordinary `run` in its own process. Under torchrun, its processes share the rows. Rows that any
    reproduction has finished with the same settings are reused, experts are shared, and an interrupted call resumes where it
    stopped.

    Args:
        what: `table1` … `table8`, `fig3` … `fig11`, or an experiment that the paper lacks, such as `peeking`.
        scale: `smoke`, seconds on the digits; `cpu`, hours on a few cores; `gpu`, minutes per row on a large card, for
            some; `paper`, as published.
        sources: by data set name, what `load_real` takes instead of the name.
        only: names of rows to run; the others are shown if they exist, else as pending.
        cases: the same for cases, such as `cifar100-ipc10`.
        sets: distilled sets per row; the scale's number if left out. A later call with more makes those that `out`
            lacks.
        out: results go to `<out>/<what>/<scale>`: settings, a JSON file for each set of a row, figures, and `page.md`.
        runs: folder of run folders, shared by all reproductions.
        seed: determines everything random.
        checkpoint_every: store the state every so many iterations; 0 for never.
        machine: where the work is done.
        executor: `slurm` or `local` makes each row a job, see `Executor`; left out: one row after another, in this call.
        progress: whether progress is shown.

    Returns:
        The results folder. For a row that fails, it gives the reason; the others continue.

    Raises:
        DstillError: a reproduction, row, case, data set or scale is unknown.

    Example:
        >>> import dstill
        >>> folder = dstill.reproduce("table3", only=["random"], progress=False)
        >>> folder.as_posix(), (folder / "page.md").exists()
        ('results/table3/smoke', True)
    """
    refuse_import("reproduce")
    place = Workplace.of(machine, progress)
    reproduction, settings, rows = chosen(what, scale, only, cases, sets)
    given = {case.data: (sources or {}).get(case.data, case.data) for case in settings.cases}
    reals = {name: apportioned(settings, load_real(source, progress=place.reporter), seed) for name, source in given.items()}
    silent = replace(place, reporter=Silent())
    works = [resolved(settings, row, case, reals[case.data], seed, silent) for case in settings.cases for row in rows]
    folder = Path(out) / what / scale
    write_text(folder / "reproduction.yaml", yamls.dump(canonical(reproduction)))
    missing = [(one, index) for one in works for index in _missing(folder, one)]
    planned = _together([(one, len(_missing(folder, one))) for one in works], what)
    total = sum(one.sets for one in works)
    place.reporter.note(f"{what}, {scale}: about {duration(planned.seconds)} for {len(missing)} of {total} run(s)")
    call = _Call(what, reproduction, scale, folder, Path(runs), checkpoint_every)
    alone = replace(silent, workers=1)  # processes of torchrun cannot be passed on to one of them
    pieces = {one.name(index): (replace(one, job=replace(one.job, place=alone)), index) for one, index in missing}

    def ended(name: str, outcome: Exception | None) -> None:
        if outcome is not None:  # its process has ended
            _write_entry(call, *pieces[name], failure=outcome)
        _write_page(call)

    hands = Hands.of(executor, machine, place, folder)
    check_writable(call.runs)
    there = replace(call, folder=folder.absolute(), runs=call.runs.absolute()) if hands.away else call
    hands.give(functools.partial(_work, there), pieces, ended, [folder, call.runs])
    _write_page(call)
    return folder


def plan_reproduction(
    what: str,
    *,
    scale: ScaleName = "smoke",
    only: Sequence[str] = (),
    cases: Sequence[str] = (),
    sets: int | None = None,
    machine: Machine = Machine(),
) -> Plan:
    """Estimates what a reproduction takes on this machine if nothing exists yet, from a calibration of some seconds.

    No data are loaded; their shapes are taken from the published versions.

    Raises:
        DstillError: a reproduction, row, case or scale is unknown.
    """
    place = Workplace.of(machine, False)
    _, settings, rows = chosen(what, scale, only, cases, sets)
    works = [resolved(settings, row, case, None, 0, place) for case in settings.cases for row in rows]
    return _together([(one, one.sets) for one in works], f"{what} at scale {scale}")


def _together(works: Sequence[tuple[Work, int]], title: str) -> Plan:
    """The plan of some sets of each row. What they share is counted once."""
    plans, clocks = list[Plan](), dict[Shape, Clock]()
    for one, sets in works:
        if sets:
            clock = clocks.setdefault(one.job.shape, Clock(one.job.shape, one.job.place.device))
            made = plan_job(one.job, replace(planned_task(one), sets=sets), clock)
            plans.append(made.model_copy(update={"title": f"{one.row.title}, {one.case}"}))
    return together(plans, title)


def _work(call: _Call, piece: tuple[Work, int], place: Workplace) -> None:
    """Makes one set of a row and writes its file."""
    one, index = piece
    one = replace(one, job=replace(one.job, place=place))
    place.reporter.note(f"{call.what}: {one.row.title}, {one.case}" + (f", set {index}" if index else ""))
    job, folder = one.seeded(index), _run_folder(call, one, index)
    following, looks, failure = list[float](), None, None
    try:
        run_apart(job, folder, task_of(one, call.checkpoint_every), one.request(index))
        if "accumulated_error" in call.reproduction.measures:
            following = _followed(folder / "set-0", job)
        looks = _looks(folder / "set-0", one, job)
    except Exception as error:  # whatever went wrong, the other rows continue
        failure = error
        place.reporter.note(f"{one.name(index)} failed: {reason_of(error)}")
    _write_entry(call, one, index, following, looks, failure)


def _looks(distilled: Path, one: Work, job: Job) -> Looks | None:
    """The looks at the sets that the run has kept; None if it kept none, or if looking fails, which does not undo the run."""
    if one.validation is None:
        return None
    try:
        return look(distilled, job, one.validation, one.options["look_networks"], one.options["networks"])
    except Exception as error:
        job.place.reporter.note(f"{one.row.title}: its sets on the way cannot be measured: {reason_of(error)}")
        return None


def _run_folder(call: _Call, one: Work, index: int) -> Path:
    """The run folder of a set. A set that is only evaluated in another way is not distilled again."""
    distilled = {key: value for key, value in one.request(index).items() if key not in _JUDGING}
    return call.runs / f"{one.case.name}-{one.job.recipe.method}-{digest(distilled)}"


def _write_entry(
    call: _Call,
    one: Work,
    index: int,
    following: Sequence[float] = (),
    looks: Looks | None = None,
    failure: Exception | None = None,
) -> None:
    """Writes the file of a set, and its picture."""
    name, folder = one.name(index), _run_folder(call, one, index)
    drawn = folder / "set-0" / "distilled.png"
    picture = f"{name}.webp" if index == 0 and drawn.exists() else ""
    entry = Entry(
        row=one.row.name,
        case=one.case.name,
        set=index,
        request=one.request(index),
        record=RunRecord.read(folder, 1, failure),
        following=tuple(following),
        looks=looks,
        picture=picture,
        environment=environment(folder, one.job.place.device),
    )
    write_text(call.folder / f"{name}.json", entry.model_dump_json(indent=1, exclude=_not_kept(call.reproduction)) + "\n")
    if picture:
        small_picture(drawn, call.folder / picture)


def _not_kept(reproduction: Reproduction) -> dict[str, Any]:
    """The parts of an entry that its page does not show. For a hundred classes they are larger than all the rest."""
    record: dict[str, Any] = {"result": {"confusion"}}
    return {"record": record if reproduction.figure == "initialisation" else record | {"map": True}}


def small_picture(source: Path, target: Path) -> None:
    """Writes a picture as WebP of at most 400 pixels in width, since a results folder keeps one for every row.

    It is never higher than wide: of a hundred classes of ten images, it shows the first ten.
    """
    with Image.open(source) as image, atomic(target) as temporary:
        first = image.convert("RGB").crop((0, 0, image.width, min(image.height, image.width)))
        first.reduce(-(-image.width // 400)).save(temporary, format="WEBP", quality=75, method=6)


def _followed(distilled: Path, job: Job) -> list[float]:
    """The accumulated error along the first expert that the set was distilled from."""
    named = json.loads((distilled / IDENTITY_NAME).read_text(encoding="utf-8"))["experts"]
    config = job.recipe.expert_config
    trajectories = Trajectories(job.place.cache / "experts" / named, config.count, config.epochs)
    return accumulated_error(DistilledSet.load(distilled), trajectories, 0, job.place.device)


def _missing(folder: Path, one: Work) -> list[int]:
    """Numbers of the sets that do not exist yet."""
    return [index for index in range(one.sets) if not _finished(folder, one, index)]


def _finished(folder: Path, one: Work, index: int) -> bool:
    """Whether the set's file was made by the same request. A failed run is repeated unless it collapsed."""
    path = folder / f"{one.name(index)}.json"
    if not path.exists():
        return False
    entry = Entry.load(path)
    same = entry.request == json.loads(json.dumps(one.request(index)))
    whole = entry.record.result is not None and (one.validation is None or entry.looks is not None)
    return same and (whole or entry.record.collapsed)


def _write_page(call: _Call) -> None:
    """Writes the page and the figures of the rows that exist."""
    reproduction, folder = call.reproduction, call.folder
    rows, cases = reproduction.rows_at(call.scale), reproduction.scales[call.scale].cases
    entries = {(row.name, case.name): found for case in cases for row in rows if (found := _sets(folder, row, case))}
    drawn = [draw(reproduction, case, rows, entries, folder) for case in cases] if reproduction.figure else []
    text = page(call.what, reproduction, call.scale, entries, [name for names in drawn for name in names])
    write_text(folder / "page.md", text)


def _sets(folder: Path, row: Row, case: Case) -> Sets | None:
    """The existing sets of a row, in order, without those that an earlier call made with other settings."""
    name = row_name(row, case, 0)
    found = [Entry.load(path) for path in (*folder.glob(f"{name}.json"), *folder.glob(f"{name}-set*.json"))]
    entries = sorted(found, key=lambda entry: entry.set)
    return Sets([entry for entry in entries if _shared(entry) == _shared(entries[0])]) if entries else None


def _shared(entry: Entry) -> dict[str, Any]:
    """The part of a request that all sets of a row have in common."""
    asked = dict(entry.request)
    seed, expert_seed = asked.pop("seed"), asked.pop("expert_seed", None)
    return {**asked, "seed": seed - entry.set, "expert_seed": seed if expert_seed is None else expert_seed}
