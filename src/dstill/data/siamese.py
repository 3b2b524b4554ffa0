"""Differentiable siamese augmentation, DSA (Zhao and Bilen 2021).

`sample` draws the parameters; `apply` is a pure, differentiable function of `(images, params)`. The two are separate so that a
step of the unrolled student can be recomputed exactly, and so that one draw can be applied to a real and a synthetic batch of
different sizes. Every operation is vectorised over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dstill.errors import DstillError, suggest
from dstill.support.devices import sent

SCALE_RATIO = 1.2
ROTATE_DEGREES = 15.0
CROP_SHARE = 0.125
CUTOUT_SHARE = 0.5


@dataclass(frozen=True)
class Params:
    """One draw: an operation and its parameters.

    Attributes:
        op: name of the operation, a key of `OPS`.
        values: parameters `[B, k]` with one row for each image, or `[1, k]` for all images of a batch.
    """

    op: str
    values: Tensor


def _uniform(rows: int, generator: torch.Generator, *ranges: tuple[float, float]) -> Tensor:
    unit = torch.rand(rows, len(ranges), generator=generator)
    low = torch.tensor([a for a, _ in ranges])
    high = torch.tensor([b for _, b in ranges])
    return low + unit * (high - low)


def _colour(x: Tensor, v: Tensor) -> Tensor:
    """Adds U(-0.5, 0.5) to brightness, scales saturation by U(0, 2) about grey and contrast by U(0.5, 1.5) about the mean."""
    brightness, saturation, contrast = (v[:, i].view(-1, 1, 1, 1) for i in range(3))
    x = x + brightness
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * saturation + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * contrast + mean


def _affine(x: Tensor, matrix: Tensor) -> Tensor:
    """Bilinear resampling with zero padding and aligned corners; `matrix` is `[B or 1, 2, 3]`."""
    grid = F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=True)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def _scale(x: Tensor, v: Tensor) -> Tensor:
    """Scales x and y by independent factors from U(1/1.2, 1.2)."""
    zero = torch.zeros_like(v[:, 0])
    return _affine(x, torch.stack([v[:, 0], zero, zero, zero, v[:, 1], zero], 1).view(-1, 2, 3))


def _rotate(x: Tensor, v: Tensor) -> Tensor:
    """Rotates by an angle from U(-15, 15) degrees."""
    angle = v[:, 0] * (math.pi / 180)
    zero, sin, cos = torch.zeros_like(angle), angle.sin(), angle.cos()
    return _affine(x, torch.stack([cos, -sin, zero, sin, cos, zero], 1).view(-1, 2, 3))


def _flip(x: Tensor, v: Tensor) -> Tensor:
    """Mirrors left and right with probability 1/2."""
    return torch.where((v < 0.5).view(-1, 1, 1, 1), x.flip(3), x)


def _positions(unit: Tensor, count: int) -> Tensor:
    """Integers 0 .. count - 1 from uniform draws in [0, 1)."""
    return (unit * count).long().clamp_max(count - 1)


def _crop(x: Tensor, v: Tensor) -> Tensor:
    """Pads with zeros by 12.5 % of the side and cuts a random window: a shift of at most round(0.125 side) pixels."""
    for axis, unit in ((2, v[:, 0]), (3, v[:, 1])):
        side = x.shape[axis]
        reach = round(CROP_SHARE * side)
        source = _positions(unit, 2 * reach + 1).view(-1, 1) + torch.arange(side, device=x.device)
        shape = [len(v), 1, 1, 1]
        shape[axis] = side
        padding = (0, 0, reach, reach) if axis == 2 else (reach, reach)
        x = F.pad(x, padding).gather(axis, source.view(shape).expand(x.shape))
    return x


def _cutout(x: Tensor, v: Tensor) -> Tensor:
    """Sets a square with half the side to zero, at a random centre; it is clipped at the border."""
    inside: list[Tensor] = []
    for axis, unit in ((2, v[:, 0]), (3, v[:, 1])):
        side = x.shape[axis]
        hole = int(CUTOUT_SHARE * side + 0.5)
        first = _positions(unit, side + 1 - hole % 2) - hole // 2
        pixel = torch.arange(side, device=x.device)
        inside.append((pixel >= first.view(-1, 1)) & (pixel < first.view(-1, 1) + hole))
    hole_mask = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x * (~hole_mask).to(x.dtype)


@dataclass(frozen=True)
class _Op:
    apply: Callable[[Tensor, Tensor], Tensor]
    ranges: tuple[tuple[float, float], ...]


_UNIT = (0.0, 1.0)
_ZOOM = (1 / SCALE_RATIO, SCALE_RATIO)
OPS: dict[str, _Op] = {
    "colour": _Op(_colour, ((-0.5, 0.5), (0.0, 2.0), (0.5, 1.5))),
    "crop": _Op(_crop, (_UNIT, _UNIT)),
    "cutout": _Op(_cutout, (_UNIT, _UNIT)),
    "flip": _Op(_flip, (_UNIT,)),
    "scale": _Op(_scale, (_ZOOM, _ZOOM)),
    "rotate": _Op(_rotate, ((-ROTATE_DEGREES, ROTATE_DEGREES),)),
}


def parse(strategy: str) -> tuple[str, ...]:
    """The operations of a strategy.

    Args:
        strategy: names of operations joined by `_`, such as `colour_crop_cutout_flip_scale_rotate`, or `none`.

    Returns:
        The names, in this order; empty for `none`.

    Raises:
        DstillError: an operation is unknown.

    Example:
        >>> parse("flip_crop"), parse("none")
        (('flip', 'crop'), ())
    """
    ops = tuple(op for op in strategy.split("_") if op and op != "none")
    for op in ops:
        if op not in OPS:
            raise DstillError(f"unknown augmentation {op!r} in {strategy!r}; {suggest(op, OPS)}")
    return ops


def sample(strategy: str, batch: int, generator: torch.Generator, *, shared: bool = False) -> Params | None:
    """Draws one operation for the whole batch, each with the same probability, and its parameters for each image.

    Args:
        strategy: names of operations joined by `_`, or `none`.
        batch: number of images that the draw is for.
        generator: CPU generator.
        shared: draw the parameters once for all images, as the DC family does. The draw then fits batches of any size.

    Returns:
        The draw, or None for the strategy `none`.

    Raises:
        DstillError: an operation is unknown.

    Example:
        >>> draw = sample("flip", 3, torch.Generator().manual_seed(0))
        >>> draw.op, draw.values.shape
        ('flip', torch.Size([3, 1]))
    """
    ops = parse(strategy)
    if not ops:
        return None
    op = ops[int(torch.randint(len(ops), (), generator=generator))]
    return Params(op, _uniform(1 if shared else batch, generator, *OPS[op].ranges))


def apply(images: Tensor, params: Params | None) -> Tensor:
    """Applies a draw to images: a pure function, differentiable (and affine) in the images.

    Args:
        images: `[B, C, H, W]`.
        params: a draw of `sample`; None returns the images unchanged.

    Returns:
        The augmented images `[B, C, H, W]`.

    Raises:
        ValueError: the draw has neither one row nor one row for each image.

    Example:
        >>> images = torch.tensor([[[[1.0, 2.0]]]])
        >>> apply(images, Params("flip", torch.tensor([[0.0]]))).tolist()
        [[[[2.0, 1.0]]]]
    """
    if params is None:
        return images
    if len(params.values) not in (1, len(images)):
        raise ValueError(f"a draw for {len(params.values)} images cannot be applied to {len(images)}")
    values = sent(params.values, images.device).to(images.dtype)
    if len(values) == 1 and len(images) > 1:
        values = values.expand(len(images), -1)
    return OPS[params.op].apply(images, values)
