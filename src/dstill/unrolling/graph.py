"""The unrolled gradient by plain autograd: the reference that `adjoint` is tested against. Its memory grows with every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dstill.data import siamese
from dstill.unrolling.student import Student, sgd_step
from dstill.unrolling.types import Gradients, Step, Targets, Trace, Unrolled


def graph(
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
) -> Unrolled:
    """The unrolled gradient by autograd; the arguments are those of `dstill.unrolling.unroll.unroll`."""
    soft = labels.is_floating_point()
    with torch.enable_grad():
        images, alpha = images.detach().requires_grad_(), alpha.detach().requires_grad_()
        labels = labels.detach().requires_grad_(soft)
        # θ_0 requires a gradient only so that the first step can be differentiated. Later θ depend on images, labels and α.
        theta, buffer = theta0.detach().requires_grad_(), torch.zeros_like(theta0)
        losses: list[Tensor] = []
        matches: dict[int, Tensor] = {}
        for n, (rows, params) in enumerate(steps, 1):
            loss = loss_scale * student.loss(theta, siamese.apply(images[rows], params), labels[rows])
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta, buffer = sgd_step(theta, buffer, gradient, alpha, momentum)
            losses.append(loss.detach())
            if n in targets:
                target, weight = targets[n]
                matches[n] = weight * (theta - target).square().sum()
        loss = torch.stack([matches[n] for n in sorted(matches)]).sum()
        by = torch.autograd.grad(loss, [images, alpha, labels] if soft else [images, alpha])
    gradients = Gradients(by[0], by[2] if soft else None, by[1])
    return Unrolled(loss.detach(), gradients, Trace(losses, {n: m.detach() for n, m in matches.items()}, theta.detach()))
