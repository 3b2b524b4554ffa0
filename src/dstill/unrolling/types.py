"""The inputs and results of the unrolled gradient."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True)
class Gradients:
    """Gradients of the matching loss, each in the shape of its input.

    Attributes:
        images: with respect to the synthetic images.
        labels: with respect to the label logits; None for class ids.
        alpha: with respect to the learning rate α.
    """

    images: Tensor
    labels: Tensor | None
    alpha: Tensor


@dataclass(frozen=True)
class Trace:
    """What happened during the unrolling, detached.

    Attributes:
        inner_losses: the student's loss before each step, times `loss_scale`.
        matches: the weighted squared distance at each matching point, by step number.
        theta: the student's parameters after the last step, `[P]`.
    """

    inner_losses: list[Tensor]
    matches: dict[int, Tensor]
    theta: Tensor


@dataclass(frozen=True)
class Unrolled:
    """The result of `dstill.unrolling.unroll.unroll`.

    Attributes:
        loss: the matching loss.
        grads: its gradients.
        trace: what happened during the unrolling.
    """

    loss: Tensor
    grads: Gradients
    trace: Trace
