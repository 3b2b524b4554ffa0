"""The exact gradient through an unrolled student, in the memory of one step (reverse mode after Maclaurin et al. 2015).

The forward sweep keeps the parameters θ_0 … θ_N, which are P numbers for each step, and no graph. For the last steps it may
also keep what the backward sweep would otherwise recompute; the numbers are the same. In the backward sweep, v = ∂L/∂θ_{n+1}.
The optimiser's pullback maps it to p, the derivative by the gradient g_n of step n, and one directional derivative of that
gradient gives everything else that the step needs:

    ∂L/∂x_n = ∂<g_n, p>/∂x_n      v <- (what the pullback passes on) + H_n p (+ the matching term of step n)

For plain gradient descent p = -α v, nothing but v is passed on, and ∂L/∂α -= <g_n, v>.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dstill.data import siamese
from dstill.derivatives.engine import Kept
from dstill.unrolling.optimisers import Optimiser
from dstill.unrolling.student import Student
from dstill.unrolling.types import FinalLoss, Gradients, Step, Targets, Trace, Unrolled


def adjoint(
    student: Student,
    theta0: Tensor,
    images: Tensor,
    labels: Tensor,
    steps: Sequence[Step],
    alpha: Tensor,
    outer: Targets | FinalLoss,
    *,
    optimiser: Optimiser,
    burn_in: int = 0,
    loss_scale: float = 1.0,
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
        alpha: the learning rate, or that of each step `[N]`.
        outer: step number to (expert vector `[P]`, weight), or a loss of θ_N.
        optimiser: the student's optimiser.
        burn_in: number of first steps that are not differentiated.
        loss_scale: ν of Eq. 21.
        hessian: False to drop the Hessian's term, TESLA's published approximation.
        keep: number of last steps that are not recomputed.
    """
    rates = alpha.expand(len(steps)) if alpha.ndim == 0 else alpha
    swept = _forward(student, theta0, images, labels, steps, rates, optimiser, burn_in, loss_scale, keep)
    by_images, by_rates = torch.zeros_like(images), torch.zeros_like(alpha)
    by_labels = torch.zeros_like(labels) if labels.is_floating_point() else None
    v, by_buffers = torch.zeros_like(theta0), optimiser.start(theta0)
    matches: dict[int, Tensor] = {}
    if callable(outer):
        loss, v = outer(swept.thetas[len(steps)])

    for n in range(len(steps), burn_in - 1, -1):
        if not callable(outer) and n in outer:
            target, weight = outer[n]
            difference = swept.thetas[n] - target
            matches[n] = weight * difference.square().sum()
            v = v + 2 * weight * difference
        if n == burn_in:
            break
        (rows, params), theta = steps[n - 1], swept.thetas[n - 1]
        with torch.no_grad():
            pulled = optimiser.pullback(theta, swept.steps[n], rates[n - 1], n, v, by_buffers)
        with torch.enable_grad():
            chosen = images.detach()[rows].requires_grad_()
            augmented = siamese.apply(chosen, params)
        t = student.tangents(theta, pulled.gradient, augmented, labels[rows], swept.kept.pop(n, None))
        by_rates[... if alpha.ndim == 0 else n - 1] += pulled.by_lr(loss_scale * t.h)
        (pulled_back,) = torch.autograd.grad(augmented, chosen, t.images) if params else (t.images,)
        by_images.index_add_(0, rows, loss_scale * pulled_back)
        if by_labels is not None and t.labels is not None:
            by_labels.index_add_(0, rows, loss_scale * t.labels)
        v, by_buffers = pulled.theta, pulled.buffers
        if hessian:
            v = v + loss_scale * t.theta

    if not callable(outer):
        loss = torch.stack([matches[n] for n in sorted(matches)]).sum()
    return Unrolled(loss, Gradients(by_images, by_labels, by_rates), Trace(swept.losses, matches, swept.thetas[len(steps)]))


class _Swept(NamedTuple):
    """What the forward sweep leaves, by step number: θ_n, what the optimiser kept, and what the student kept.

    `losses` are the inner losses of all steps.
    """

    thetas: dict[int, Tensor]
    steps: dict[int, tuple[Tensor, ...]]
    losses: list[Tensor]
    kept: dict[int, Kept | None]


@torch.no_grad()
def _forward(
    student: Student,
    theta0: Tensor,
    images: Tensor,
    labels: Tensor,
    steps: Sequence[Step],
    rates: Tensor,
    optimiser: Optimiser,
    burn_in: int,
    loss_scale: float,
    keep: int,
) -> _Swept:
    theta, buffers = theta0, optimiser.start(theta0)
    swept = _Swept({}, {}, [], {})
    for n, (rows, params) in enumerate(steps, 1):
        differentiated, keeping = n > burn_in, n > len(steps) - keep
        if differentiated:
            swept.thetas[n - 1] = theta
        loss, gradient, kept = student.gradient(theta, siamese.apply(images[rows], params), labels[rows], keep=keeping)
        theta, buffers, for_pullback = optimiser.step(theta, buffers, loss_scale * gradient, rates[n - 1], n)
        if keeping:
            swept.kept[n] = kept
        if differentiated:
            swept.steps[n] = for_pullback
        swept.losses.append(loss_scale * loss)
    swept.thetas[len(steps)] = theta
    return swept
