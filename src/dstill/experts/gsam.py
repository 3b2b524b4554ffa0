"""Flat experts: surrogate-gap sharpness-aware minimisation (GSAM), as FTD trains its experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dstill.training.fit import Batch, Objective

_TINY = 1e-12


def gsam_objective(base: Objective, rho: float, alpha: float) -> Objective:
    """Wraps an objective, so that it leaves GSAM's gradient in its adaptive form.

    Let g be the gradient at the weights w. The weights climb to w + ρ w² g / |w g|, with elementwise products, where the
    gradient is h. The result is h - α g⊥, where g⊥ is the part of g that is orthogonal to h. Descent along it lowers the
    perturbed loss and the surrogate gap.

    Args:
        base: the objective, evaluated at both points on the same batch.
        rho: the radius ρ of the climb.
        alpha: the weight α of the orthogonal part.

    Returns:
        An objective that returns the loss at w.
    """

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        parameters = [p for p in net.parameters() if p.requires_grad]
        loss = base(net, batch)
        gradients = [_taken(p) for p in parameters]
        with torch.no_grad():
            adapted = [w.abs() * g for w, g in zip(parameters, gradients, strict=True)]
            factor = rho / (_norm(adapted) + _TINY)
            climbs = [factor * w.square() * g for w, g in zip(parameters, gradients, strict=True)]
            for parameter, climb in zip(parameters, climbs, strict=True):
                parameter.add_(climb)
        base(net, batch)
        with torch.no_grad():
            perturbed = [_taken(p) for p in parameters]
            overlap = sum((g * h).sum() for g, h in zip(gradients, perturbed, strict=True)) / (_norm(perturbed) ** 2 + _TINY)
            for parameter, climb, g, h in zip(parameters, climbs, gradients, perturbed, strict=True):
                parameter.sub_(climb)
                parameter.grad = h - alpha * (g - overlap * h)
        return loss

    return objective


def _taken(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, which is removed from it; zeros if it has none."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
    parameter.grad = None
    return gradient


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()
