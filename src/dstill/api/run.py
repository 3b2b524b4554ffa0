"""`train_experts`, `distill`, and `run`, which does everything."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstill.api import findings
from dstill.api.budgeted import Budgeted, leaves_choice, with_method
from dstill.api.evaluate import measure_sets
from dstill.api.rivals import best_of, can_compete, candidate
from dstill.artifacts import files, set_file, whitening
from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.artifacts.record import METRICS_NAME, RESULT_NAME, Curve, DataSource, read_metrics
from dstill.artifacts.result import Claim, Cost, Result
from dstill.artifacts.run_folder import refuse_other_run
from dstill.config.settings import Recipe
from dstill.data.real import Source
from dstill.distillation.folder import Watcher, distill_into, identity_of_initial, run_shared
from dstill.distillation.loop import Cadence
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories
from dstill.jobs.checks import check_early, check_experts
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Budget, Changes, Choice, Evaluation, Machine, Network, Recording, Seeds, at_least_one
from dstill.planning.announce import announce
from dstill.reporting.page import REPORT_NAME, report
from dstill.support.console import Progress


def train_experts(
    source: Source,
    *,
    method: str | type[Any] | None = None,
    ipc: int | None = None,
    recipe: str | Recipe | None = None,
    net: Network | Mapping[str, Any] | None = None,
    experts: Mapping[str, Any] | None = None,
    changes: Changes = (),
    seed: int | Seeds = 0,
    only: Sequence[int] | None = None,
    machine: Machine = Machine(),
    progress: Progress = None,
) -> Trajectories:
    """Trains the expert trajectories that a recipe needs and the cache lacks.

    Args:
        source: the real data, see `load_real`.
        method: name or class; see `run`, as for all that follow.
        ipc: images per class.
        recipe: name, file or `Recipe`.
        net: a network instead of the recipe's.
        experts: changes to the section `experts`, such as `{"count": 4}`.
        changes: changes to the recipe.
        seed: expert i depends only on the seed and on i.
        only: train only these experts, to split the work between machines.
        machine: where the work is done.
        progress: whether progress is shown.

    Returns:
        The trajectories. After an interruption, the same call trains only the missing experts.

    Raises:
        DstillError: the method needs no experts, or whatever `run` would refuse at once.

    Example:
        >>> import dstill
        >>> short = {"experts": {"count": 1}, "changes": {"net.width": 4}}
        >>> experts = dstill.train_experts("digits", recipe="smoke", **short, progress=False)
        >>> len(experts), experts.epochs
        (1, 3)
    """
    job = Job.resolve(source, Choice(method, ipc, recipe, net, changes, None, experts), seed, Workplace.of(machine, progress))
    if job.recipe.experts is None and not job.method.needs_experts:
        raise DstillError(f"method {job.recipe.method!r} needs no experts")
    check_early(job)
    announce(job, Task(), until="experts")
    return job.experts(only=only)


def distill(
    source: Source,
    *,
    method: str | type[Any] | None = None,
    ipc: int | None = None,
    recipe: str | Recipe | None = None,
    net: Network | Mapping[str, Any] | None = None,
    distill: Mapping[str, Any] | None = None,
    experts: Trajectories | str | Path | Mapping[str, Any] | None = None,
    changes: Changes = (),
    init: DistilledSet | str | Path | None = None,
    out: str | Path | None = None,
    minutes: float | Budget | None = None,
    seed: int | Seeds = 0,
    recording: Recording = Recording(),
    machine: Machine = Machine(),
    progress: Progress = None,
) -> DistilledSet:
    """Distils a real image set.

    Args:
        source: the real data, see `load_real`.
        method: name or class; see `run`, as for all that follow.
        ipc: images per class.
        recipe: name, file or `Recipe`.
        net: a network instead of the recipe's.
        distill: changes to the section `distill`, such as `{"iterations": 300}`.
        experts: trajectories or their folder; or changes to the section `experts`. Without trajectories, the recipe's are
            used, and trained if the cache lacks them.
        changes: changes to the recipe.
        init: a set, its file, its folder or the folder of its run, to start from instead of the recipe's initialisation.
        out: folder for metrics, checkpoints, pictures and the set. A call with the same arguments resumes there.
        minutes: time of the whole call, see `run`.
        seed: determines the initial images and all draws.
        recording: what is recorded while distilling.
        machine: where the work is done.
        progress: whether progress is shown.

    Returns:
        The distilled set.

    Raises:
        DstillError: whatever the user can put right, in a sentence.

    Example:
        >>> import dstill
        >>> dstill.distill("digits", method="random", recipe="smoke", progress=False)
        DistilledSet('random' of 'digits', 10 images of 1x8x8, 10 classes)
    """
    settings, given = (experts, None) if isinstance(experts, Mapping) else (None, experts)
    budget, place = Budget.of(minutes), Workplace.of(machine, progress)
    choice = Choice(method, ipc, recipe, net, changes, distill, settings)
    if chooses := leaves_choice(choice, budget):
        choice, source = with_method(choice, source, place)
    job = Job.resolve(source, choice, seed, place)
    task = Task(recording=recording, budget=budget, chooses=chooses, initial=_initial(job, init), experts=_given(job, given))
    validates = recording.validate_every > 0
    check_early(job, logs=recording.logs, own_experts=given is None, validates=validates, initial=task.initial)
    files.check_writable(job.place.cache)
    folder = None if out is None else Path(out)
    if budget is not None:
        return _distilled_within(job, task, budget, folder)
    if folder is not None:
        _refuse_other(folder, job, job.seeds.images, task)
        files.check_writable(folder)
    announce(job, task, until="distilling", done=_done(folder, job))
    return _distilled(job, job.seeds.images, _trajectories(job, task), task, folder)


def _initial(job: Job, init: DistilledSet | str | Path | None) -> DistilledSet | None:
    """The set to start from, with its whitening."""
    given = set_file.read(init) if isinstance(init, str | Path) else init
    return None if given is None else whitening.completed(given, job.real, job.place.cache)


def _refuse_other(folder: Path, job: Job, seed: int, task: Task) -> None:
    """Checks whether a folder belongs to another run, before the experts are trained."""
    refuse_other_run(folder, {**job.identity(seed), "initial": None, **identity_of_initial(task.initial)})


def _given(job: Job, experts: Trajectories | str | Path | None) -> Trajectories | None:
    """The trajectories that are given in place of the recipe's.

    Raises:
        DstillError: the method uses none.
    """
    if experts is not None and not job.method.needs_experts:
        raise DstillError(f"method {job.recipe.method!r} uses no experts: leave them out, or name one that does (method ast)")
    return Trajectories(Path(experts)) if isinstance(experts, str | Path) else experts


def _distilled_within(job: Job, task: Task, budget: Budget, folder: Path | None) -> DistilledSet:
    """Distils one set within a budget, with or without a folder."""
    if folder is not None:
        files.check_writable(folder)
    budgeted = Budgeted(job, budget, task, folder, "distilling")
    job, seed = job.with_recipe(budgeted.recipe), job.seeds.images
    trajectories = _trajectories(job, task)
    job = job.with_recipe(budgeted.settle(job.problem(seed, trajectories, task.initial)))
    distilled = _distilled(job, seed, trajectories, task, folder, budgeted.until(1))
    if folder is not None:
        budgeted.tell_if_cut(folder)
    return distilled


def _trajectories(job: Job, task: Task) -> Trajectories | None:
    """The given experts, or else the job's own; None if the method needs none."""
    if task.experts is not None:
        check_experts(task.experts, job)
        return task.experts
    return job.experts(describing=task.initial is None) if job.method.needs_experts else None


def _distilled(
    job: Job,
    seed: int,
    trajectories: Trajectories | None,
    task: Task,
    out: Path | None,
    until: float = math.inf,
) -> DistilledSet:
    """Distils one set, with or without a folder."""
    recording = task.recording
    problem, reporter = job.problem(seed, trajectories, task.initial), job.place.reporter
    cadence = Cadence(
        checkpoint=recording.checkpoint_every,
        validate=recording.validate_every,
        picture=recording.picture_every if out else 0,
        keep=recording.keep_every if out else 0,
        until=until,
    )
    if out is None:
        return run_shared(problem, cadence, Watcher(problem, reporter), workers=job.place.workers)
    distilled = distill_into(out, problem, job.identity(seed), cadence, reporter, recording.logs, job.place.workers)
    if job.real.read_as:
        DataSource.of(job.real.read_as).save(out)
    return distilled


def run(
    source: Source,
    *,
    method: str | type[Any] | None = None,
    ipc: int | None = None,
    recipe: str | Recipe | None = None,
    net: Network | Mapping[str, Any] | None = None,
    distill: Mapping[str, Any] | None = None,
    experts: Mapping[str, Any] | None = None,
    changes: Changes = (),
    init: DistilledSet | str | Path | None = None,
    out: str | Path | None = None,
    sets: int = 1,
    minutes: float | Budget | None = None,
    seed: int | Seeds = 0,
    evaluation: Evaluation = Evaluation(),
    recording: Recording = Recording(),
    machine: Machine = Machine(),
    progress: Progress = None,
) -> Result:
    """Trains experts, distils, evaluates and reports. After an interruption, the same call resumes where it stopped.

    Args:
        source: the real data: a name, a path, arrays, or a `RealSet`; see `load_real`.
        method: a name of `dstill ls methods`, or a class of your own; it must agree with the recipe's. `ast` if
            neither is given.
        ipc: images per class; the recipe's if left out, or 1 without a recipe.
        recipe: a name of `dstill ls recipes`, a YAML file, or a `Recipe`; `smoke` for a run of seconds. Left out: the data
            set's own recipe, or else settings derived from the nearest one.
        net: a network instead of the recipe's, with its own defaults: a name of `dstill ls networks`, `timm:NAME`, a class
            or a function that makes one, your `package.module:Class`, or a mapping with `name` and options.
        distill: changes to the section `distill` of the recipe, such as `{"iterations": 300}`.
        experts: changes to the section `experts`, such as `{"count": 4}`.
        changes: changes to any part of the recipe: a mapping, nested or with dotted keys, such as
            `{"preprocess": "zca", "net.width": 32}`, or assignments such as `["net.width=32"]`.
        init: a set, its file, its folder or the folder of its run, to start from instead of the recipe's initialisation.
        out: run folder; `runs/<data>-<method>-ipc<k>-seed<s>` if left out. It gets `result.json`, `report.html`, and in
            `set-<k>/` the distilled set, its picture, its metrics and its curves.
        sets: synthetic sets to distil, with seeds `seed`, `seed + 1` …, from the same experts.
        minutes: time of the whole call. Whatever is not set is then chosen so that it ends in time: method, network, experts,
            iterations, evaluation. If no method is named, coresets compete with the set on a part of the training images
            that is set aside, and the best is handed out; but not with `init`, which may have seen these images. The choice is
            stored in the run folder.
        seed: determines everything random; `Seeds` if the experts have another one.
        evaluation: how the sets are measured.
        recording: what is recorded while distilling.
        machine: where the work is done.
        progress: whether progress is shown: None shows it on a terminal and in a notebook; a `Reporter` receives it.

    Returns:
        The result, as in `result.json`.

    Raises:
        DstillError: whatever the user can put right, in a sentence.

    Example:
        >>> import dstill, tempfile
        >>> once = dstill.Evaluation(networks=1, random=False)
        >>> options = {"recipe": "smoke", "evaluation": once, "progress": False}
        >>> result = dstill.run("digits", method="random", out=tempfile.mkdtemp(), **options)
        >>> result.method, result.ipc, result.accuracy.n
        ('random', 1, 1)
    """
    started = time.perf_counter()
    budget, place = Budget.of(minutes), Workplace.of(machine, progress)
    choice = Choice(method, ipc, recipe, net, changes, distill, experts)
    if chooses := leaves_choice(choice, budget):
        choice, source = with_method(choice, source, place)
    job = Job.resolve(source, choice, seed, place)
    usual = job.folder if budget is None else job.folder_within(budget.minutes, named=not chooses)
    # A set to start from may have seen the images on which coresets would compete.
    rivals = chooses and sets == 1 and init is None and can_compete(job)
    task = Task(sets, evaluation, recording, budget, chooses, rivals, _initial(job, init))
    return run_job(job, usual if out is None else Path(out), task, started)


def run_job(job: Job, folder: Path, task: Task, started: float | None = None) -> Result:
    """`run` for a resolved job.

    Args:
        job: the job to run.
        folder: the run folder.
        task: what is done with the job.
        started: when the call began, so that loading the data counts.
    """
    started = time.perf_counter() if started is None else started
    evaluation, recording = task.evaluation, task.recording
    at_least_one(sets=task.sets, networks=evaluation.networks)
    check_early(job, evaluation, recording.logs, validates=recording.validate_every > 0, initial=task.initial)
    if task.budget is not None:
        return _run_within(job, folder, task, task.budget, started)
    seeds = _set_seeds(job, task)
    for k, seed in enumerate(seeds):
        _refuse_other(folder / f"set-{k}", job, seed, task)
    _open(folder, job)
    announce(job, task, done=statistics.fmean(_done(folder / f"set-{k}", job) for k in range(task.sets)))
    trajectories = _trajectories(job, task)
    trained = time.perf_counter()
    sets = [_distilled(job, seed, trajectories, task, folder / f"set-{k}") for k, seed in enumerate(seeds)]
    return _concluded(sets, job, folder, task, started, trained)


def _done(folder: Path | None, job: Job) -> float:
    """The share of a distillation that an earlier call has done."""
    if folder is None or not job.recipe.distill.iterations:
        return 0.0
    finished = (folder / FILE_NAME).exists()
    return 1.0 if finished else min(1.0, len(read_metrics(folder / METRICS_NAME)) / job.recipe.distill.iterations)


def _set_seeds(job: Job, task: Task) -> list[int]:
    return [job.seeds.images + k for k in range(task.sets)]


def _open(folder: Path, job: Job) -> None:
    files.check_writable(folder)
    files.check_writable(job.place.cache)
    job.place.reporter.note(f"run folder: {folder}")


def _run_within(job: Job, folder: Path, task: Task, budget: Budget, started: float) -> Result:
    """A run within a budget. If coresets compete, they are compared on training images that are set aside before."""
    _open(folder, job)
    budgeted = Budgeted(job, budget, task, folder)
    chosen, competes = job.with_recipe(budgeted.recipe), bool(budgeted.chosen.offer.rivals.methods)
    work = chosen.on(job.real.holdout(job.seeds.images)) if competes else chosen
    trajectories = _trajectories(work, task)
    work = work.with_recipe(budgeted.settle(work.problem(job.seeds.images, trajectories, task.initial)))
    trained, sets = time.perf_counter(), list[DistilledSet]()
    for k, seed in enumerate(_set_seeds(job, task)):
        target = candidate(folder, work.recipe.method) if competes else folder / f"set-{k}"
        until = budgeted.until(task.sets - k)
        sets.append(_distilled(work, seed, trajectories, task, target, until))
        budgeted.tell_if_cut(target)
    if competes:
        sets = [best_of(sets[0], work, budgeted.rivals(), folder, job.real)]
    return _concluded(sets, chosen, folder, budgeted.task(), started, trained)


def _concluded(sets: list[DistilledSet], job: Job, folder: Path, task: Task, started: float, trained: float) -> Result:
    """Measures the sets, stores them with the claim that results, and writes the report."""
    matched, reporter = time.perf_counter(), job.place.reporter
    result = measure_sets(sets, job.real, job.place, task.evaluation, job.seeds.images)
    stages = {"experts": trained - started, "distill": matched - trained, **result.stages}
    cost = Cost.load(folder / "set-0")
    sets = [one.with_accuracy(Claim.of(result)) for one in sets]
    known = {"stages": stages, "cost": cost, "file_bytes": sets[0].file_bytes}
    result = result.model_copy(update={"seconds": time.perf_counter() - started, **known})
    result.save(folder / RESULT_NAME)
    for k, one in enumerate(sets):
        one.save(folder / f"set-{k}")
    reporter.note(f"report: {report([folder], folder / REPORT_NAME)}")
    for line in findings.of_run(result, Curve.of(read_metrics(folder / "set-0" / METRICS_NAME), "validation_accuracy")):
        reporter.note(line)
    return result
