"""Smooth experts: the clipped loss, the gradient penalty, and a measure of smoothness (paper IV-B)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from dstill.config.settings import Form
from dstill.derivatives.engine import Precision, derivatives_of
from dstill.training.fit import Batch, Objective, cross_entropy_objective


def clip_factor(epoch: int, form: Form) -> float:
    """The factor λ of the clipped loss in an epoch (paper Eq. 19). It scales the cross-entropy down while it is steepest.

    Args:
        epoch: 0 for the first pass over the data.
        form: `paper`: 0.5, 0.625, 0.75, 0.875, then 1. `released`: 0.50, 0.55 … 0.95 over ten epochs, then 1. `off`: 1.

    Returns:
        A factor in [0.5, 1].

    Example:
        >>> [clip_factor(e, "paper") for e in (0, 1, 4, 30)]
        [0.5, 0.625, 1.0, 1.0]
    """
    match form:
        case "paper":
            return min(1.0, 0.5 + 0.125 * epoch)
        case "released":
            return min(1.0, 0.5 + 0.05 * epoch)
        case "off":
            return 1.0


def penalty_weight(form: Form) -> float:
    """The weight μ of the gradient penalty (paper Eq. 19): 1 in the paper, 2 in the released code, 0 if off.

    Args:
        form: `paper`, `released` or `off`.

    Example:
        >>> [penalty_weight(form) for form in ("paper", "released", "off")]
        [1.0, 2.0, 0.0]
    """
    return {"off": 0.0, "paper": 1.0, "released": 2.0}[form]


def gradient_penalty(net: nn.Module, images: Tensor, form: Form, target: float = 1.0) -> Tensor:
    """The gradient penalty E_x[(|grad_x W(x)|_2 - K)^2] of images, where W is the sum of the logits (paper Eq. 19).

    This is the definition, computed by autograd for any network; it can be differentiated. `smooth_objective` uses the
    hand-written tangent pass if the network has one.

    Args:
        net: any network.
        images: `[B, C, H, W]`, preprocessed, not augmented.
        form: `paper`: the norm is over the whole gradient of a sample. `released`: the norm is over the colour channels at
            each pixel, and the mean over pixels and samples.
        target: the paper's K.

    Returns:
        The penalty, a 0-d tensor.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False))
        >>> _ = nn.init.constant_(net[1].weight, 1.5)  # |grad W| = 1.5 * sqrt(4) = 3
        >>> gradient_penalty(net, torch.zeros(2, 1, 2, 2), "paper").item()
        4.0
    """
    with torch.enable_grad():
        inputs = images.detach().requires_grad_()
        (jacobian,) = torch.autograd.grad(net(inputs).sum(), inputs, create_graph=True)
    norm = jacobian.norm(dim=1) if form == "released" else jacobian.flatten(1).norm(dim=1)
    return (norm - target).square().mean()


def smooth_objective(
    net: nn.Module, clip: Form, penalty: Form, *, precision: Precision = "float32", compiled: bool = False
) -> Objective:
    """L_SC = λ_e CE + μ E[(|grad_x W| - K)^2] (paper Eq. 19) as an objective for `dstill.training.fit.fit`.

    Args:
        net: the network to train; its hand-written derivatives are used if it has them.
        clip: form of the clipped loss.
        penalty: form of the gradient penalty.
        precision: precision of the convolutions in hand-written derivatives.
        compiled: compile the derivatives with `torch.compile` where native kernels do not run.
    """
    written = derivatives_of(net, precision=precision, compiled=compiled)
    cross_entropy = cross_entropy_objective(written)

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        loss = cross_entropy(net, batch)
        factor, weight = clip_factor(batch.epoch, clip), penalty_weight(penalty)
        if factor != 1:
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(factor)
        if penalty == "off":
            return factor * loss
        if written is None:
            value = gradient_penalty(net, batch.raw, penalty)
            (weight * value).backward()
            return factor * loss + weight * value.detach()
        parameters = list(net.parameters())
        value, gradients = written.penalty(parameters, batch.raw, pixelwise=penalty == "released")
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(gradient, alpha=weight)
        return factor * loss + weight * value

    return objective


def step_lengths(trajectory: Tensor) -> Tensor:
    """|θ_t - θ_{t+1}|^2 for each epoch of an expert: the curve of Fig. 9.

    Args:
        trajectory: `[E + 1, P]`.

    Returns:
        The squared lengths `[E]`, computed in float64.

    Example:
        >>> step_lengths(torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 5.0]])).tolist()
        [25.0, 1.0]
    """
    return torch.stack([(b.double() - a.double()).square().sum() for a, b in itertools.pairwise(trajectory)])
