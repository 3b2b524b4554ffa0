"""`plan` estimates what a run takes: time, memory and disk, stage by stage."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from dstill.config.settings import ExpertConfig, NetConfig, Passes, Recipe, digest
from dstill.data import formation
from dstill.data.catalog import Shape, named
from dstill.data.real import Source
from dstill.distillation.folder import processes
from dstill.errors import DstillError
from dstill.evaluation.protocols import load_protocol
from dstill.experts.train import expert_identity
from dstill.experts.trajectory import missing_experts
from dstill.jobs.checks import check_early
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Changes, Choice, Evaluation, Machine, Network, Recording, Seeds, at_least_one
from dstill.methods.base import method_class
from dstill.methods.unrolling_method import at_once
from dstill.nets import networks as nets
from dstill.planning.clock import Clock
from dstill.planning.evaluating import Measured, evaluation_stages, image_bytes, network_seconds
from dstill.planning.stages import Plan, Stage
from dstill.support.console import Progress
from dstill.support.devices import available_memory
from dstill.support.workers import most_workers, threads_each

_GIB = 2**30
_BASE = 32 * 2**20  # memory that the libraries take once they run


def plan(
    source: Source,
    *,
    method: str | type[Any] | None = None,
    ipc: int | None = None,
    recipe: str | Recipe | None = None,
    net: Network | Mapping[str, Any] | None = None,
    distill: Mapping[str, Any] | None = None,
    experts: Mapping[str, Any] | None = None,
    changes: Changes = (),
    sets: int = 1,
    seed: int | Seeds = 0,
    evaluation: Evaluation = Evaluation(),
    recording: Recording = Recording(),
    machine: Machine = Machine(),
    progress: Progress = None,
) -> Plan:
    """Estimates what `run` with the same arguments would take on this machine, from a calibration of some seconds.

    Data of a name that `dstill ls datasets` knows are not loaded, unless a path has that name; the plan then assumes that
    nothing is cached.

    Args:
        source: see `run`, as for all that follow.
        method: name or class.
        ipc: images per class.
        recipe: name, file or `Recipe`.
        net: a network instead of the recipe's.
        distill: changes to the section `distill`.
        experts: changes to the section `experts`.
        changes: changes to the recipe.
        sets: synthetic sets.
        seed: seed of the experts, which may be cached.
        evaluation: how the sets are measured.
        recording: what is recorded while distilling.
        machine: where the work would be done.
        progress: whether progress is shown.

    Returns:
        The stages of the run, and warnings.

    Raises:
        DstillError: whatever `run` would refuse at once.

    Example:
        >>> import dstill
        >>> plan = dstill.plan("digits", method="dm", recipe="smoke", progress=False)
        >>> [stage.name for stage in plan.stages]
        ['distilling', 'evaluation', 'random images']
    """
    choice = Choice(method, ipc, recipe, net, changes, distill, experts)
    place = Workplace.of(machine, progress)
    entry = named(source) if isinstance(source, str) else None
    known = entry.shape if entry is not None and entry.hub else None  # else they are loaded
    job, task = Job.resolve(source, choice, seed, place, shape=known), Task(sets, evaluation, recording)
    at_least_one(sets=sets, networks=evaluation.networks)
    formation.check_parts(job.shape.size, job.recipe.distill.parts)
    if job.data is not None:
        check_early(job, evaluation)
    elif job.recipe.decoded_ipc * job.shape.classes > job.shape.train:
        each = job.shape.train // job.shape.classes
        raise DstillError(f"{job.name} has {each} training images per class, fewer than {job.recipe.decoded_ipc}")
    return plan_job(job, task, Clock(job.shape, place.device))


def together(plans: Sequence[Plan], title: str) -> Plan:
    """Several runs as one plan, one stage per run. What they share is counted once."""
    made: set[str] = set()
    stages = []
    for one in plans:
        new = [stage for stage in one.stages if not stage.makes or stage.makes not in made]
        made |= {stage.makes for stage in new}
        seconds, disk = sum(stage.seconds for stage in new), sum(stage.disk_bytes for stage in new)
        stages.append(Stage(name=one.title, seconds=seconds, peak_bytes=one.peak_bytes, disk_bytes=disk))
    warnings = dict.fromkeys(warning for one in plans for warning in one.warnings)
    return Plan(title=title, stages=tuple(stages), warnings=tuple(warnings))


def plan_job(job: Job, task: Task, clock: Clock, until: Literal["experts", "distilling", "evaluation"] = "evaluation") -> Plan:
    """The plan of a resolved run, or of its stages up to one of them. Its data need not be loaded."""
    stages = _experts(job, task, clock)
    if until != "experts":
        stages += [*_trained(job, clock), *_distilling(job, task, clock)]
    if until == "evaluation":
        stages += _evaluating(job, task, clock)
    title = f"{job.recipe.method} on {job.recipe.data}, {job.recipe.ipc} image(s) per class"
    return Plan(title=title, stages=tuple(stages), warnings=tuple(_warnings(stages, job)))


def _experts(job: Job, task: Task, clock: Clock) -> list[Stage]:
    if not job.method.needs_experts:
        return []
    shape, recipe, config = job.shape, job.recipe, job.recipe.expert_config
    assert config.epochs is not None
    given = task.experts
    epochs = dict.fromkeys(range(config.count), config.epochs) if given is None else {}
    longer = None if task.initial is not None else recipe.describing_expert(config.epochs if given is None else given.epochs)
    if longer is not None and longer.epochs is not None:
        epochs[0] = longer.epochs
    if not epochs:
        return []
    missing = _missing(job, config, epochs)
    processes = max(1, min(most_workers(job.place.workers, job.place.device), len(missing)))
    rounds = max(sum(missing) / processes, max(missing, default=0))  # epochs one after another
    # The records, and the network with its optimiser's buffers, from which training resumes.
    state = {"adam": 3, "sgd": 2 if config.momentum else 1}[config.optimiser]
    disk = sum((count + 1) * (4 if config.store == "float32" else 2) + 4 * state for count in missing)
    stage = Stage(
        name="experts",
        told="expert epochs",
        seconds=rounds * _seconds_per_epoch(job, config, clock, threads_each(processes)) if missing else 0.0,
        peak_bytes=processes * (shape.train + shape.test) * image_bytes(shape) if missing else 0,
        disk_bytes=disk * _parameters(recipe.net, shape),
        note=_expert_note(config, longer, epochs, missing),
        makes=_named("experts", recipe, [epochs[0], config.model_dump(exclude={"count"})]),
    )
    return [stage]


def _seconds_per_epoch(job: Job, config: ExpertConfig, clock: Clock, threads: int) -> float:
    shape, recipe = job.shape, job.recipe
    steps = math.ceil(shape.train / config.batch_size)
    augmented = clock.training(recipe.net, config.batch_size, recipe.augmentation, threads)
    plain = clock.training(recipe.net, config.batch_size, "none", threads)
    step = clock.expert(recipe.net, config, threads) + max(0.0, augmented - plain)
    return steps * step + clock.passes(recipe.net, Passes("forward", 1, shape.test))


def _expert_note(config: ExpertConfig, longer: ExpertConfig | None, epochs: Mapping[int, int], missing: Sequence[int]) -> str:
    described = longer is not None and longer.epochs in missing
    parts = [f"1 of {epochs[0]} epochs for the initialisation"] if described else []
    rest = len(missing) - described
    parts += [f"{rest} of {config.epochs} epochs"] if rest or not parts else []
    parts += [f"{len(epochs) - len(missing)} are cached"] if len(missing) < len(epochs) else []
    return ", ".join(parts)


def _missing(job: Job, config: ExpertConfig, epochs: Mapping[int, int]) -> list[int]:
    """Numbers of epochs of the experts that the cache lacks."""
    if job.data is None:
        return list(epochs.values())
    recipe, seed = job.recipe, job.seeds.experts
    identity = expert_identity(job.data.fingerprint, recipe.preprocess, recipe.net, config, recipe.augmentation, seed)
    folder = job.place.cache / "experts" / digest(identity)
    return [count for index, count in epochs.items() if missing_experts(folder, [index], count)]


def _trained(job: Job, clock: Clock) -> list[Stage]:
    if job.method.needs != "trained network":
        return []
    shape, recipe, config = job.shape, job.recipe, job.recipe.distill.network_training
    count = recipe.distill.network_count
    seconds = count * network_seconds(recipe.net, config, clock)
    memory, disk = shape.train * image_bytes(shape), count * (4 * _parameters(recipe.net, shape) + 8 * shape.train)
    many = f"{count} of {config.epochs} epochs, none if they are cached"
    note = many if count > 1 else f"{config.epochs} epochs, none if it is cached"
    makes = _named("network", recipe, [count, config.model_dump()])
    return [
        Stage(
            name="trained network",
            told="network epochs",
            seconds=seconds,
            peak_bytes=memory,
            disk_bytes=disk,
            note=note,
            makes=makes,
        )
    ]


def _named(kind: str, recipe: Recipe, settings: Any = None) -> str:
    """A name that is the same for all runs that share the product of a stage."""
    shared = {"data": recipe.data, "net": recipe.net.model_dump(), "preprocess": recipe.preprocess, "settings": settings}
    return f"{kind}-{digest({**shared, 'augmentation': recipe.augmentation})}"


def _distilling(job: Job, task: Task, clock: Clock) -> list[Stage]:
    distill, shape, recipe, sets = job.recipe.distill, job.shape, job.recipe, task.sets
    count, stored = recipe.decoded_ipc * shape.classes, recipe.ipc * shape.classes * image_bytes(shape)
    stages: list[Stage] = []
    if distill.iterations:
        work = distill.work(ipc=recipe.decoded_ipc, classes=shape.classes)
        several = processes(recipe, job.place.device, job.place.workers)
        threads, rounds = threads_each(several) if several > 1 else None, math.ceil(distill.draws / several)
        seconds = sets * distill.iterations * rounds * sum(clock.passes(recipe.net, passes, threads) for passes in work)
        beside = at_once(job.place.streams, rounds)
        memory = several * (_BASE + method_class(recipe.method).peak_bytes(recipe, shape, job.place.device, beside))
        note = f"{distill.iterations} iterations" + (f" of {distill.draws} draws" if distill.draws > 1 else "")
        note += (f" in {several} processes" if several > 1 else "") + (f", {sets} sets" if sets > 1 else "")
        disk = sets * 3 * stored
        stages.append(Stage(name="distilling", seconds=seconds, peak_bytes=memory, disk_bytes=disk, note=note, times=sets))
    if distill.iterations and task.recording.validate_every:
        looks = math.ceil(distill.iterations / task.recording.validate_every)
        step = clock.training(recipe.net, min(count, 256), recipe.augmentation, torch.get_num_threads())
        one = load_protocol("quick").passes * math.ceil(count / 256) * step
        judging = clock.passes(recipe.net, Passes("forward", 1, shape.train // 10))
        held = shape.train // 10 * image_bytes(shape)
        seconds = sets * looks * (one + judging)
        note = f"measured {looks} times per set"
        stages.append(Stage(name="validation", seconds=seconds, peak_bytes=held, disk_bytes=0, note=note))
    return stages


def _evaluating(job: Job, task: Task, clock: Clock) -> list[Stage]:
    recipe, protocol = job.recipe, load_protocol(job.recipe.protocol)
    measured = Measured(recipe.net, recipe.augmentation, recipe.ipc, recipe.decoded_ipc, task.sets)
    stages = evaluation_stages(measured, protocol, task.evaluation, clock, most_workers(job.place.workers, job.place.device))
    each = task.evaluation.networks or protocol.networks
    shared = {
        "random images": _named("random", recipe, [recipe.ipc, recipe.protocol, each]),
        "whole set": _named("whole", recipe),
    }
    return [one.model_copy(update={"makes": shared.get(one.name, "")}) for one in stages]


def _parameters(net: NetConfig, shape: Shape) -> int:
    network = nets.build(net, shape.channels, shape.classes, shape.size, torch.Generator())
    return sum(parameter.numel() for parameter in network.parameters())


def _warnings(stages: Sequence[Stage], job: Job) -> list[str]:
    found = []
    folder = next(path for path in (job.place.cache, *job.place.cache.parents) if path.exists())
    disk, free = sum(stage.disk_bytes for stage in stages) / _GIB, shutil.disk_usage(folder).free / _GIB
    if disk > free:
        found.append(f"{disk:.1f} GiB of disk are needed, {free:.1f} GiB are free at {folder}: pass another --cache")
    memory, at_hand = max((stage.peak_bytes for stage in stages), default=0) / _GIB, available_memory(job.place.device) / _GIB
    if memory > at_hand:
        found.append(f"{memory:.1f} GiB of memory are needed, {at_hand:.1f} GiB are free: lower batch_syn, width or workers")
    return found
