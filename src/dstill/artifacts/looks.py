"""What the images of a set look like: pixels, standardised, or whitened. Whitening removes much of their correlation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dstill.data.preprocess import ZCA, Standardise
from dstill.data.real import RealSet

_PATCH = 8  # side in pixels of the part of an image that is whitened to compare: seconds, where a whole image takes minutes
_MOST = 5000  # real images to compare with
_SAME = 0.1  # no claim is made if the two ways lie nearer to each other than this
_CLEAR = 0.5  # nor if the images are not at most half as far from one as from the other
_NOISE = 0.5  # nor if neighbours correlate by less than this share of what whitened ones do


class Correlations(NamedTuple):
    """Correlation of horizontal neighbours, and between colour channels (0 for grey images)."""

    neighbours: float
    channels: float

    @classmethod
    def of(cls, images: Tensor) -> Correlations:
        """Of images `[N, C, H, W]`, about the mean of each channel; 0 for constant ones."""
        centred = images.double() - images.double().mean((0, 2, 3), keepdim=True)
        power = centred.square().mean().clamp_min(1e-12)
        neighbours = (centred[..., 1:] * centred[..., :-1]).mean() / power
        planes = centred.transpose(0, 1).flatten(1)
        units = planes / planes.norm(dim=1, keepdim=True).clamp_min(1e-12)
        among, count = units @ units.t(), len(units)
        return cls(float(neighbours), float((among.sum() - among.trace()) / (count * (count - 1))) if count > 1 else 0.0)

    def distance(self, other: Correlations) -> float:
        """How far two lie from each other."""
        return float(((self.neighbours - other.neighbours) ** 2 + (self.channels - other.channels) ** 2) ** 0.5)


class Look(NamedTuple):
    """What pixels look like.

    Attributes:
        kind: `pixels`, `standardise` or `zca`; empty if they do not tell.
        why: how that shows.
    """

    kind: str
    why: str


def look_of(images: Tensor, real: RealSet) -> Look:
    """What the images of a set look like, beside real images that are standardised or whitened.

    Images that started from noise and were hardly changed look like neither.

    Args:
        images: images of the set `[S, C, H, W]`.
        real: the data that it was distilled from.
    """
    if not len(images) or not bool(torch.isfinite(images).all()):
        return Look("", "")
    low, high = float(images.min()), float(images.max())
    if 0 <= low < high <= 255:  # about half of the inputs of networks are negative
        return Look("pixels", f"they lie between {low:.3g} and {high:.3g}")
    ours = Correlations.of(_patches(images))
    pixels = _patches(real.train.images[:_MOST])
    standardised, whitened = Correlations.of(_standardised(pixels)), Correlations.of(ZCA.fit(pixels).forward(pixels / 255))
    ways = {"standardise": standardised, "zca": whitened}
    if standardised.distance(whitened) < _SAME:
        return Look("", "")
    near, far = sorted(ways, key=lambda kind: ours.distance(ways[kind]))
    noise = ours.neighbours < _NOISE * min(way.neighbours for way in ways.values())
    if noise or ours.distance(ways[near]) > _CLEAR * ours.distance(ways[far]):
        return Look("", "")
    numbers = f"{ours.neighbours:.2f}, those of real images {standardised.neighbours:.2f} standardised"
    return Look(near, f"neighbours correlate by {numbers} and {whitened.neighbours:.2f} whitened")


def _patches(images: Tensor) -> Tensor:
    """The middle of each image."""
    height, width = (min(_PATCH, side) for side in images.shape[2:])
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def _standardised(pixels: Tensor) -> Tensor:
    """Standardised pixels; a constant channel stays as it is."""
    mean, std = pixels.float().mean((0, 2, 3)), pixels.float().std((0, 2, 3)).clamp_min(1e-6)
    return Standardise(mean, std).forward(pixels.float())
