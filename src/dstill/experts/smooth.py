"""What makes an expert smooth: the clipped loss, the gradient penalty, and how smoothness is measured (paper IV-B)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from dstill.config.settings import Form
from dstill.derivatives.engine import Precision, derivatives_of
from dstill.training.fit import Batch, Objective, cross_entropy_objective


def clip_factor(epoch: int, form: Form) -> float:
    """λ of the clipped loss for an epoch (paper Eq. 19): the cross-entropy is scaled down while it is steepest.

    Args:
        epoch: 0 for the first pass over the data.
        form: `paper`: 0.5, 0.625, 0.75, 0.875, then 1. `released`: 0.50, 0.55 … 0.95 over ten epochs, then 1. `off`: 1.

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
    """μ of Eq. 19: 1 in the paper, 2 in the released code, 0 when off."""
    return {"off": 0.0, "paper": 1.0, "released": 2.0}[form]


def gradient_penalty(net: nn.Module, images: Tensor, form: Form, target: float = 1.0) -> Tensor:
    """E_x[(|grad_x W(x)|_2 - K)^2] of un-augmented images, W the sum of the logits (Eq. 19); differentiable twice over.

    The definition by library double backward, for any network. `smooth_objective` takes the hand-written tangent pass
    where the network has one.

    Args:
        net: any network.
        images: `[B, C, H, W]`.
        form: `paper`: the norm of a sample's whole gradient. `released`: over the colour channels at each pixel, mean
            over pixels and samples.
        target: K.
    """
    with torch.enable_grad():
        inputs = images.detach().requires_grad_()
        (jacobian,) = torch.autograd.grad(net(inputs).sum(), inputs, create_graph=True)
    norm = jacobian.norm(dim=1) if form == "released" else jacobian.flatten(1).norm(dim=1)
    return (norm - target).square().mean()


def smooth_objective(
    net: nn.Module, clip: Form, penalty: Form, *, precision: Precision = "float32", compiled: bool = False
) -> Objective:
    """L_SC = λ_e CE + μ E[(|grad_x W| - K)^2] (Eq. 19) as an objective of `dstill.training.fit`.

    Args:
        net: what will be trained; where it has hand-written derivatives, these are taken.
        clip: form of the clipped loss.
        penalty: form of the gradient penalty.
        precision: of the hand-written derivatives' convolutions.
        compiled: `torch.compile` the derivatives where native kernels do not run.
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
    """|θ_t - θ_{t+1}|^2 for each epoch of a trajectory `[E+1, P]`: the curve of Fig. 9, `[E]` in float64."""
    return torch.stack([(b.double() - a.double()).square().sum() for a, b in itertools.pairwise(trajectory)])
