"""Flat experts: surrogate-gap sharpness-aware minimisation (GSAM), as FTD trains its experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dstill.training.fit import Batch, Objective

_TINY = 1e-12


def gsam_objective(base: Objective, rho: float, alpha: float) -> Objective:
    """Wraps an objective: the gradient left behind is GSAM's, adaptive form.

    With g the gradient at w, the weights climb to w + ρ w² g / |w g| (elementwise w), where the gradient is h. The descent
    direction is h - α g⊥, g⊥ being the part of g orthogonal to h: it lowers the perturbed loss and the surrogate gap.

    Args:
        base: objective evaluated at both points, on the same batch.
        rho: radius of the climb.
        alpha: weight of the orthogonal part.
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
    """The parameter's gradient, which it then no longer holds."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
    parameter.grad = None
    return gradient


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()
