"""What every command does first: settings, preprocessing, experts, and the checks that spare a long wait."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from dstill.artifacts import files
from dstill.artifacts.distilled import DistilledSet
from dstill.config import recipes
from dstill.config.registry import method_info
from dstill.config.settings import Recipe, TrainingConfig, evaluation_nets
from dstill.data import preprocess as preprocessing
from dstill.data import siamese
from dstill.data.catalog import Shape
from dstill.data.preprocess import Preprocess
from dstill.data.real import VALIDATION_FRACTION, RealSet, check_ipc, stratified
from dstill.distillation.sinks import check_sinks
from dstill.errors import DstillError
from dstill.evaluation.protocols import load_protocol
from dstill.experts.train import ExpertTask, train_missing
from dstill.experts.trained import NetworkTask, TrainedNetwork, trained_network
from dstill.experts.trajectory import Trajectories, missing_experts
from dstill.methods.initialisation import check_initial
from dstill.methods.settings import MatchingConfig, SelectionConfig
from dstill.nets.networks import build
from dstill.support.console import Reporter
from dstill.support.devices import total_memory
from dstill.support.workers import Workers
from dstill.training.fit import EpochReport
from dstill.unrolling.student import Student

_PREPROCESS = "preprocessing"


def cache_folder(cache: str | Path | None) -> Path:
    """Where experts and whitening are kept for every run: `cache`, else $DSTILL_CACHE, else ~/.cache/dstill."""
    chosen = cache or os.environ.get("DSTILL_CACHE") or Path.home() / ".cache" / "dstill"
    return Path(chosen).expanduser()


def fitted_preprocess(kind: str, real: RealSet, cache: Path) -> Preprocess:
    """The preprocessing fitted on the training part; a ZCA fit is cached by the data's fingerprint."""
    if kind != "zca":
        return preprocessing.fit(kind, real.train.images)
    path = cache / "preprocess" / f"{kind}-{real.fingerprint}.safetensors"

    def make() -> None:
        files.save(path, _PREPROCESS, preprocessing.fit(kind, real.train.images).tensors(), {"data": real.fingerprint})

    # Also what was fitted just now is read back: another memory layout would round a small batch in another way.
    return preprocessing.from_tensors(kind, files.load_or_make(path, _PREPROCESS, make)[1])


def resolve_recipe(
    real: RealSet,
    recipe: str | Recipe | None,
    method: str | None,
    ipc: int | None,
    net: str | None,
    changes: Sequence[str],
    device: torch.device,
    reporter: Reporter,
) -> Recipe:
    """The settings of a run, said in the log."""
    return resolve_for(
        real.name, shape_of(real), recipe, method=method, ipc=ipc, net=net, changes=changes, device=device, reporter=reporter
    )


def shape_of(real: RealSet) -> Shape:
    """What settings and plans must know of the data."""
    return Shape(real.channels, real.size, real.classes, len(real.train), len(real.test))


def resolve_for(
    name: str,
    shape: Shape,
    recipe: str | Recipe | None,
    *,
    method: str | None,
    ipc: int | None,
    net: str | None,
    changes: Sequence[str],
    device: torch.device,
    reporter: Reporter,
) -> Recipe:
    """`resolve_recipe` for data of which the name and the shape are known, loaded or not."""
    if net is not None:
        changes = [f"net={json.dumps({'name': net})}", *changes]
    if isinstance(recipe, Recipe):
        recipes.check_method(recipe, method, "the recipe")
        return recipes.changed(recipe, [*([f"ipc={ipc}"] if ipc is not None else []), *changes], "recipe")
    described = recipes.DataShape(name, shape.channels, shape.size, shape.classes, total_memory(device))
    resolved, origin = recipes.resolve(recipe, described, method=method, ipc=ipc, changes=changes)
    reporter.note(f"{resolved.method}, {resolved.ipc} image(s) per class, {name}: {origin}")
    return resolved


def check_early(
    real: RealSet,
    recipe: Recipe,
    nets: Sequence[str] = (),
    logs: Sequence[str] = (),
    *,
    own_experts: bool = True,
    validates: bool = False,
    initial: DistilledSet | None = None,
) -> None:
    """Refuses at once what would otherwise be refused after the experts are trained or the set is distilled.

    Args:
        real: the real data.
        recipe: the resolved settings.
        nets: evaluation networks that somebody names.
        logs: names of sinks.
        own_experts: experts are the recipe's, not such as somebody names, which may be longer.
        validates: a part of the training images is set aside on the way.
        initial: a set whose images are started from.
    """
    check_ipc(real, recipe.ipc)
    if validates and real.judged_on == "test":
        stratified(real.train.labels, real.class_names, VALIDATION_FRACTION, torch.Generator())
    if initial is not None:
        if method_info(recipe.method).family == "selection":
            raise DstillError(f"method {recipe.method!r} chooses real images: it does not start from a set, leave init out")
        check_initial(initial, real, recipe.ipc)
    load_protocol(recipe.protocol)
    check_sinks(logs)
    siamese.parse(recipe.augmentation)
    for config in (recipe.net, *evaluation_nets(recipe.net, nets)):
        build(config, real.channels, real.classes, real.size, torch.Generator())
    if method_info(recipe.method).family in ("trajectory matching", "gradient matching"):
        settings, student = recipe.distill, build(recipe.net, real.channels, real.classes, real.size, torch.Generator())
        Student(student)
        if isinstance(settings, MatchingConfig):
            Student(student, precision=settings.precision)
            Student(student, precision=recipe.expert_config.precision)
            if own_experts:
                _check_epochs(recipe, settings)


def _check_epochs(recipe: Recipe, settings: MatchingConfig) -> None:
    epochs, needed = recipe.expert_config.epochs, settings.epochs_needed
    if epochs is not None and epochs < needed:
        raise DstillError(
            f"experts.epochs {epochs} is too short, matching needs {needed} (T+ + M - 1): raise it, or lower "
            "distill.max_start_epoch"
        )


def check_experts(experts: Trajectories, real: RealSet, recipe: Recipe) -> None:
    """Refuses experts that somebody names and that do not fit, or were trained on other inputs, as far as their files tell.

    Raises:
        DstillError: they are of another network, or too short, or their data or preprocessing are others. Experts of a whole
            training set, for one, have seen the part of it that a hold-out sets aside.
    """
    if isinstance(recipe.distill, MatchingConfig):
        net = build(recipe.net, real.channels, real.classes, real.size, torch.Generator())
        experts.check_fits(sum(parameter.numel() for parameter in net.parameters()), recipe.distill.epochs_needed)
    for key, ours, remedy in (
        ("data", real.fingerprint, "train experts on these"),
        ("preprocess", recipe.preprocess, f"pass --set preprocess={experts.headers[0].get('preprocess')}, or train others"),
    ):
        others = {header[key] for header in experts.headers if key in header} - {ours}
        if others:
            theirs = ", ".join(sorted(others))
            raise DstillError(f"the experts of {experts.folder} were trained with other {key} ({theirs}, not {ours}): {remedy}")


def at_least_one(**values: int | None) -> None:
    """Raises `DstillError` for a count below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise DstillError(f"{name} must be at least 1, got {value}")


def ensure_experts(
    real: RealSet,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    cache: Path,
    reporter: Reporter,
    *,
    only: Sequence[int] | None = None,
    workers: Workers = 1,
    describing: bool = True,
) -> Trajectories:
    """The recipe's experts, those that the cache lacks trained first.

    With `only`, no others are trained, and whatever the cache then holds is returned. `describing`: the one that describes
    images for the initialisation is longer at once, where the recipe asks for that, and not trained again afterwards.
    """
    config = recipe.expert_config
    assert config.epochs is not None
    longer = recipe.describing_expert(config.epochs) if describing and (only is None or 0 in only) else None
    if longer is not None:
        reporter.note(f"expert 0 is trained for {longer.epochs} epochs, to describe images for the initialisation")
        ensure_experts(real, recipe.model_copy(update={"experts": longer}), seed, device, cache, reporter)
    preprocess = fitted_preprocess(recipe.preprocess, real, cache)
    task = ExpertTask(real, preprocess, recipe.net, config, recipe.augmentation, seed)
    folder = cache / "experts" / task.fingerprint()
    wanted = list(range(config.count)) if only is None else list(only)
    if any(index < 0 for index in wanted):
        raise DstillError(f"experts are numbered from 0, got {min(wanted)}")
    if only is not None and any(index >= config.count for index in wanted):
        raise DstillError(f"there is no expert {max(wanted)}: the recipe has {config.count}, numbered from 0")
    total = len(wanted) * config.epochs
    missing = len(missing_experts(folder, wanted, config.epochs))
    done = itertools.count(1 + total - missing * config.epochs)

    def observe(index: int, report: EpochReport, score: float) -> None:
        detail = f"expert {index}: {real.judged_on} accuracy {score:.1%}, {report.images_per_second:,.0f} images/s"
        reporter.progress("expert epochs", next(done), total, detail)

    train_missing(task, folder, device, only=only, workers=workers, observer=observe, note=reporter.note)
    reporter.note(f"experts: {folder}")
    return Trajectories(folder, config.count, config.epochs) if only is None else Trajectories(folder)


def trained_on_all(
    real: RealSet, recipe: Recipe, seed: int, device: torch.device, cache: Path, reporter: Reporter
) -> TrainedNetwork | None:
    """The recipe's network trained on all real images, for methods that look through one; None for the others."""
    if method_info(recipe.method).needs != "trained network":
        return None
    config = recipe.distill.training if isinstance(recipe.distill, SelectionConfig) else TrainingConfig()
    task = NetworkTask(real, fitted_preprocess(recipe.preprocess, real, cache), recipe.net, config, seed)

    def observe(report: EpochReport) -> None:
        detail = f"loss {report.loss:.3f}, {report.images_per_second:,.0f} images/s"
        reporter.progress("training a network", report.epochs_done, config.epochs, detail)

    return trained_network(task, cache / "networks", device, observe)


def feature_expert(
    real: RealSet,
    recipe: Recipe,
    trajectories: Trajectories | None,
    seed: int,
    device: torch.device,
    cache: Path,
    reporter: Reporter,
) -> Trajectories | None:
    """The longer expert that the initialisation describes images with, trained if the cache lacks it.

    None where the recipe asks for none, or where the experts at hand are long enough.
    """
    longer = None if trajectories is None else recipe.describing_expert(trajectories.epochs)
    if longer is None:
        return None
    return ensure_experts(real, recipe.model_copy(update={"experts": longer}), seed, device, cache, reporter)
