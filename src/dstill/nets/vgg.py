"""VGG11 for small images, as used in the field's cross-architecture tables."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dstill.nets.norm import Norm, halved, norm_layer

# Channels of the convolutions before each of the five pools.
_PLAN = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_SMALLEST = 2


class VGG11(nn.Module):
    """Eight 3x3 convolutions with norm and ReLU, in five stages that end in a 2x2 max-pool; then one linear layer.

    This is DC's variant for small images (Zhao and Bilen 2021), with 64, 128, 256-256, 512-512 and 512-512 channels. At
    32x32x3 and 10 classes the last map is `[B, 512, 1, 1]` and there are 9,231,114 parameters.

    For images with a side below 32 pixels, any of the first four pools is left out if it would leave fewer than two pixels on
    a side, since the norm of the next stage would erase a single pixel. At 8x8 the maps of the five stages have sides of 8, 4,
    2, 2 and 2 pixels; the last pool, which no norm follows, leaves 1. The number and the shapes of the parameters do not
    change.

    Args:
        channels: colour channels of the input.
        classes: number of outputs.
        size: height and width of the input in pixels, 2 or more each.
        norm: normalisation between convolution and ReLU.

    Raises:
        ValueError: a side is below 2 pixels, or `norm` is unknown.
    """

    def __init__(self, channels: int, classes: int, size: tuple[int, int], *, norm: Norm = "instance") -> None:
        super().__init__()
        if min(size) < _SMALLEST:
            raise ValueError(f"VGG11 needs images of at least {_SMALLEST} pixels a side, got {size[0]}x{size[1]}")
        layers: list[nn.Module] = []
        for stage, widths in enumerate(_PLAN):
            for width in widths:
                layers += [nn.Conv2d(channels, width, 3, padding=1), norm_layer(norm, width, size), nn.ReLU()]
                channels = width
            smaller = (size[0] // 2, size[1] // 2) if stage == len(_PLAN) - 1 else halved(size)
            if smaller is not None:
                layers.append(nn.MaxPool2d(2))
                size = smaller
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels * size[0] * size[1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of preprocessed images `[B, channels, H, W]`."""
        logits: Tensor = self.classifier(torch.flatten(self.body(images), 1))
        return logits
