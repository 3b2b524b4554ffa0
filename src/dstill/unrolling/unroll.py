"""The unrolled gradient: how a synthetic set must change so that a student trained on it ends where the expert does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dstill.errors import DstillError, suggest
from dstill.support.devices import available_memory, full_precision
from dstill.unrolling.adjoint import adjoint
from dstill.unrolling.graph import graph
from dstill.unrolling.student import Student, sgd_step
from dstill.unrolling.types import Gradients, Step, Targets, Trace, Unrolled

__all__ = ["Gradients", "Step", "Student", "Targets", "Trace", "Unrolled", "sgd_step", "unroll"]

Mode = Literal["adjoint", "graph", "tesla"]
Memory = Literal["auto", "keep", "recompute"]

KEPT_SHARE = 0.5  # share of the memory available now that `memory="auto"` may use


def unroll(
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
    gradient: Mode = "adjoint",
    memory: Memory = "auto",
) -> Unrolled:
    """Runs the student for `len(steps)` steps and differentiates the matching loss (paper Algorithm 2, Eq. 22).

        b_{n+1} = momentum b_n + loss_scale ∇_θ CE(f(A(x_n); θ_n), y_n),   θ_{n+1} = θ_n - α b_{n+1}
        L = Σ_k w_k |θ_k - θ*_k|²

    Args:
        student: the network as pure functions.
        theta0: the student's parameters at the start, `[P]`; they are not differentiated.
        images: the synthetic set `[S, C, H, W]`, preprocessed.
        labels: class ids `[S]` (int64), or label logits `[S, K]` (floating-point), which are differentiated.
        steps: rows and augmentation of each step.
        alpha: the student's learning rate, a 0-d tensor, finite and not zero.
        targets: maps step numbers (1 … N) to (expert vector `[P]`, weight).
        loss_scale: ν of the balanced loss (Eq. 21).
        momentum: momentum of the student's SGD; 0.9 in the released code, none in the paper.
        gradient: `adjoint`: exact, in the memory of one step. `graph`: exact, by plain autograd, in the memory of all steps.
            `tesla`: approximate, without the Hessian term, as TESLA publishes it.
        memory: what the adjoint keeps of the forward sweep. `recompute`: θ_n alone, the memory of one step. `keep`: also the
            outputs of the convolutions of every step, about a fifth faster. `auto`: these outputs for as many steps as fit
            into half of the memory that is available now. On a CPU the numbers are the same to the last bit.

    NVIDIA cards round the inputs of convolutions to TF32 by torch's default; here they do not (see `full_precision`).

    Returns:
        The matching loss, its gradients by images, labels and α, and a trace of the inner loop.

    Raises:
        DstillError: α is zero or not finite, a target lies outside 1 … N, no target is given, or `gradient` is unknown.

    Example:
        >>> import torch
        >>> from dstill.nets.convnet import ConvNet
        >>> student = Student(ConvNet(1, 2, (4, 4), width=2, depth=1))
        >>> theta, images, labels = torch.zeros(student.numel), torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
        >>> steps = [Step(rows=torch.arange(2), augmentation=None)] * 3
        >>> result = unroll(student, theta, images, labels, steps, torch.tensor(0.1), targets={3: (theta + 1, 1.0)})
        >>> result.grads.images.shape, len(result.trace.inner_losses)
        (torch.Size([2, 1, 4, 4]), 3)
    """
    if not math.isfinite(float(alpha)) or float(alpha) == 0:
        raise DstillError(f"the student learning rate α must be finite and not zero, got {float(alpha)}: lower lr_alpha")
    if gradient not in ("adjoint", "graph", "tesla"):
        raise DstillError(f"unknown gradient {gradient!r}; {suggest(gradient, ('adjoint', 'graph', 'tesla'))}")
    outside = [n for n in targets if not 1 <= n <= len(steps)]
    if outside or not targets:
        raise DstillError(f"matching points must lie in 1 … {len(steps)}, at least one of them, got {sorted(targets)}")
    arguments = (student, theta0, images, labels, steps, alpha, targets)
    if gradient == "graph":
        with full_precision():
            return graph(*arguments, loss_scale=loss_scale, momentum=momentum)
    kept = _kept_steps(student, theta0, steps, memory)
    return adjoint(*arguments, loss_scale=loss_scale, momentum=momentum, hessian=gradient == "adjoint", keep=kept)


def _kept_steps(student: Student, theta: Tensor, steps: Sequence[Step], memory: Memory) -> int:
    """For how many of the last steps the forward sweep keeps what the backward sweep needs."""
    a_step = student.kept_bytes(theta, len(steps[-1].rows)) if steps else None
    if memory == "recompute" or a_step is None:
        return 0
    return len(steps) if memory == "keep" else min(len(steps), int(KEPT_SHARE * available_memory(theta.device) / a_step))
