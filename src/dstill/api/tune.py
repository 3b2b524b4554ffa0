"""`tune` searches settings on the validation part, within a time budget."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dstill.api.evaluate import measure_sets
from dstill.artifacts.files import check_writable, write_text
from dstill.artifacts.record import read_metrics
from dstill.config import recipes
from dstill.config.settings import Recipe, canonical, digest
from dstill.data.real import Source
from dstill.distillation.folder import Watcher, run_shared
from dstill.distillation.loop import Cadence
from dstill.errors import CollapseError, DstillError
from dstill.experts.trajectory import Trajectories
from dstill.jobs.checks import check_early, check_experts
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Changes, Choice, Evaluation, Machine, Network
from dstill.support import seeding
from dstill.support.console import Progress
from dstill.support.progress import Reporter, Silent


def tune(
    source: Source,
    *,
    budget: float,
    method: str | type[Any] | None = None,
    ipc: int | None = None,
    recipe: str | Recipe | None = None,
    net: Network | Mapping[str, Any] | None = None,
    distill: Mapping[str, Any] | None = None,
    experts: Mapping[str, Any] | None = None,
    changes: Changes = (),
    out: str | Path | None = None,
    seed: int = 0,
    machine: Machine = Machine(),
    progress: Progress = None,
) -> Path:
    """Searches a method's most important settings, and writes the best recipe found.

    For trajectory matching these are lr_images, T+ and α₀. Candidates are judged on a stratified tenth of the training images,
    on which neither experts nor images are trained; the test set is not used. The first candidate is the recipe itself; the
    others multiply the settings of the best so far by factors. A candidate that collapses is discarded. All candidates are
    recorded beside the recipe, and the same call resumes from there.

    Args:
        source: the real data, see `load_real`.
        budget: minutes of this call; the candidate in progress when they end is finished.
        method: name or class; see `run`, as for the next six.
        ipc: images per class.
        recipe: where to start.
        net: a network instead of the recipe's.
        distill: changes to the section `distill`; `iterations` limits the length of a candidate.
        experts: changes to the section `experts`.
        changes: changes to the recipe.
        out: recipe file to write; `<data>-<method>-ipc<k>.yaml` if left out.
        seed: determines the validation part and the candidates.
        machine: where the work is done.
        progress: whether progress is shown.

    Returns:
        The recipe file, which `--recipe FILE` takes. It is rewritten after every candidate with the best so far;
        `<name>.tried.jsonl` has one line per candidate.

    Raises:
        DstillError: the method has nothing to tune, every candidate collapsed, or whatever `distill` raises.

    Example:
        >>> import dstill, tempfile
        >>> out = tempfile.mkdtemp() + "/tuned.yaml"
        >>> path = dstill.tune("digits", budget=0.001, method="mtt", recipe="smoke", out=out, progress=False)
        >>> dstill.load_recipe(str(path)).method
        'mtt'
    """
    started, place = time.monotonic(), Workplace.of(machine, progress)
    job = Job.resolve(source, Choice(method, ipc, recipe, net, changes, distill, experts), seed, place)
    base, real = job.recipe, job.real
    if not base.distill.search_factors:
        raise DstillError(f"method {base.method!r} names no settings that tune could search: take ast, mtt or rat-bptt")
    target = Path(out) if out else Path(f"{real.name}-{base.method.rpartition(':')[2]}-ipc{base.ipc}.yaml")
    if target.is_dir():
        raise DstillError(f"{target} is a folder: pass the recipe file to write, such as {target / 'tuned.yaml'}")
    check_writable(target.absolute().parent)
    held = job.on(real.holdout(seed))
    check_early(held)
    longest = _longest(base)
    trajectories = held.with_recipe(longest).experts() if held.method.needs_experts else None
    search = _Search(target, held, place.reporter.note)
    clock = _Minutes(place.reporter, started, budget)
    watched = replace(held, place=replace(place, reporter=clock, workers=1))
    place.reporter.note(f"searching for {budget:g} minutes, and until the candidate under way is judged")
    for factors in _candidates(base.distill.search_factors, seed):
        if search.exhausted and time.monotonic() - started > 60 * budget:
            break
        search.consider(factors, longest.distill.epochs_needed, lambda one: _judge(watched.with_recipe(one), trajectories))
    search.finish()
    return target


def _longest(base: Recipe) -> Recipe:
    """The recipe with the largest factors applied, so that its experts are long enough for every candidate."""
    largest = {name: max(factors) for name, factors in base.distill.search_factors.items()}
    limit = base.experts.epochs if base.experts else None
    return base.model_copy(update={"distill": base.distill.scaled(largest, limit)})


class _Minutes(Silent):
    """Tells the minutes of the search, whatever a candidate tells of itself.

    Args:
        reporter: is told.
        started: when the search began, by `time.monotonic`.
        budget: its length in minutes.
    """

    def __init__(self, reporter: Reporter, started: float, budget: float) -> None:
        self.reporter, self.started, self.budget = reporter, started, budget

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        minutes = min(self.budget, (time.monotonic() - self.started) / 60)
        self.reporter.progress("minutes of the search", minutes, self.budget, f"{stage} {math.floor(done)}/{math.ceil(total)}")


class _Search:
    """The candidates so far, and the best of them.

    Args:
        target: the recipe file to write.
        held: the job on the part of the data from which candidates are distilled.
        note: called with a line on every candidate.
    """

    def __init__(self, target: Path, held: Job, note: Callable[[str], None]) -> None:
        self.target, self.name, self.note, self.tried = target, held.name, note, 0
        self.best, self.best_score = held.recipe, float("-inf")
        known = {"recipe": canonical(held.recipe, exclude={"note"}), "data": held.real.fingerprint, "seed": held.seeds.images}
        self.journal = _Journal(target, known)
        if self.journal.rows:
            note(f"{self.journal.path} has {len(self.journal.rows)} candidates of this search: it resumes from there")

    @property
    def exhausted(self) -> bool:
        """Whether all candidates of earlier calls have been read again, and there was at least one."""
        return self.tried >= max(1, len(self.journal.rows))

    def consider(self, factors: Mapping[str, float], longest: int | None, judge: Callable[[Recipe], float | None]) -> None:
        """Tries one more candidate: first the recipe itself, then the best so far with its settings multiplied.

        If an earlier call tried the candidate, its score is read. T+ stays within experts of `longest` epochs.
        """
        settings = self.best
        if self.tried:
            settings = settings.model_copy(update={"distill": settings.distill.scaled(factors, longest)})
        known = self.tried < len(self.journal.rows)
        score = self.journal.rows[self.tried]["score"] if known else judge(settings)
        self.tried += 1
        leads = score is not None and score > self.best_score
        if score is not None and leads:
            self.best, self.best_score = settings, score
        if known:
            return
        self.journal.add(settings, score)
        said = "collapsed" if score is None else f"validation {score:.1%}{' (best so far)' if leads else ''}"
        self.note(f"candidate {self.tried}: {_named(settings)}: {said}")
        if self.best_score >= 0:
            self._write()

    def finish(self) -> None:
        """Writes the best recipe again, since an earlier call may have been interrupted before writing it.

        Raises:
            DstillError: every candidate collapsed.
        """
        if self.best_score < 0:
            raise DstillError(
                f"all of {self.tried} candidates collapsed: start from a smaller distill.lr_images, or give a larger --budget"
            )
        self._write()
        self.note(f"wrote {self.target}: pass it as --recipe {self.target}")

    def _write(self) -> None:
        before = f"{self.best.note}; " if self.best.note else ""
        note = f"{before}tuned on the validation part: {self.best_score:.1%}, best of {self.tried} candidates"
        write_text(self.target, recipes.dump(self.best.model_copy(update={"data": self.name, "note": note})))


class _Journal:
    """The candidates tried, one line each, beside the recipe, so that an interrupted search loses none of them.

    Candidates depend only on the seed. The stored scores of a search are therefore those of its first candidates.
    """

    def __init__(self, target: Path, search: dict[str, Any]) -> None:
        self.path, self.search = target.with_suffix(".tried.jsonl"), digest(search)
        found = read_metrics(self.path)
        self.rows = [row for row in found if row.get("search") == self.search]
        self._others = [row for row in found if row.get("search") != self.search]

    def add(self, settings: Recipe, score: float | None) -> None:
        """Appends a candidate."""
        self.rows.append({"search": self.search, "tried": _named(settings), "score": score})
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (*self._others, *self.rows)))


def _named(settings: Recipe) -> str:
    """The searched settings of a candidate, as text."""
    values = {name: getattr(settings.distill, name) for name in settings.distill.search_factors}
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def _candidates(choices: Mapping[str, tuple[float, ...]], seed: int) -> Iterator[dict[str, float]]:
    """Yields factors for the searched settings without end, drawn independently. The first ones are ignored."""
    generator = seeding.generator(seed, "tune")
    while True:
        yield {name: some[int(torch.randint(len(some), (), generator=generator))] for name, some in choices.items()}


def _judge(job: Job, trajectories: Trajectories | None) -> float | None:
    """The accuracy on the validation part; None if the run collapses."""
    experts = None
    if trajectories is not None:
        # No longer than the experts of the final recipe: the initialisation uses the features of their last epoch.
        experts = Trajectories(trajectories.folder, len(trajectories), job.recipe.expert_config.epochs)
        check_experts(experts, job)
    try:
        problem = job.problem(job.seeds.images, experts)
        candidate = run_shared(problem, Cadence(), Watcher(problem, job.place.reporter), workers=job.place.workers)
        if not bool(torch.isfinite(candidate.images).all()):
            return None
        return measure_sets([candidate], job.real, job.place, Evaluation(random=False), job.seeds.images).accuracy.mean
    except CollapseError:
        return None
