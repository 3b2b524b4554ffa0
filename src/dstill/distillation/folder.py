"""One distillation in its own folder: what is written, and what is reported during the run."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from dstill.artifacts import files, pictures, set_file
from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.artifacts.record import EXPERTS_NAME, FRAMES_NAME, KEPT_NAME, MAP_NAME, RECIPE_NAME, SetRecord
from dstill.artifacts.result import Cost
from dstill.artifacts.run_folder import RunFolder
from dstill.config import recipes
from dstill.config.registry import curve_titles
from dstill.config.settings import Recipe, canonical
from dstill.distillation.loop import Cadence, follow, run_method
from dstill.distillation.sinks import Sink, open_sinks
from dstill.methods.base import Problem, method_class
from dstill.methods.initialisation import initialisation_map
from dstill.reporting import figures
from dstill.support.console import set_sizes, size
from dstill.support.crew import ALONE, Crew
from dstill.support.devices import resident_memory, watching_memory
from dstill.support.mates import together
from dstill.support.progress import Reporter
from dstill.support.workers import Workers, most_workers

_WATCH_EVERY = 100  # iterations


class Watcher:
    """Reports the progress of a distillation to the console, the sinks and the folder of frames.

    Args:
        problem: what is distilled.
        reporter: the console.
        out: the run folder; without one, there are no sinks and no pictures.
        logs: names of sinks.
    """

    def __init__(self, problem: Problem, reporter: Reporter, out: Path | None = None, logs: Sequence[str] = ()) -> None:
        self.reporter, self.out, recipe = reporter, out, problem.recipe
        title = f"{recipe.method}, {problem.real.name}, IPC {recipe.ipc}"
        self.sinks: list[Sink] = open_sinks(logs, out, title, canonical(recipe)) if out and logs else []
        work = recipe.distill.work(ipc=recipe.decoded_ipc, classes=problem.real.classes)
        self.images = recipe.distill.draws * sum(passes.times * passes.images for passes in work if passes.kind != "tangent")
        self.validation = ""
        self.crew: Crew = ALONE
        self.warned = False  # of a process that holds up the others

    def __call__(self, iteration: int, total: int, row: dict[str, float]) -> None:
        if "gradient_cosine" in row:
            cosine = f"{row['gradient_cosine']:.7f}"
            self.reporter.note(f"inexact precision: at the start, cosine {cosine} to the exact gradient of the images")
        if "validation_accuracy" in row:
            self.validation = f"validation {row['validation_accuracy']:.1%}"
        parts = [f"{sign} {row[key]:.4g}" for key, sign in (("loss", "loss"), ("alpha", "α")) if key in row]
        parts += [f"{row['skipped']:.0f} skipped"] if row.get("skipped") else []
        parts += [self.validation] if self.validation else []
        parts += [f"{self.images / row['seconds']:,.0f} images/s"] if row["seconds"] and self.images else []
        parts += [size(memory)] if (memory := resident_memory()) else []
        self.reporter.progress("distilling", iteration + 1, total, "  ".join(parts))
        for sink in self.sinks:
            sink.log(iteration + 1, row)
        if iteration % _WATCH_EVERY == _WATCH_EVERY - 1 and not self.warned and (slow := self.crew.straggler()):
            self.reporter.note(slow)
            self.warned = True

    def picture(self, iteration: int, distilled: DistilledSet) -> None:
        """Stores a picture of the images after an iteration."""
        if self.out is None:
            return
        pictures.save_grid(distilled, self.out / FRAMES_NAME / f"{iteration:07d}.png")
        for sink in self.sinks:
            sink.picture(iteration, pictures.grid(distilled))

    def keep(self, iteration: int, distilled: DistilledSet) -> None:
        """Stores the set after an iteration."""
        if self.out is not None:
            distilled.save(self.out / KEPT_NAME.format(iteration))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self.sinks:
            sink.close()


def distill_into(
    out: Path,
    problem: Problem,
    known: dict[str, Any],
    cadence: Cadence,
    reporter: Reporter,
    logs: Sequence[str] = (),
    workers: Workers = 1,
) -> DistilledSet:
    """Distils into a folder, resuming an interrupted run, and writes the set, its picture and its curves.

    Args:
        out: the folder.
        problem: what is distilled.
        known: what identifies the run before its experts are trained.
        cadence: how often to checkpoint, validate and store pictures.
        reporter: receives progress.
        logs: names of sinks.
        workers: processes that may share the draws of an iteration.

    Raises:
        DstillError: the folder belongs to another run.
    """
    experts = problem.trajectories
    identity = {**known, "experts": experts.identity if experts else None, "expert_count": len(experts) if experts else 0}
    folder = RunFolder(out, identity | identity_of_initial(problem.initial), reporter.note)
    with folder.locked():
        return _distill(folder, problem, cadence, reporter, logs, workers)


def identity_of_initial(initial: DistilledSet | None) -> dict[str, Any]:
    """What identifies the set that a run starts from; nothing for a run that starts from none."""
    if initial is None:
        return {}
    parts = {"initial_parts": initial.parts} if initial.parts > 1 else {}
    return {"initial": files.checksum({"images": initial.images}), **parts}


def run_shared(
    problem: Problem, cadence: Cadence, watcher: Watcher, folder: RunFolder | None = None, workers: Workers = 1
) -> DistilledSet:
    """`run_method` in as many processes as the draws of an iteration occupy, see `processes`."""
    with sharing(problem, workers) as watcher.crew:
        options: dict[str, Any] = {"observer": watcher, "painter": watcher.picture, "keeper": watcher.keep}
        return run_method(problem, folder, cadence=cadence, crew=watcher.crew, **options)


def sharing(problem: Problem, workers: Workers) -> AbstractContextManager[Crew]:
    """The processes that share the draws of a problem, led by this one, see `processes`."""
    return together(follow, problem, processes(problem.recipe, problem.device, workers), workers)


def processes(recipe: Recipe, device: torch.device, workers: Workers) -> int:
    """How many processes share the draws of an iteration: one for each draw, at most `workers`, but one for a card."""
    of_one_card = device.type != "cpu" and isinstance(workers, int | str)
    return 1 if of_one_card else min(recipe.distill.draws, most_workers(workers, device))


def _distill(
    folder: RunFolder, problem: Problem, cadence: Cadence, reporter: Reporter, logs: Sequence[str], workers: Workers
) -> DistilledSet:
    out = folder.path
    finished = out / FILE_NAME
    if finished.exists():
        reporter.note(f"{finished} is finished: nothing to do")
        distilled = replace(set_file.read(finished), preprocess=problem.preprocess)
    else:
        reporter.note(_how(problem))
        _write_beginnings(out, problem)
        with watching_memory(problem.device) as peak_bytes, Watcher(problem, reporter, out, logs) as watcher:
            started = time.perf_counter()
            distilled = run_shared(problem, cadence, watcher, folder, workers)
            # A selection takes no steps. Steps record their own time, including those before an interruption.
            seconds = sum(row["seconds"] for row in folder.metrics()) or time.perf_counter() - started
            Cost(seconds=seconds, peak_bytes=peak_bytes()).save(out)
            distilled.save(out)  # before the sinks are closed, so that their errors cannot lose the set
            reporter.note(f"{finished}: {set_sizes(distilled.stored_bytes, finished.stat().st_size)}")
    settings = out / RECIPE_NAME
    if settings.exists():
        return distilled
    pictures.save_real(problem.real.train, problem.real.classes, out / pictures.REAL_NAME)
    pictures.save_grid(distilled, out / "distilled.png")
    if distilled.parts > 1:
        pictures.save_grid(distilled, out / "stored.png", stored=True)
    pictures.save_animation(sorted((out / FRAMES_NAME).glob("*.png")), out / "distilled.webp")
    title = f"{problem.recipe.method}, {problem.real.name}, IPC {problem.recipe.ipc}"
    if (drawn := figures.run_curves(SetRecord.of(folder.metrics(), curve_titles(problem.recipe.method)), title)) is not None:
        figures.save(drawn, out / "curves.png")
    files.write_text(settings, recipes.dump(problem.recipe))  # last: once it exists, so do the other files
    folder.finish()
    return distilled


def _write_beginnings(out: Path, problem: Problem) -> None:
    """Writes what a report shows about the start of the run: its experts, and how its initial images were chosen."""
    if problem.trajectories is None or (out / EXPERTS_NAME).exists():
        return
    if problem.recipe.distill.starts_from_representatives and problem.initial is None:
        files.write_text(out / MAP_NAME, json.dumps(initialisation_map(problem)) + "\n")
    files.write_text(out / EXPERTS_NAME, json.dumps(problem.trajectories.curves()) + "\n")


def _how(problem: Problem) -> str:
    """How the numbers are computed, in one line."""
    device = problem.device
    where = f"{torch.get_num_threads()} CPU thread(s)" if device.type == "cpu" else str(device)
    engine = method_class(problem.recipe.method).engine(problem)
    return f"distilling on {where}" + (f", {engine}" if engine else "")
