"""The unrolled gradient by plain autograd: the reference that `adjoint` is tested against. Its memory grows with every step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dstill.data import siamese
from dstill.unrolling.optimisers import Buffers, Optimiser
from dstill.unrolling.student import Student
from dstill.unrolling.types import FinalLoss, Gradients, Step, Targets, Trace, Unrolled


def graph(
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
) -> Unrolled:
    """The unrolled gradient by autograd; the arguments are those of `dstill.unrolling.unroll.unroll`."""
    soft = labels.is_floating_point()
    with torch.enable_grad():
        images, alpha = images.detach().requires_grad_(), alpha.detach().requires_grad_()
        labels = labels.detach().requires_grad_(soft)
        rates = alpha.expand(len(steps)) if alpha.ndim == 0 else alpha
        # θ_0 requires a gradient only so that the first step can be differentiated. Later θ depend on images, labels and α.
        theta: Tensor = theta0.detach().requires_grad_()
        buffers: Buffers = optimiser.start(theta0)
        losses: list[Tensor] = []
        matches: dict[int, Tensor] = {}
        for n, (rows, params) in enumerate(steps, 1):
            loss = loss_scale * student.loss(theta, siamese.apply(images[rows], params), labels[rows])
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=n > burn_in)
            theta, buffers, _ = optimiser.step(theta, buffers, gradient, rates[n - 1], n)
            if n <= burn_in:  # what happened so far counts as given
                theta, buffers = theta.detach().requires_grad_(), tuple(buffer.detach() for buffer in buffers)
            losses.append(loss.detach())
            if not callable(outer) and n in outer:
                target, weight = outer[n]
                matches[n] = weight * (theta - target).square().sum()
        if callable(outer):
            value, gradient = outer(theta.detach())
            loss = (gradient * theta).sum()  # has the gradient of the outer loss
        else:
            value = loss = torch.stack([matches[n] for n in sorted(matches)]).sum()
        inputs = [images, alpha, labels] if soft else [images, alpha]
        by = torch.autograd.grad(loss, inputs, materialize_grads=True)
    gradients = Gradients(by[0], by[2] if soft else None, by[1])
    return Unrolled(value.detach(), gradients, Trace(losses, {n: m.detach() for n, m in matches.items()}, theta.detach()))
