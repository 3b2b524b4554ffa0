"""Soft labels from an expert: the logits that its weights give to the synthetic images (TESLA)."""

from __future__ import annotations

import torch
from torch import Tensor

from dstill.support.devices import full_precision
from dstill.unrolling.student import Student

_BLOCK = 256  # images at a time, so that the memory stays below that of a student step


@torch.no_grad()
@full_precision()
def expert_labels(student: Student, theta: Tensor, images: Tensor) -> Tensor:
    """Logits `[S, K]` of a network with the weights `theta` `[P]` on images `[S, C, H, W]`."""
    return torch.cat([student.logits(theta, block) for block in images.split(_BLOCK)])


@full_precision()
def gradient_through_labels(student: Student, theta: Tensor, images: Tensor, by_labels: Tensor) -> Tensor:
    """Pulls a gradient by the labels `[S, K]` back through the expert to the images `[S, C, H, W]`."""
    parts = list[Tensor]()
    for block, gradient in zip(images.split(_BLOCK), by_labels.split(_BLOCK), strict=True):
        block = block.detach().requires_grad_()
        with torch.enable_grad():
            labels = student.logits(theta, block)
        parts.append(torch.autograd.grad(labels, block, gradient)[0])
    return torch.cat(parts)
