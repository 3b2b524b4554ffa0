"""ConvNet-D, the standard network of the field. Its hand-written derivatives are in `dstill.derivatives.tangent`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dstill.nets.norm import Norm, norm_layer


def check_depth(depth: int, size: tuple[int, int]) -> None:
    """Raises `ValueError` if `depth` halvings would leave less than one pixel on a side."""
    if min(size) >> depth < 1:
        raise ValueError(
            f"a ConvNet of depth {depth} needs images of at least {2**depth} pixels a side, "
            f"got {size[0]}x{size[1]}: lower net.depth or raise the image size"
        )


class ConvNet(nn.Module):
    """D blocks of convolution 3x3 (padding 1), norm, ReLU, average pooling 2x2; then one linear layer.

    At width 128 and depth 3, with 32x32x3 input and 10 classes, there are 320,010 parameters, as in MTT and DC.

    Args:
        channels: colour channels of the input.
        classes: number of outputs.
        size: height and width of the input in pixels.
        width: channels of every convolution.
        depth: number of blocks; each halves the side, which must stay at least 1 pixel.
        norm: normalisation between convolution and ReLU.

    Raises:
        ValueError: the image is too small for this depth, or `norm` is unknown.

    Example:
        >>> net = ConvNet(3, 10, (32, 32))
        >>> sum(parameter.numel() for parameter in net.parameters())
        320010
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: tuple[int, int],
        *,
        width: int = 128,
        depth: int = 3,
        norm: Norm = "instance",
    ) -> None:
        super().__init__()
        check_depth(depth, size)
        self.norm, self.width = norm, width
        # Input channels, height and width of each convolution.
        self.geometry: list[tuple[int, tuple[int, int]]] = []
        blocks: list[nn.Module] = []
        for _ in range(depth):
            self.geometry.append((channels, size))
            blocks += [nn.Conv2d(channels, width, 3, padding=1), norm_layer(norm, width, size)]
            blocks += [nn.ReLU(), nn.AvgPool2d(2)]
            channels, size = width, (size[0] // 2, size[1] // 2)
        self.body = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * math.prod(size), classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of preprocessed images `[B, channels, H, W]`."""
        logits: Tensor = self.classifier(torch.flatten(self.body(images), 1))
        return logits
