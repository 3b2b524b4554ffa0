"""A command, resolved once: data, settings, seeds, and the place where it works. It is passed to everything else."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dstill.artifacts import whitening
from dstill.artifacts.distilled import DistilledSet
from dstill.config import recipes
from dstill.config.registry import METHODS, MethodInfo, method_info
from dstill.config.settings import NetConfig, Recipe, canonical
from dstill.data.catalog import Shape
from dstill.data.preprocess import Preprocess
from dstill.data.real import RealSet, Source, load_real
from dstill.errors import DstillError
from dstill.experts.train import ExpertTask, train_missing
from dstill.experts.trained import NetworkTask, TrainedNetwork, trained_network
from dstill.experts.trajectory import Trajectories, expert_path, recorded_epochs
from dstill.jobs.options import Budget, Choice, Evaluation, Machine, Recording, Seeds, at_least_one
from dstill.methods.base import Problem
from dstill.nets.networks import network_name
from dstill.support.cache import cache_folder
from dstill.support.console import Progress, reporter_of
from dstill.support.devices import ask_for_determinism, resolve_device, total_memory
from dstill.support.plugins import name_of
from dstill.support.progress import Pieces, Reporter
from dstill.support.workers import Workers, check_workers
from dstill.training.fit import EpochReport


@dataclass(frozen=True)
class Workplace:
    """Where a command works, resolved from `Machine`.

    Attributes:
        device: device of all tensors.
        cache: folder of what runs share.
        workers: processes that train experts and networks.
        reporter: receives progress.
        fresh: whether this process was started for a single run, which then needs none of its own.
        streams: draws of an iteration that the card runs side by side.
    """

    device: torch.device
    cache: Path
    workers: Workers
    reporter: Reporter
    fresh: bool = False
    streams: int = 1

    @classmethod
    def of(cls, machine: Machine, progress: Progress = None) -> Workplace:
        """The place that the options describe. Sets the number of threads and determinism for this process.

        Raises:
            DstillError: this machine has no such device; or the number of workers, threads or streams is below 1; or several
                streams are asked for on a device that is not an NVIDIA card.
        """
        at_least_one(threads=machine.threads, streams=machine.streams)
        device = resolve_device(machine.device)
        if machine.streams > 1 and device.type != "cuda":
            raise DstillError(f"streams {machine.streams} needs an NVIDIA card, and the device is {device}: leave it at 1")
        if machine.threads is not None:
            torch.set_num_threads(machine.threads)
        if machine.deterministic:
            ask_for_determinism()
        workers = 1 if machine.workers is None else machine.workers
        check_workers(workers)
        cache, reporter = cache_folder(machine.cache), reporter_of(progress)
        return cls(device, cache, workers, reporter, streams=machine.streams)


@dataclass(frozen=True)
class Job:
    """A command, resolved.

    Attributes:
        name: name of the real data.
        shape: shape of the real data.
        data: the real data; None for a plan that does not load them.
        recipe: all settings.
        origin: where the settings come from, in a sentence.
        seeds: seeds of images and experts.
        place: where the work is done.
        changes: what the user has set in the recipe, as assignments.
    """

    name: str
    shape: Shape
    data: RealSet | None
    recipe: Recipe
    origin: str
    seeds: Seeds
    place: Workplace
    changes: tuple[str, ...] = ()

    @classmethod
    def resolve(cls, source: Source, choice: Choice, seed: int | Seeds, place: Workplace, *, shape: Shape | None = None) -> Job:
        """Loads the data and resolves the settings. The log says where they come from.

        Args:
            source: the real data, see `load_real`.
            choice: the settings to use.
            seed: one seed for everything, or `Seeds`.
            place: where the work will be done.
            shape: shape of the data if they are not to be loaded; `source` is then their name in the catalogue.

        Raises:
            DstillError: the data cannot be read, or the settings are unknown or contradict each other.
        """
        if shape is None:
            data = load_real(source, progress=place.reporter)
            known, name, shape = data.known, data.name, shape_of(data)
        else:
            data, known, name = None, str(source), str(source)
        recipe, origin = resolved(choice, known, shape, place.device, name)
        if not isinstance(choice.recipe, Recipe):
            place.reporter.note(f"{recipe.method}, {recipe.ipc} image(s) per class, {name}: {origin}")
        return cls(name, shape, data, recipe, origin, Seeds.of(seed), place, tuple(_changes(choice)))

    def by(self, method: str) -> Job:
        """The same job by another method: its own settings for these data, with what the user has set."""
        choice = Choice(method, self.recipe.ipc, changes=self.changes)
        recipe, origin = resolved(choice, self.real.known, self.shape, self.place.device, self.name)
        return replace(self, recipe=recipe, origin=origin)

    def on(self, data: RealSet) -> Job:
        """The same job on other data of the same shape, such as a hold-out."""
        return replace(self, name=data.name, shape=shape_of(data), data=data)

    def with_recipe(self, recipe: Recipe) -> Job:
        """The same job with other settings."""
        return replace(self, recipe=recipe)

    @property
    def real(self) -> RealSet:
        """The real data; the job must have loaded them."""
        assert self.data is not None, "this job has no data: it is a plan's"
        return self.data

    @property
    def method(self) -> MethodInfo:
        """The entry of the recipe's method in the table."""
        return method_info(self.recipe.method)

    @property
    def folder(self) -> Path:
        """The default run folder."""
        return self._folder(named=True)

    def folder_within(self, minutes: float, *, named: bool) -> Path:
        """The default run folder of a budget; it has the method in its name if the user named one."""
        folder = self._folder(named=named)
        return folder.with_name(f"{folder.name}-{minutes:g}min")

    def _folder(self, *, named: bool) -> Path:
        method = f"-{self.recipe.method.rpartition(':')[2]}" if named else ""
        return Path("runs") / f"{self.name}{method}-ipc{self.recipe.ipc}-seed{self.seeds.images}"

    def identity(self, seed: int) -> dict[str, Any]:
        """What identifies the distillation of one set before its experts are trained. Experts record their own seed."""
        known = {"recipe": canonical(self.recipe, exclude={"note"}), "data": self.real.fingerprint, "seed": seed}
        return {**known, "expert_seed": self.seeds.experts} if self.method.needs == "trained network" else known

    def preprocess(self) -> Preprocess:
        """The preprocessing fitted on the training part; a ZCA fit is cached by the data's fingerprint."""
        return whitening.fitted(self.recipe.preprocess, self.real, self.place.cache, self.place.reporter)

    def experts(self, *, only: Sequence[int] | None = None, describing: bool = True) -> Trajectories:
        """The recipe's experts; those that the cache lacks are trained first.

        Args:
            only: train only these experts, and return all that the cache then holds.
            describing: if the initialisation needs features of a longer expert, train that one at its full length at once, so
                that it need not be extended afterwards.

        Raises:
            DstillError: `only` names an expert that the recipe does not have.
        """
        config, reporter = self.recipe.expert_config, self.place.reporter
        assert config.epochs is not None
        longer = self.recipe.describing_expert(config.epochs) if describing and (only is None or 0 in only) else None
        more = {0: longer.epochs} if longer is not None and longer.epochs is not None else {}
        task = ExpertTask(self.real, self.preprocess(), self.recipe.net, config, self.recipe.augmentation, self.seeds.experts)
        folder = self.place.cache / "experts" / task.fingerprint()
        if more and recorded_epochs(expert_path(folder, 0)) < more[0]:
            reporter.note(f"expert 0 is trained for {more[0]} epochs, since the initialisation uses its features")
        wanted = _numbers(only, config.count)
        self._train(task, folder, dict.fromkeys(wanted, config.epochs) | more)
        reporter.note(f"experts: {folder}")
        return Trajectories(folder, config.count, config.epochs) if only is None else Trajectories(folder)

    def _train(self, task: ExpertTask, folder: Path, epochs: Mapping[int, int]) -> None:
        place = self.place
        finished = sum(count for index, count in epochs.items() if recorded_epochs(expert_path(folder, index)) >= count)
        pieces = Pieces(place.reporter, "expert epochs", sum(epochs.values()), before=finished)

        def observe(index: int, report: EpochReport, score: float) -> None:
            detail = f"expert {index}: {self.real.judged_on} accuracy {score:.1%}, {report.images_per_second:,.0f} images/s"
            pieces(index, report.epochs_done, detail)

        train_missing(
            task,
            folder,
            place.device,
            epochs=epochs,
            workers=place.workers,
            observer=observe,
            tick=pieces,
            note=place.reporter.note,
        )

    def describing_expert(self, trajectories: Trajectories | None) -> Trajectories | None:
        """The longer expert whose features the initialisation uses, trained if the cache lacks it.

        None if the recipe needs none, or if the given experts have enough epochs.
        """
        longer = None if trajectories is None else self.recipe.describing_expert(trajectories.epochs)
        if longer is None:
            return None
        return self.with_recipe(self.recipe.model_copy(update={"experts": longer})).experts()

    def trained_networks(self) -> tuple[TrainedNetwork, ...]:
        """The recipe's network trained on all real images, as often as the method asks; empty if it needs none."""
        if self.method.needs != "trained network":
            return ()
        config, count = self.recipe.distill.network_training, self.recipe.distill.network_count
        task = NetworkTask(self.real, self.preprocess(), self.recipe.net, config, self.seeds.experts)

        pieces = Pieces(self.place.reporter, "network epochs", count * config.epochs)

        def observe(number: int, report: EpochReport) -> None:
            pieces(number, report.epochs_done, f"loss {report.loss:.3f}, {report.images_per_second:,.0f} images/s")

        def network(number: int) -> TrainedNetwork:
            one, folder, tell = replace(task, number=number), self.place.cache / "networks", functools.partial
            return trained_network(one, folder, self.place.device, tell(observe, number), tell(pieces, number))

        return tuple(network(number) for number in range(count))

    def problem(self, seed: int, trajectories: Trajectories | None, initial: DistilledSet | None = None) -> Problem:
        """What the method works on to distil one set. Whatever it needs beside the experts is made first."""
        describing = None if initial is not None else self.describing_expert(trajectories)
        trained, preprocess = self.trained_networks(), self.preprocess()
        known = (self.real, preprocess, self.recipe, trajectories, self.place.device, seed)
        return Problem(*known, describing, trained, initial, self.place.streams)


@dataclass(frozen=True)
class Task:
    """What a run does with its job.

    Attributes:
        sets: number of synthetic sets; their seeds count up from the job's.
        evaluation: how they are measured.
        recording: what is recorded while distilling.
        budget: the time of the whole command, which then decides what the user has not set.
        chooses: whether the budget chooses the method too.
        rivals: whether coresets then compete with the set.
        initial: the set that they start from, in place of the recipe's initialisation.
        experts: the trajectories that are given, in place of the recipe's.
    """

    sets: int = 1
    evaluation: Evaluation = Evaluation()
    recording: Recording = Recording()
    budget: Budget | None = None
    chooses: bool = False
    rivals: bool = False
    initial: DistilledSet | None = None
    experts: Trajectories | None = None


def resolved(choice: Choice, known: str, shape: Shape, device: torch.device, name: str = "") -> tuple[Recipe, str]:
    """The settings of a choice, and a sentence on where they come from; see `recipes.resolve`."""
    method = None if choice.method is None else name_of(choice.method, {n: i.path for n, i in METHODS.items()}, "method")
    changes = _changes(choice)
    if isinstance(choice.recipe, Recipe):
        recipes.check_method(choice.recipe, method, "the recipe")
        ipc = [] if choice.ipc is None else [f"ipc={choice.ipc}"]
        return recipes.changed(choice.recipe, [*ipc, *changes], "recipe"), "the recipe that was passed"
    memory = total_memory(device)
    options: dict[str, Any] = {"method": method, "ipc": choice.ipc, "changes": changes, "memory": memory, "name": name}
    return recipes.resolve(choice.recipe, known, shape, **options)


def _changes(choice: Choice) -> list[str]:
    """All changes to the recipe, as assignments. A network replaces the recipe's and takes its own defaults."""
    found: list[str] = []
    if choice.net is not None:
        found.append(f"net={json.dumps(_net(choice.net))}")
    found += recipes.assignments(choice.changes)
    for section, values in (("distill", choice.distill), ("experts", choice.experts)):
        found += [] if values is None else recipes.assignments({section: values})
    return found


def _net(net: Any) -> Mapping[str, Any]:
    if isinstance(net, NetConfig):
        return canonical(net, exclude_none=True)
    return net if isinstance(net, Mapping) else {"name": network_name(net)}


def _numbers(only: Sequence[int] | None, count: int) -> list[int]:
    """Numbers of the experts to train."""
    wanted = list(range(count)) if only is None else list(only)
    if any(index < 0 for index in wanted):
        raise DstillError(f"experts are numbered from 0, got {min(wanted)}")
    if only is not None and any(index >= count for index in wanted):
        raise DstillError(f"there is no expert {max(wanted)}: the recipe has {count}, numbered from 0")
    return wanted


def shape_of(real: RealSet) -> Shape:
    """The shape of the data, which settings and plans need."""
    return Shape(real.channels, real.size, real.classes, len(real.train), len(real.test))
