"""The four parts of AST's student alignment as pure functions (paper IV-C and IV-D)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from dstill.config.settings import Form
from dstill.errors import DstillError
from dstill.experts.trajectory import Segment
from dstill.unrolling.types import Targets


def balance_factor(
    start: int, max_start: int, *, offset: float = 8.0, base: float = math.e, middle: float | None = None
) -> float:
    """ν, the weight of the inner loss for a segment that starts at expert epoch `start` (paper Eq. 20).

    Early segments have far larger inner losses than late ones. The factor is below 1 before the middle of the range
    and above 1 after it, so that no range of start epochs dominates the images.

    Args:
        start: expert epoch the student starts from, 0 <= start < max_start.
        max_start: exclusive upper end of the start epochs, the paper's T+.
        offset: the paper's ϑ; keeps the logarithm positive.
        base: e in the paper, 5 in the released code.
        middle: the start at which the factor passes 1; T+ / 2 in the paper, rounded down in the released code.

    Raises:
        ValueError: `start` outside the range, or `offset` not above 1.

    Example:
        >>> round(balance_factor(0, 40), 3), round(balance_factor(39, 40), 3)
        (0.3, 3.296)
    """
    if not 0 <= start < max_start:
        raise ValueError(f"start epoch {start} is outside [0, {max_start}): check max_start_epoch in the recipe")
    if offset <= 1:
        raise ValueError(f"offset must be above 1 to keep the factor positive, got {offset}")
    distance = start - (max_start / 2 if middle is None else middle)
    weight = math.log(abs(distance) + offset) / math.log(base)
    return weight if distance >= 0 else 1 / weight


def balanced_loss(start: int, max_start: int, form: Form) -> float:
    """ν of the balanced inner loss ν CE (Eq. 21): natural logarithm (paper), base 5 (released code), or 1 (off).

    Example:
        >>> round(balanced_loss(7, 15, "released"), 3), round(balanced_loss(7, 15, "paper"), 3)
        (1.292, 0.467)
    """
    match form:
        case "off":
            return 1.0
        case "paper":
            return balance_factor(start, max_start)
        case "released":
            return balance_factor(start, max_start, base=5.0, middle=max_start // 2)


def matching_points(student_steps: int, expert_epochs: int, form: Form) -> dict[int, int]:
    """When student and expert are compared (Eq. 22 and Algorithm 2), as student step -> expert epochs after the start.

    Args:
        student_steps: N.
        expert_epochs: M.
        form: `paper`: after floor(kN/M) steps; `released`: after k floor(N/M) steps; `off`: only the final match.

    Example:
        >>> matching_points(20, 3, "paper"), matching_points(20, 3, "released"), matching_points(20, 3, "off")
        ({6: 1, 13: 2, 20: 3}, {6: 1, 12: 2, 20: 3}, {20: 3})
    """
    points: dict[int, int] = {}
    if form != "off":
        for k in range(1, expert_epochs):
            at = k * student_steps // expert_epochs if form == "paper" else k * (student_steps // expert_epochs)
            points[at] = k
    return {**points, student_steps: expert_epochs}


def intermediate_matching(
    segment: Segment, start: Tensor, student_steps: int, form: Form, scale: Literal["equal", "ramp"]
) -> Targets:
    """Targets and weights β_k / |start - θ*_{t+k}|² of the total matching loss (Eq. 22).

    Args:
        segment: the expert's weights, from the start epoch on.
        start: the vector the denominators are measured from (the perturbed start, or θ*_t).
        student_steps: N.
        form: which intermediate points are matched, see `matching_points`.
        scale: β = 1 for all, or k / M for the k-th intermediate one; the final match always has weight 1.

    Raises:
        DstillError: the expert's weights do not change, so that Eq. 22 would divide by zero.
    """
    span = len(segment.targets)
    targets: dict[int, tuple[Tensor, float]] = {}
    for step, ahead in matching_points(student_steps, span, form).items():
        target = segment.targets[ahead - 1]
        beta = ahead / span if scale == "ramp" else 1.0
        distance = float((start - target).square().sum())
        if distance == 0:
            raise DstillError(
                f"expert {segment.expert} does not change between epochs {segment.epoch} and {segment.epoch + ahead}: "
                "there is nothing to match; train it with a higher experts.lr"
            )
        targets[step] = (target, beta / distance)
    return targets


def perturb_weights(parameters: Sequence[Tensor], form: Form, rho: float, generator: torch.Generator) -> list[Tensor]:
    """θ perturbed filter by filter (paper Eq. 23); 1-d parameters are returned unchanged.

    Args:
        parameters: weights in their own shapes; a filter is an output channel of a convolution or a row of a linear layer.
        form: `paper`: for each filter d ~ N(0, 1), d / |d| |θ_filter|, times `rho`. `released`: convolutions only, one draw per
            layer, (d / |d|) ⊙ θ. A layer of 128 to 128 channels then moves about 40 times less, and the whole vector 5 (width
            32) to 10 times (width 128). `off`: no change.
        rho: relative size of the perturbation in the paper's form.
        generator: CPU generator.
    """
    return [_perturbed(weight, form, rho, generator) for weight in parameters]


def _perturbed(weight: Tensor, form: Form, rho: float, generator: torch.Generator) -> Tensor:
    if form == "off" or weight.ndim < 2 or (form == "released" and weight.ndim != 4):
        return weight
    noise = torch.randn(weight.shape, generator=generator).to(weight)
    if form == "released":
        return weight + noise / noise.norm() * weight
    axes = tuple(range(1, weight.ndim))
    noise_norm = noise.square().sum(axes, keepdim=True).sqrt()
    filter_norm = weight.square().sum(axes, keepdim=True).sqrt()
    return weight + rho * noise / noise_norm * filter_norm
