"""Soft labels from an expert: the logits that its weights give to the synthetic images (TESLA)."""

from __future__ import annotations

import torch
from torch import Tensor

from dstill.support.devices import full_precision
from dstill.unrolling.student import Student

_BLOCK = 256  # images at a time: no more memory than a step of the student needs


@torch.no_grad()
@full_precision()
def expert_labels(student: Student, theta: Tensor, images: Tensor) -> Tensor:
    """Label logits `[S, K]` that a network with the weights `theta` `[P]` gives to images `[S, C, H, W]`."""
    return torch.cat([student.logits(theta, block) for block in images.split(_BLOCK)])


@full_precision()
def gradient_through_labels(student: Student, theta: Tensor, images: Tensor, by_labels: Tensor) -> Tensor:
    """What a gradient by `expert_labels` `[S, K]` means for the images `[S, C, H, W]`: the pullback through the expert."""
    parts = list[Tensor]()
    for block, gradient in zip(images.split(_BLOCK), by_labels.split(_BLOCK), strict=True):
        block = block.detach().requires_grad_()
        with torch.enable_grad():
            labels = student.logits(theta, block)
        parts.append(torch.autograd.grad(labels, block, gradient)[0])
    return torch.cat(parts)
