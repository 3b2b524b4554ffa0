"""Soft labels from experts: the logits that their weights give to the synthetic images (TESLA, DATM)."""

from __future__ import annotations

import torch
from torch import Tensor

from dstill.experts.trajectory import Trajectories
from dstill.support.devices import full_precision
from dstill.unrolling.student import Student

_BLOCK = 256  # images at a time, so that the memory stays below that of a student step


@torch.no_grad()
@full_precision()
def expert_labels(student: Student, theta: Tensor, images: Tensor) -> Tensor:
    """Logits `[S, K]` of a network with the weights `theta` `[P]` on images `[S, C, H, W]`."""
    return torch.cat([student.logits(theta, block) for block in images.split(_BLOCK)])


def mean_expert_labels(student: Student, trajectories: Trajectories, images: Tensor, labels: Tensor) -> Tensor:
    """The mean logits `[S, K]` of the experts that classify an image correctly, each at its last epoch (DATM, Sec. 3.3).

    An image that no expert classifies correctly gets the mean over all experts.

    Args:
        student: the network as pure functions.
        trajectories: the experts.
        images: `[S, C, H, W]`, preprocessed.
        labels: class ids `[S]`.
    """
    total, right_total = torch.zeros(()), torch.zeros(())
    count = torch.zeros(len(images), 1, device=images.device)
    for expert in range(len(trajectories)):
        logits = expert_labels(student, last_weights(trajectories, expert).to(images), images)
        right = (logits.argmax(1) == labels).unsqueeze(1)
        total, right_total, count = total + logits, right_total + torch.where(right, logits, 0.0), count + right
    return torch.where(count > 0, right_total / count.clamp_min(1), total / len(trajectories))


def last_weights(trajectories: Trajectories, expert: int) -> Tensor:
    """The weights `[P]` of an expert after its last epoch, on the CPU."""
    return trajectories.rows(expert, trajectories.epochs, trajectories.epochs + 1)[0]


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
