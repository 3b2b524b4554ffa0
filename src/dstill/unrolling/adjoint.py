"""The exact gradient through an unrolled student, in the memory of one step (reverse mode after Maclaurin et al. 2015).

The forward sweep keeps the parameters θ_0 … θ_N, which are P numbers for each step, and no graph. For the last steps it may
also keep what the backward sweep would otherwise recompute; the numbers are the same. In the backward sweep, v = ∂L/∂θ_{n+1},
and one directional derivative of one gradient gives everything that step n needs:

    ∂L/∂x_n = -α ∂<g_n, v>/∂x_n      ∂L/∂α -= <g_n, v>      v <- v - α H_n v (+ the matching term of step n)

With inner momentum γ, b' = γ b + g and θ' = θ - α b'. Then p = ∂L/∂b - α v takes the place of -α v, and γ p is passed on to
the buffer of the step before: one more adjoint vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dstill.data import siamese
from dstill.derivatives.engine import Kept
from dstill.unrolling.student import Student, sgd_step
from dstill.unrolling.types import Gradients, Step, Targets, Trace, Unrolled


def adjoint(
    student: Student,
    theta0: Tensor,
    images: Tensor,
    labels: Tensor,
    steps: Sequence[Step],
    alpha: Tensor,
    targets: Targets,
    *,
    loss_scale: float = 1.0,
    momentum: float = 0.0,
    hessian: bool = True,
    keep: int = 0,
) -> Unrolled:
    """The unrolled gradient by a forward and a backward sweep; see `dstill.unrolling.unroll.unroll`.

    Args:
        student: the network as pure functions.
        theta0: start `[P]`.
        images: the synthetic set `[S, C, H, W]`, preprocessed.
        labels: class ids `[S]` or label logits `[S, K]`.
        steps: rows and augmentation of each step.
        alpha: the student's learning rate.
        targets: step number to (expert vector `[P]`, weight).
        loss_scale: ν of Eq. 21.
        momentum: momentum of the student's SGD.
        hessian: False to drop H_n v, TESLA's published approximation.
        keep: number of last steps that are not recomputed.
    """
    swept = _forward(student, theta0, images, labels, steps, alpha, loss_scale, momentum, keep)
    thetas, buffers = swept.thetas, swept.buffers
    by_images, by_alpha = torch.zeros_like(images), torch.zeros_like(alpha)
    by_labels = torch.zeros_like(labels) if labels.is_floating_point() else None
    v, by_buffer = torch.zeros_like(theta0), torch.zeros_like(theta0)
    matches: dict[int, Tensor] = {}

    for n in range(len(steps), -1, -1):
        if n in targets:
            target, weight = targets[n]
            difference = thetas[n] - target
            matches[n] = weight * difference.square().sum()
            v = v + 2 * weight * difference
        if n == 0:
            break
        rows, params = steps[n - 1]
        p = by_buffer - alpha * v
        with torch.enable_grad():
            chosen = images.detach()[rows].requires_grad_()
            augmented = siamese.apply(chosen, params)
        t = student.tangents(thetas[n - 1], p, augmented, labels[rows], swept.kept.pop(n, None))
        # Without momentum, p = -α v, so h = <g, p> also gives <g, v>.
        by_alpha -= buffers[n] @ v if momentum else -loss_scale * t.h / alpha
        (pulled_back,) = torch.autograd.grad(augmented, chosen, t.images) if params else (t.images,)
        by_images.index_add_(0, rows, loss_scale * pulled_back)
        if by_labels is not None and t.labels is not None:
            by_labels.index_add_(0, rows, loss_scale * t.labels)
        if hessian:
            v = v + loss_scale * t.theta
        by_buffer = momentum * p

    loss = torch.stack([matches[n] for n in sorted(matches)]).sum()
    return Unrolled(loss, Gradients(by_images, by_labels, by_alpha), Trace(swept.losses, matches, thetas[-1]))


class _Swept(NamedTuple):
    """θ_0 … θ_N, the momentum buffers (if there is momentum), the inner losses, and what was kept of the last steps."""

    thetas: list[Tensor]
    buffers: list[Tensor]
    losses: list[Tensor]
    kept: dict[int, Kept | None]


@torch.no_grad()
def _forward(
    student: Student,
    theta0: Tensor,
    images: Tensor,
    labels: Tensor,
    steps: Sequence[Step],
    alpha: Tensor,
    loss_scale: float,
    momentum: float,
    keep: int,
) -> _Swept:
    theta, buffer = theta0, torch.zeros_like(theta0)
    swept = _Swept([theta], [buffer], [], {})
    for n, (rows, params) in enumerate(steps, 1):
        keeping = n > len(steps) - keep
        loss, gradient, kept = student.gradient(theta, siamese.apply(images[rows], params), labels[rows], keep=keeping)
        if keeping:
            swept.kept[n] = kept
        theta, buffer = sgd_step(theta, buffer, loss_scale * gradient, alpha, momentum)
        swept.thetas.append(theta)
        swept.losses.append(loss_scale * loss)
        if momentum:
            swept.buffers.append(buffer)
    return swept
