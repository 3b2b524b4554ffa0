"""The public function that says beforehand what a run takes: time, memory and disk, stage by stage."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from dstill.api.job import at_least_one, cache_folder, check_early, resolve_for, shape_of
from dstill.config.registry import method_info
from dstill.config.settings import ExpertConfig, NetConfig, Passes, Recipe, TrainingConfig, digest, evaluation_nets
from dstill.data.catalog import DATASETS, Shape
from dstill.data.real import RealSet, load_real
from dstill.errors import DstillError
from dstill.evaluation.baselines import RANDOM_DRAWS, RANDOM_RATES
from dstill.evaluation.protocols import load_protocol
from dstill.experts.train import expert_identity
from dstill.experts.trajectory import missing_experts
from dstill.methods.settings import MatchingConfig, SelectionConfig
from dstill.nets import networks as networks_table
from dstill.planning.clock import Clock
from dstill.support.console import Reporter, Silent
from dstill.support.devices import available_memory, resolve_device
from dstill.support.workers import Workers, cores, threads_each
from dstill.unrolling.student import Student
from dstill.unrolling.unroll import KEPT_SHARE

_FLOATS = 4  # bytes
_GIB = 2**30
_BASE = 32 * 2**20  # what the libraries take for themselves as soon as they work


class Stage(BaseModel):
    """What one part of a run takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seconds: float
    peak_bytes: float
    """Growth of the memory while it lasts."""
    disk_bytes: float
    """What it leaves behind."""
    note: str = ""
    makes: str = ""
    """Names what it makes where other runs can use that, too."""


class Plan(BaseModel):
    """The stages of a run, in order, and what stands against it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    stages: tuple[Stage, ...]
    warnings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk_bytes(self) -> float:
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> float:
        return max((stage.peak_bytes for stage in self.stages), default=0.0)


class Given(NamedTuple):
    """What a plan is made for.

    Attributes:
        shape: the real data's.
        real: the real data, where they are at hand: what is cached for them costs nothing.
        device: where it will run.
        cache: folder of experts.
        processes: how many share the work that can be shared.
    """

    shape: Shape
    real: RealSet | None
    device: torch.device
    cache: Path
    processes: int


def plan(
    source: Any,
    *,
    method: str | None = None,
    ipc: int | None = None,
    recipe: str | Recipe | None = None,
    net: str | None = None,
    changes: Sequence[str] = (),
    sets: int = 1,
    nets: Sequence[str] = (),
    networks: int | None = None,
    random: bool = True,
    whole: bool = False,
    validate_every: int = 0,
    seed: int = 0,
    device: str = "auto",
    cache: str | Path | None = None,
    workers: Workers = 1,
    reporter: Reporter | None = None,
) -> Plan:
    """What `run` with the same arguments would take on this machine, from a calibration of some seconds.

    Data of a name that `dstill ls datasets` knows are not loaded: then nothing is taken to be cached.

    Args:
        source: see `run`.
        method: see `run`, as for all that follow.
        ipc: images per class.
        recipe: the settings.
        net: a network instead of the recipe's.
        changes: `section.key=value` assignments.
        sets: synthetic sets.
        nets: evaluation networks.
        networks: fresh networks a set.
        random: also random real images.
        whole: also the whole training set.
        validate_every: iterations between two looks at the validation part.
        seed: of the experts that may be cached.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts.
        workers: processes that share what can be shared.
        reporter: receives progress.

    Raises:
        DstillError: whatever `run` would refuse at once.
    """
    reporter, where = reporter or Silent(), resolve_device(device)
    shape = DATASETS[source].shape if isinstance(source, str) and source in DATASETS and DATASETS[source].hub else None
    real = None if shape else load_real(source)
    if shape is None:
        assert real is not None
        shape = shape_of(real)
    at_least_one(sets=sets, networks=networks)
    name = real.name if real is not None else str(source)
    resolved = resolve_for(
        name, shape, recipe, method=method, ipc=ipc, net=net, changes=changes, device=where, reporter=reporter
    )
    if real is not None:
        check_early(real, resolved, nets)
    elif resolved.ipc * shape.classes > shape.train:
        raise DstillError(f"{name} has {shape.train // shape.classes} training images a class, fewer than {resolved.ipc}")
    given = Given(shape, real, where, cache_folder(cache), processes(workers, where))
    options: dict[str, Any] = {
        "sets": sets,
        "nets": nets,
        "networks": networks,
        "random": random,
        "whole": whole,
        "validate_every": validate_every,
        "seed": seed,
    }
    return plan_run(resolved, given, Clock(shape, where), **options)


def processes(workers: Workers, device: torch.device) -> int:
    """How many processes share the work that is worth it."""
    if workers == "auto":
        return cores() if device.type == "cpu" else 1
    return workers


def together(plans: Sequence[Plan], title: str) -> Plan:
    """Several runs as one plan, a stage a run, what they share counted once."""
    made: set[str] = set()
    stages = []
    for one in plans:
        new = [stage for stage in one.stages if not stage.makes or stage.makes not in made]
        made |= {stage.makes for stage in new}
        seconds, disk = sum(stage.seconds for stage in new), sum(stage.disk_bytes for stage in new)
        stages.append(Stage(name=one.title, seconds=seconds, peak_bytes=one.peak_bytes, disk_bytes=disk))
    warnings = dict.fromkeys(warning for one in plans for warning in one.warnings)
    return Plan(title=title, stages=tuple(stages), warnings=tuple(warnings))


def plan_run(
    recipe: Recipe,
    given: Given,
    clock: Clock,
    *,
    sets: int = 1,
    nets: Sequence[str] = (),
    networks: int | None = None,
    random: bool = True,
    whole: bool = False,
    validate_every: int = 0,
    seed: int = 0,
) -> Plan:
    """The plan of one run with resolved settings."""
    stages = [
        *_experts(recipe, given, clock, seed),
        *_trained(recipe, given, clock),
        *_distilling(recipe, given, clock, sets, validate_every),
        *_evaluating(recipe, given, clock, sets, nets, networks, random, whole),
    ]
    title = f"{recipe.method} on {recipe.data}, {recipe.ipc} image(s) per class"
    return Plan(title=title, stages=tuple(stages), warnings=tuple(_warnings(stages, given)))


def _experts(recipe: Recipe, given: Given, clock: Clock, seed: int) -> list[Stage]:
    if not method_info(recipe.method).needs_experts:
        return []
    config = recipe.expert_config
    assert config.epochs is not None
    longer = recipe.describing_expert(config.epochs)
    if longer is None:
        return [_expert_stage("experts", recipe, config, range(config.count), given, clock, seed)]
    stages = [_expert_stage("expert that describes images", recipe, longer, range(1), given, clock, seed)]
    if config.count > 1:
        stages.append(_expert_stage("experts", recipe, config, range(1, config.count), given, clock, seed))
    return stages


def _expert_stage(
    name: str, recipe: Recipe, config: ExpertConfig, wanted: range, given: Given, clock: Clock, seed: int
) -> Stage:
    shape, epochs = given.shape, config.epochs or config.planned_epochs
    missing = _missing(recipe, config, wanted, given, seed)
    stored = len(wanted) - missing
    processes = max(1, min(given.processes, missing))
    threads = threads_each(processes)
    steps = math.ceil(shape.train / config.batch_size)
    augmented = clock.training(recipe.net, config.batch_size, recipe.augmentation, threads)
    plain = clock.training(recipe.net, config.batch_size, "none", threads)
    step = clock.expert(recipe.net, config, threads) * (2 if config.gsam else 1) + max(0.0, augmented - plain)
    judging = clock.passes(recipe.net, Passes("forward", 1, shape.test))
    # The records, and the network with its optimiser's buffers, from which a training goes on.
    state = {"adam": 3, "sgd": 2 if config.momentum else 1}[config.optimiser]
    disk = ((epochs + 1) * (4 if config.store == "float32" else 2) + 4 * state) * _parameters(recipe.net, shape)
    return Stage(
        name=name,
        seconds=missing * epochs * (steps * step + judging) / processes,
        peak_bytes=processes * (shape.train + shape.test) * _image_bytes(shape) if missing else 0,
        disk_bytes=missing * disk,
        note=f"{missing} of {epochs} epochs" + (f", {stored} are cached" if stored else ""),
        makes=_named("experts", recipe, config.model_dump(exclude={"count"})),
    )


def _missing(recipe: Recipe, config: ExpertConfig, wanted: range, given: Given, seed: int) -> int:
    """How many of these experts the cache lacks."""
    if given.real is None:
        return len(wanted)
    identity = expert_identity(given.real.fingerprint, recipe.preprocess, recipe.net, config, recipe.augmentation, seed)
    folder = given.cache / "experts" / digest(identity)
    return len(missing_experts(folder, wanted, config.epochs or 1))


def _trained(recipe: Recipe, given: Given, clock: Clock) -> list[Stage]:
    if method_info(recipe.method).needs != "trained network":
        return []
    config = recipe.distill.training if isinstance(recipe.distill, SelectionConfig) else TrainingConfig()
    shape = given.shape
    step = clock.training(recipe.net, config.batch_size, "none", torch.get_num_threads())
    seconds = config.epochs * math.ceil(shape.train / config.batch_size) * step
    memory, disk = shape.train * _image_bytes(shape), 4 * _parameters(recipe.net, shape) + 8 * shape.train
    note = f"{config.epochs} epochs, none if it is cached"
    makes = _named("network", recipe, config.model_dump())
    return [Stage(name="trained network", seconds=seconds, peak_bytes=memory, disk_bytes=disk, note=note, makes=makes)]


def _named(kind: str, recipe: Recipe, settings: Any = None) -> str:
    """The same for runs that share what a stage makes."""
    shared = {"data": recipe.data, "net": recipe.net.model_dump(), "preprocess": recipe.preprocess, "settings": settings}
    return f"{kind}-{digest({**shared, 'augmentation': recipe.augmentation})}"


def _distilling(recipe: Recipe, given: Given, clock: Clock, sets: int, validate_every: int) -> list[Stage]:
    distill, shape = recipe.distill, given.shape
    count, images = recipe.ipc * shape.classes, recipe.ipc * shape.classes * _image_bytes(shape)
    stages: list[Stage] = []
    if distill.iterations:
        net, precision = getattr(distill, "net", recipe.net), getattr(distill, "precision", "float32")
        work = distill.work(ipc=recipe.ipc, classes=shape.classes)
        seconds = sets * distill.iterations * sum(clock.passes(net, passes, precision) for passes in work)
        memory = _BASE + (_kept(recipe, given) if isinstance(distill, MatchingConfig) else _remembered(net, work, shape))
        note = f"{distill.iterations} iterations" + (f", {sets} sets" if sets > 1 else "")
        stages.append(Stage(name="distilling", seconds=seconds, peak_bytes=memory, disk_bytes=sets * 3 * images, note=note))
    if distill.iterations and validate_every:
        looks = math.ceil(distill.iterations / validate_every)
        step = clock.training(recipe.net, min(count, 256), recipe.augmentation, torch.get_num_threads())
        one = load_protocol("quick").passes * math.ceil(count / 256) * step
        judging = clock.passes(recipe.net, Passes("forward", 1, shape.train // 10))
        held = shape.train // 10 * _image_bytes(shape)
        seconds = sets * looks * (one + judging)
        stages.append(Stage(name="validation", seconds=seconds, peak_bytes=held, disk_bytes=0, note=f"{looks} looks a set"))
    return stages


def _kept(recipe: Recipe, given: Given) -> float:
    """Memory of one unrolled segment."""
    distill, shape = recipe.distill, given.shape
    assert isinstance(distill, MatchingConfig)
    student = Student(_network(recipe.net, shape))
    batch = min(distill.batch_syn or recipe.ipc * shape.classes, recipe.ipc * shape.classes)
    vectors = (distill.student_steps + distill.expert_epochs + 8) * (2 if distill.student_momentum else 1)
    weights = _FLOATS * student.numel * vectors
    kept = student.kept_bytes(torch.zeros(1), batch)
    if kept is None:
        return weights + _remembered(recipe.net, [Passes("tangent", 1, batch)], shape)
    whole = kept * distill.student_steps
    some = min(whole, max(kept, KEPT_SHARE * available_memory(given.device)))
    return weights + {"keep": whole, "auto": some, "recompute": kept}[distill.memory]


def _remembered(net: NetConfig, work: Sequence[Passes], shape: Shape) -> float:
    """About what the library holds of the largest batch: four copies of the first block's maps, by far the largest.

    For a gradient it keeps those of every block, without one it needs room to work: the same within a factor of two.
    """
    images = max((passes.images for passes in work if passes.kind != "forward"), default=0)
    return _FLOATS * images * 4 * (net.width or 128) * math.prod(shape.size)


def _evaluating(
    recipe: Recipe,
    given: Given,
    clock: Clock,
    sets: int,
    nets: Sequence[str],
    networks: int | None,
    random: bool,
    whole: bool,
) -> list[Stage]:
    shape, protocol = given.shape, load_protocol(recipe.protocol)
    count, each = recipe.ipc * shape.classes, networks or protocol.networks
    memory = shape.test * _image_bytes(shape)

    def trainings(net: NetConfig, number: int) -> float:
        processes = max(1, min(given.processes, number))
        threads = threads_each(processes)
        step = clock.training(net, min(count, protocol.batch_size), recipe.augmentation, threads)
        one = protocol.passes * math.ceil(count / protocol.batch_size) * step
        return number * (one + clock.passes(net, Passes("forward", 1, shape.test))) / processes

    configs = evaluation_nets(recipe.net, nets)
    seconds = sum(trainings(config, sets * each) for config in configs)
    note = f"{sets * each * len(configs)} networks"
    stages = [Stage(name="evaluation", seconds=seconds, peak_bytes=memory, disk_bytes=0, note=note)]
    if random:
        number = RANDOM_DRAWS * each + len(RANDOM_RATES)
        seconds, note = trainings(configs[0], number), f"{number} networks, none if they are cached"
        makes = _named("random", recipe, [recipe.ipc, recipe.protocol, each])
        stages.append(Stage(name="random images", seconds=seconds, peak_bytes=memory, disk_bytes=0, note=note, makes=makes))
    if whole:
        full = load_protocol("whole")
        step = clock.training(configs[0], full.batch_size, recipe.augmentation, torch.get_num_threads())
        seconds = full.networks * full.passes * math.ceil(shape.train / full.batch_size) * step
        held = (shape.train + shape.test) * _image_bytes(shape)
        makes, note = _named("whole", recipe), "none if it is cached"
        stages.append(Stage(name="whole set", seconds=seconds, peak_bytes=held, disk_bytes=0, note=note, makes=makes))
    return stages


def _network(net: NetConfig, shape: Shape) -> torch.nn.Module:
    return networks_table.build(net, shape.channels, shape.classes, shape.size, torch.Generator())


def _parameters(net: NetConfig, shape: Shape) -> int:
    return sum(parameter.numel() for parameter in _network(net, shape).parameters())


def _image_bytes(shape: Shape) -> int:
    return _FLOATS * shape.numbers


def _warnings(stages: Sequence[Stage], given: Given) -> list[str]:
    found = []
    folder = next(path for path in (given.cache, *given.cache.parents) if path.exists())
    disk, free = sum(stage.disk_bytes for stage in stages) / _GIB, shutil.disk_usage(folder).free / _GIB
    if disk > free:
        found.append(f"{disk:.1f} GiB of disk are needed, {free:.1f} GiB are free at {folder}: pass another --cache")
    memory, at_hand = max(stage.peak_bytes for stage in stages) / _GIB, available_memory(given.device) / _GIB
    if memory > at_hand:
        found.append(f"{memory:.1f} GiB of memory are needed, {at_hand:.1f} GiB are free: lower batch_syn, width or workers")
    return found
