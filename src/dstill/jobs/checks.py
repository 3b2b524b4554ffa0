"""Checks at the start, so that an error does not appear only after training or distilling."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import NetConfig, Recipe, canonical
from dstill.data import formation, siamese
from dstill.data.real import VALIDATION_FRACTION, RealSet, check_ipc, stratified
from dstill.distillation.sinks import check_sinks
from dstill.errors import DstillError
from dstill.evaluation.protocols import further_protocols, load_protocol
from dstill.experts.trajectory import Trajectories
from dstill.jobs.job import Job
from dstill.jobs.options import Evaluation
from dstill.methods.base import method_class
from dstill.methods.initialisation import check_initial
from dstill.nets import networks as nets


def check_early(
    job: Job,
    evaluation: Evaluation = Evaluation(),
    logs: Sequence[str] = (),
    *,
    own_experts: bool = True,
    validates: bool = False,
    initial: DistilledSet | None = None,
) -> None:
    """Checks what would otherwise fail only after the experts are trained or the set is distilled.

    Args:
        job: the resolved command.
        evaluation: how the sets will be measured.
        logs: names of sinks.
        own_experts: whether the recipe's experts are used; others may have more epochs.
        validates: whether a validation part of the training images is needed.
        initial: a set whose images are the start of the synthetic set.

    Raises:
        DstillError: the data have too few images, or a name is unknown, or the network or a setting cannot be used.
    """
    real, recipe = job.real, job.recipe
    method = method_class(recipe.method)
    formation.check_parts(real.size, recipe.distill.parts)
    check_ipc(real, recipe.decoded_ipc)
    if validates and real.judged_on == "test":
        stratified(real.train.labels, real.class_names, VALIDATION_FRACTION, torch.Generator())
    if initial is not None:
        if not method.starts_from_a_set:
            raise DstillError(f"method {recipe.method!r} selects real images and does not start from a set: leave init out")
        check_initial(initial.decoded, real, recipe.decoded_ipc)
    further_protocols(load_protocol(recipe.protocol), evaluation.also)
    check_sinks(logs)
    siamese.parse(recipe.augmentation)
    own, *_ = [check_network(config, real) for config in (recipe.net, *nets.evaluation_nets(recipe.net, evaluation.nets))]
    if recipe.distill.draws > 1 and not method.averages_draws:
        raise DstillError(f"method {recipe.method!r} does not average draws: leave distill.draws at 1")
    method.check(recipe, own)
    if own_experts:
        _check_epochs(recipe)


def check_network(config: NetConfig, real: RealSet) -> torch.nn.Module:
    """Builds a network once; raises `DstillError` if it is unknown, or cannot be built for these images."""
    return nets.build(config, real.channels, real.classes, real.size, torch.Generator())


def _check_epochs(recipe: Recipe) -> None:
    epochs, needed = recipe.expert_config.epochs, recipe.distill.epochs_needed
    if epochs is not None and needed is not None and epochs < needed:
        raise DstillError(
            f"experts.epochs {epochs} is too short, matching needs {needed} (T+ + M - 1): raise it, or lower "
            "distill.max_start_epoch"
        )


def check_experts(experts: Trajectories, job: Job) -> None:
    """Refuses experts that do not fit the job, or that were trained on other inputs as far as their files say.

    For example, experts of the whole training set have seen the part that a hold-out keeps for validation.

    Raises:
        DstillError: they have another network, too few epochs, or other data or preprocessing.
    """
    real, recipe = job.real, job.recipe
    if recipe.distill.epochs_needed is not None:
        numel = sum(parameter.numel() for parameter in check_network(recipe.net, real).parameters())
        experts.check_fits(numel, recipe.distill.epochs_needed)
        _check_same_network(experts, recipe.net, real)
    for key, ours, remedy in (
        ("data", real.fingerprint, "train experts on these"),
        ("preprocess", recipe.preprocess, f"pass --set preprocess={experts.headers[0].get('preprocess')}, or train others"),
    ):
        others = {header[key] for header in experts.headers if key in header} - {ours}
        if others:
            theirs = ", ".join(sorted(others))
            raise DstillError(f"the experts of {experts.folder} were trained with other {key} ({theirs}, not {ours}): {remedy}")


def _check_same_network(experts: Trajectories, net: NetConfig, real: RealSet) -> None:
    """Refuses experts of another network with as many parameters, such as one with another norm.

    Options that are left out take the network's defaults, so that built networks are compared. Experts of other programs do not
    name their network.
    """
    ours, said = repr(check_network(net, real)), [header["net"] for header in experts.headers if "net" in header]
    try:
        others = {NetConfig.model_validate(one) for one in said}
    except ValueError as error:
        raise DstillError(f"the experts of {experts.folder} are from another version of dstill: {error}") from error
    for theirs in others:
        if theirs.name != net.name or repr(check_network(theirs, real)) != ours:
            options = " ".join(f"net.{key}={value}" for key, value in canonical(theirs, exclude_none=True).items())
            raise DstillError(
                f"the experts of {experts.folder} were trained with another network: pass --set {options}, or train others"
            )
