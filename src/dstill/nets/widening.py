"""The ConvNet of FRePo: every block doubles the channels (Zhou et al. 2022)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dstill.nets.convnet import check_depth
from dstill.nets.norm import Norm, norm_layer


class WideningConvNet(nn.Module):
    """D blocks of norm (from the second on), convolution 3x3, ReLU, average pooling 2x2; then one linear layer.

    The blocks have width, 2 width, 4 width ... channels. Weights are drawn from N(0, 1 / fan-in) (LeCun's initialisation), and
    biases are zero.

    Args:
        channels: colour channels of the input.
        classes: number of outputs.
        size: height and width of the input in pixels.
        width: channels of the first convolution.
        depth: number of blocks; each halves the side, which must stay at least 1 pixel. If left out, 3 or as many as fit.
        norm: normalisation before the second and later convolutions: `batch` in FRePo's distillation, `none` in
            its evaluation.

    Raises:
        ValueError: the image is too small for this depth, or `norm` is unknown.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: tuple[int, int],
        *,
        width: int = 128,
        depth: int | None = None,
        norm: Norm = "none",
    ) -> None:
        super().__init__()
        depth = depth or min(3, int(math.log2(min(size))))
        check_depth(depth, size)
        blocks: list[nn.Module] = []
        for block in range(depth):
            if block:
                blocks.append(norm_layer(norm, channels, size))
            blocks += [nn.Conv2d(channels, width << block, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
            channels, size = width << block, (size[0] // 2, size[1] // 2)
        self.body = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels * math.prod(size), classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                assert module.bias is not None
                nn.init.normal_(module.weight, std=1 / math.sqrt(module.weight[0].numel()))
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of preprocessed images `[B, channels, H, W]`."""
        logits: Tensor = self.classifier(torch.flatten(self.body(images), 1))
        return logits
