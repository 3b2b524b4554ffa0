"""LAMB (You et al. 2020), which torch lacks, and its cosine schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dstill.methods.base import State

_BETAS = (0.9, 0.999)
_EPSILON = 1e-6
_FLOOR = 0.1


def cosine(lr: float, iteration: int, total: int) -> float:
    """The learning rate: `lr` at iteration 0, a tenth of it at `total`, along half a cosine."""
    return lr * (_FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * iteration / total)))


def lamb_step(state: State, name: str, gradient: Tensor, lr: float, step: int) -> None:
    """One step on `state[name]`, with the moments in `name.first` and `name.second`.

        m = β1 m + (1 - β1) g     v = β2 v + (1 - β2) g^2     u = m^ / (sqrt(v^) + ε)     w = w - lr |w| / |u| u

    m^ and v^ are m and v corrected for their bias towards zero; if |w| or |u| is zero, their ratio is 1.

    Args:
        state: holds the tensor and its moments; all three are replaced.
        name: name of the tensor.
        gradient: gradient by the tensor.
        lr: step size relative to the tensor's norm.
        step: 1 for the first.
    """
    weight, (beta1, beta2) = state[name], _BETAS
    first = beta1 * state[f"{name}.first"] + (1 - beta1) * gradient
    second = beta2 * state[f"{name}.second"] + (1 - beta2) * gradient.square()
    update = first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + _EPSILON)
    ratio = weight.norm() / update.norm()
    trust = torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio))
    state[name], state[f"{name}.first"], state[f"{name}.second"] = weight - lr * trust * update, first, second
