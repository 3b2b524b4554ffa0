"""What goes into an unrolled gradient and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from dstill.data.siamese import Params


class Step(NamedTuple):
    """One student step: the rows of the synthetic set it sees, and the augmentation drawn for them."""

    rows: Tensor
    augmentation: Params | None


# After how many steps -> (expert parameters, weight); the weight holds the denominator of Eq. 22.
Targets = Mapping[int, tuple[Tensor, float]]


@dataclass(frozen=True)
class Gradients:
    """Gradients of the matching loss by images, label logits (None for class ids) and α, each in its input's shape."""

    images: Tensor
    labels: Tensor | None
    alpha: Tensor


@dataclass(frozen=True)
class Trace:
    """What happened inside, detached.

    Attributes:
        inner_losses: scaled loss of the student before each step.
        matches: weighted squared distance at each matching point.
        theta: the student after the last step.
    """

    inner_losses: list[Tensor]
    matches: dict[int, Tensor]
    theta: Tensor


@dataclass(frozen=True)
class Unrolled:
    """The matching loss, its gradients, and a trace."""

    loss: Tensor
    grads: Gradients
    trace: Trace
