"""ResNet18 for small images, with strides or with average pooling, as used in the field's cross-architecture tables."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dstill.nets.norm import Norm, halved, norm_layer

Halving = Literal["stride", "pool"]

_WIDTHS = (64, 128, 256, 512)
_BLOCKS = 2  # per width
_SMALLEST = 2


class _Block(nn.Module):
    """relu(norm(conv(relu(norm(conv x)))) + shortcut x), with 3x3 convolutions without bias.

    The shortcut is the identity if neither the number of channels nor the size changes, else a 1x1 convolution and a norm.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        size: height and width of the input.
        smaller: height and width of the output.
        halving: how `size` becomes `smaller` where they differ. `stride`: by strides in the first convolution and in the
            shortcut's. `pool`: by 2x2 average pooling after these two.
        norm: kind of normalisation.
    """

    def __init__(
        self, inputs: int, outputs: int, size: tuple[int, int], smaller: tuple[int, int], halving: Halving, norm: Norm
    ) -> None:
        super().__init__()
        shrinks = smaller != size
        stride = 2 if shrinks and halving == "stride" else 1
        pool: list[nn.Module] = [nn.AvgPool2d(2)] if shrinks and halving == "pool" else []
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            norm_layer(norm, outputs, size if pool else smaller),
            nn.ReLU(),
            *pool,
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            norm_layer(norm, outputs, smaller),
        )
        self.shortcut: nn.Module = nn.Identity()
        if shrinks or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), *pool, norm_layer(norm, outputs, smaller)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def _body(
    name: str, channels: int, size: tuple[int, int], halving: Halving, norm: Norm
) -> tuple[nn.Sequential, tuple[int, int]]:
    """Stem and eight blocks, and the size of their output. Each width after the first halves the side if it can."""
    if min(size) < _SMALLEST:
        raise ValueError(f"{name} needs images of at least {_SMALLEST} pixels a side, got {size[0]}x{size[1]}")
    layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), norm_layer(norm, 64, size), nn.ReLU()]
    channels = 64
    for width in _WIDTHS:
        for block in range(_BLOCKS):
            smaller = size
            if block == 0 and width != _WIDTHS[0] and halved(size) is not None:
                # A strided convolution rounds an odd side up, pooling rounds it down.
                up = 1 if halving == "stride" else 0
                smaller = ((size[0] + up) // 2, (size[1] + up) // 2)
            layers.append(_Block(channels, width, size, smaller, halving, norm))
            channels, size = width, smaller
    return nn.Sequential(*layers), size


class ResNet18(nn.Module):
    """3x3 stem, two residual blocks each of width 64, 128, 256 and 512, global average; then one linear layer.

    This is DC's variant for small images (Zhao and Bilen 2021): the stem has stride 1 and no pool, and each width after the
    first halves the side by a stride. At 32x32x3 and 10 classes the maps have sides of 32, 16, 8 and 4 pixels, the features
    are `[B, 512]` and there are 11,173,962 parameters.

    For images with a side below 16 pixels, a stride is left out if it would leave fewer than two pixels on a side, since the
    norm after it would erase a single pixel. At 8x8 the maps have sides of 8, 4, 2 and 2 pixels. The number and the shapes of
    the parameters do not change.

    Args:
        channels: colour channels of the input.
        classes: number of outputs.
        size: height and width of the input in pixels, 2 or more each.
        norm: normalisation after each convolution.

    Raises:
        ValueError: a side is below 2 pixels, or `norm` is unknown.
    """

    def __init__(self, channels: int, classes: int, size: tuple[int, int], *, norm: Norm = "instance") -> None:
        super().__init__()
        self.body, _ = _body("ResNet18", channels, size, "stride", norm)
        self.classifier = nn.Linear(_WIDTHS[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of preprocessed images `[B, channels, H, W]`."""
        logits: Tensor = self.classifier(self.body(images).mean((2, 3)))
        return logits


class ResNet18AvgPool(nn.Module):
    """ResNet18 with 2x2 average pooling in place of each stride and no global average before the linear layer.

    This is DC's ResNet18_AP (Zhao and Bilen 2021). At 32x32x3 and 10 classes the features are `[B, 512 * 4 * 4]` and there
    are 11,250,762 parameters. For images with a side below 16 pixels, pools are left out as strides are in `ResNet18`.

    Args:
        channels: colour channels of the input.
        classes: number of outputs.
        size: height and width of the input in pixels, 2 or more each.
        norm: normalisation after each convolution.

    Raises:
        ValueError: a side is below 2 pixels, or `norm` is unknown.
    """

    def __init__(self, channels: int, classes: int, size: tuple[int, int], *, norm: Norm = "instance") -> None:
        super().__init__()
        self.body, (height, width) = _body("ResNet18AvgPool", channels, size, "pool", norm)
        self.classifier = nn.Linear(_WIDTHS[-1] * height * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of preprocessed images `[B, channels, H, W]`."""
        logits: Tensor = self.classifier(torch.flatten(self.body(images), 1))
        return logits
