"""The inputs and results of the unrolled gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dstill.data.siamese import Params


class Step(NamedTuple):
    """One step of the student.

    Attributes:
        rows: row numbers of the synthetic images in the batch, int64 `[B]`.
        augmentation: the augmentation drawn for this batch by `dstill.data.siamese.sample`; None for none.
    """

    rows: Tensor
    augmentation: Params | None


# Maps a number of steps to (expert parameters, weight). The weight holds the denominator of Eq. 22.
Targets = Mapping[int, tuple[Tensor, float]]
# Maps θ_N `[P]` to the value of a loss and its gradient by θ_N, both detached.
FinalLoss = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Gradients:
    """Gradients of the outer loss, each in the shape of its input.

    Attributes:
        images: with respect to the synthetic images.
        labels: with respect to the label logits; None for class ids.
        alpha: with respect to the learning rate α, or to the learning rate of each step.
    """

    images: Tensor
    labels: Tensor | None
    alpha: Tensor


@dataclass(frozen=True)
class Trace:
    """What happened during the unrolling, detached.

    Attributes:
        inner_losses: the student's loss before each step, times `loss_scale`.
        matches: the weighted squared distance at each matching point, by step number; empty for a loss of θ_N.
        theta: the student's parameters after the last step, `[P]`.
    """

    inner_losses: list[Tensor]
    matches: dict[int, Tensor]
    theta: Tensor


@dataclass(frozen=True)
class Unrolled:
    """The result of `dstill.unrolling.unroll.unroll`.

    Attributes:
        loss: the outer loss.
        grads: its gradients.
        trace: what happened during the unrolling.
    """

    loss: Tensor
    grads: Gradients
    trace: Trace
