"""Normalisation layers by name, shared by the networks."""

from __future__ import annotations

from typing import Literal

from torch import nn

Norm = Literal["instance", "group", "batch", "layer", "none"]


def norm_layer(kind: Norm, channels: int, size: tuple[int, int]) -> nn.Module:
    """The normalisation called `kind` for feature maps `[B, channels, *size]`; all but `none` are affine.

    Raises:
        ValueError: `kind` is unknown.
    """
    match kind:
        case "instance":
            # With one group for each channel, this is instance normalisation with an affine part, without running statistics.
            return nn.GroupNorm(channels, channels)
        case "group":
            return nn.GroupNorm(4, channels)
        case "batch":
            return nn.BatchNorm2d(channels)
        case "layer":
            return nn.LayerNorm([channels, *size])
        case "none":
            return nn.Identity()
    raise ValueError(f"unknown norm {kind!r}: take one of instance, group, batch, layer, none")


def halved(size: tuple[int, int]) -> tuple[int, int] | None:
    """Half the size of a feature map, or None if fewer than two pixels would be left on a side.

    An instance norm over a single pixel returns its shift, whatever the image shows. Networks that normalise after halving
    therefore skip a halving for which this is None. That lets them work on 8x8 images.

    Args:
        size: height and width of the feature map.

    Example:
        >>> halved((8, 9)), halved((3, 16))
        ((4, 4), None)
    """
    height, width = size[0] // 2, size[1] // 2
    return (height, width) if min(height, width) >= 2 else None
