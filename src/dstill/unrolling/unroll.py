"""The unrolled gradient: how a synthetic set must change so that a student trained on it ends at better weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dstill.errors import DstillError, suggest
from dstill.support.devices import available_memory, full_precision
from dstill.unrolling.adjoint import adjoint
from dstill.unrolling.graph import graph
from dstill.unrolling.optimisers import Optimiser, Sgd
from dstill.unrolling.student import Student
from dstill.unrolling.types import FinalLoss, Gradients, Step, Targets, Trace, Unrolled

__all__ = ["FinalLoss", "Gradients", "Step", "Student", "Targets", "Trace", "Unrolled", "unroll"]

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
    targets: Targets | FinalLoss,
    *,
    optimiser: Optimiser = Sgd(),
    burn_in: int = 0,
    loss_scale: float = 1.0,
    gradient: Mode = "adjoint",
    memory: Memory = "auto",
    sharers: int = 1,
) -> Unrolled:
    """Runs the student for `len(steps)` steps and differentiates a loss of its weights.

    The student takes steps θ_{n+1} = step(θ_n, g_n, α) with g_n = loss_scale ∇_θ CE(f(A(x_n); θ_n), y_n). The outer loss is
    the matching loss L = Σ_k w_k |θ_k - θ*_k|² (paper Algorithm 2, Eq. 22), or any loss of θ_N, such as the cross-entropy of
    real images.

    Args:
        student: the network as pure functions.
        theta0: the student's parameters at the start, `[P]`; they are not differentiated.
        images: the synthetic set `[S, C, H, W]`, preprocessed.
        labels: class ids `[S]` (int64), or label logits `[S, K]` (floating-point), which are differentiated.
        steps: rows and augmentation of each step.
        alpha: the student's learning rate, a 0-d tensor, or that of each step, `[N]`; finite and not zero.
        targets: maps step numbers (1 … N) to (expert vector `[P]`, weight); or a function that maps θ_N to the value of a
            loss and its gradient `[P]`.
        optimiser: the student's optimiser; plain gradient descent if left out.
        burn_in: number of first steps that are run but not differentiated: the weights after them count as given.
        loss_scale: ν of the balanced loss (Eq. 21).
        gradient: `adjoint`: exact, in the memory of one step. `graph`: exact, by plain autograd, in the memory of all steps.
            `tesla`: approximate, without the Hessian term, as TESLA publishes it.
        memory: what the adjoint keeps of the forward sweep. `recompute`: θ_n alone, the memory of one step. `keep`: also the
            outputs of the convolutions of every step, about a fifth faster. `auto`: these outputs for as many steps as fit
            into half of the memory that is available now. On a CPU the numbers are the same to the last bit.
        sharers: number of unrolled students, with this one, that divide this memory between them.

    NVIDIA cards round the inputs of convolutions to TF32 by torch's default; here they do not (see `full_precision`).

    Returns:
        The outer loss, its gradients by images, labels and α, and a trace of the inner loop.

    Raises:
        DstillError: α is zero or not finite or has another shape, a target lies outside the differentiated steps, no target
            is given, `burn_in` leaves no step, or `gradient` is unknown.

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
    _check(len(steps), alpha, targets, burn_in, gradient)
    arguments = (student, theta0, images, labels, steps, alpha, targets)
    options: dict[str, Any] = {"optimiser": optimiser, "burn_in": burn_in, "loss_scale": loss_scale}
    if gradient == "graph":
        with full_precision():
            return graph(*arguments, **options)
    kept = min(_kept_steps(student, theta0, steps, memory, sharers), len(steps) - burn_in)
    return adjoint(*arguments, **options, hessian=gradient == "adjoint", keep=kept)


def _check(steps: int, alpha: Tensor, targets: Targets | FinalLoss, burn_in: int, gradient: str) -> None:
    if gradient not in ("adjoint", "graph", "tesla"):
        raise DstillError(f"unknown gradient {gradient!r}; {suggest(gradient, ('adjoint', 'graph', 'tesla'))}")
    if alpha.ndim and alpha.shape != (steps,):
        raise DstillError(f"α must be one number or one for each of the {steps} steps, got {tuple(alpha.shape)}")
    wrong = [value for value in alpha.reshape(-1).tolist() if not math.isfinite(value) or value == 0]
    if wrong:
        raise DstillError(f"the student learning rate α must be finite and not zero, got {wrong[0]}: lower lr_alpha")
    if not 0 <= burn_in < steps:
        raise DstillError(f"burn_in must leave at least one of the {steps} steps to be differentiated, got {burn_in}")
    if callable(targets):
        return
    outside = [n for n in targets if not burn_in < n <= steps]
    if outside or not targets:
        raise DstillError(f"matching points must lie in {burn_in + 1} … {steps}, at least one of them, got {sorted(targets)}")


def unrolled_bytes(
    student: Student, steps: int, batch: int, memory: Memory, device: torch.device, students: int = 1
) -> float | None:
    """About how much memory `unroll` keeps of `steps` steps with `batch` images each, besides vectors of the size of θ.

    That is for this number of students at a time. None if nothing can be kept, as for networks without hand-written
    derivatives.
    """
    of_one = student.kept_bytes(torch.zeros(1), batch)
    if of_one is None:
        return None
    a_step = students * of_one
    whole = a_step * steps
    some = min(whole, max(a_step, KEPT_SHARE * available_memory(device)))
    return {"keep": whole, "auto": some, "recompute": a_step}[memory]


def _kept_steps(student: Student, theta: Tensor, steps: Sequence[Step], memory: Memory, sharers: int) -> int:
    """For how many of the last steps the forward sweep keeps what the backward sweep needs."""
    a_step = student.kept_bytes(theta, max(len(step.rows) for step in steps)) if steps else None
    if memory == "recompute" or a_step is None:
        return 0
    if memory == "keep":
        return len(steps)
    return min(len(steps), int(KEPT_SHARE * available_memory(theta.device) / sharers / a_step))
