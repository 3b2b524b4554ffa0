"""The exact gradient through an unrolled student in the memory of one step (reverse mode after Maclaurin et al. 2015).

Forward, the sweep keeps the parameters θ_0 … θ_N: P numbers a step, no graph. Backward, with v = ∂L/∂θ_{n+1}, one
directional derivative of one gradient gives everything step n needs:

    ∂L/∂x_n = -α ∂<g_n, v>/∂x_n      ∂L/∂α -= <g_n, v>      v <- v - α H_n v (+ the matching term of step n)

With inner momentum γ, where b' = γ b + g and θ' = θ - α b', the gradient g_n receives p = ∂L/∂b - α v in place of -α v,
and γ p is handed on to the buffer of the step before: one more adjoint vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dstill.data import siamese
from dstill.unroll.student import Student, sgd_step
from dstill.unroll.types import Gradients, Step, Targets, Trace, Unrolled


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
) -> Unrolled:
    """See `dstill.unroll.unroll`. `hessian=False` drops H_n v: TESLA's published approximation."""
    thetas, buffers, losses = _forward(student, theta0, images, labels, steps, alpha, loss_scale, momentum)
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
        t = student.tangents(thetas[n - 1], p, augmented, labels[rows])
        # Without momentum p = -α v, so h = <g, p> already holds <g, v>.
        by_alpha -= buffers[n] @ v if momentum else -loss_scale * t.h / alpha
        (pulled_back,) = torch.autograd.grad(augmented, chosen, t.images) if params else (t.images,)
        by_images.index_add_(0, rows, loss_scale * pulled_back)
        if by_labels is not None and t.labels is not None:
            by_labels.index_add_(0, rows, loss_scale * t.labels)
        if hessian:
            v = v + loss_scale * t.theta
        by_buffer = momentum * p

    loss = torch.stack([matches[n] for n in sorted(matches)]).sum()
    return Unrolled(loss, Gradients(by_images, by_labels, by_alpha), Trace(losses, matches, thetas[-1]))


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
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """θ_0 … θ_N, the momentum buffers (kept only where there is momentum), and the inner losses."""
    theta, buffer = theta0, torch.zeros_like(theta0)
    thetas, buffers, losses = [theta], [buffer], []
    for rows, params in steps:
        loss, gradient = student.gradient(theta, siamese.apply(images[rows], params), labels[rows])
        theta, buffer = sgd_step(theta, buffer, loss_scale * gradient, alpha, momentum)
        thetas.append(theta)
        losses.append(loss_scale * loss)
        if momentum:
            buffers.append(buffer)
    return thetas, buffers, losses
