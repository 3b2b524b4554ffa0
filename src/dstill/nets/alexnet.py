"""AlexNet for small images, as in the cross-architecture tables of the field."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SMALLEST = 8  # three halvings


class AlexNet(nn.Module):
    """Convolutions 5x5 128, pool, 5x5 192, pool, 3x3 256, 192, 192, pool; then one linear layer. No norm, no dropout.

    This is DC's variant for small images (Zhao and Bilen 2021), with ReLU after each convolution and 2x2 max-pooling. At
    32x32x3 and 10 classes the last map is `[B, 192, 4, 4]` and there are 1,872,202 parameters; at 8x8 the last map is
    `[B, 192, 1, 1]`.

    Args:
        channels: colour channels of the input.
        classes: number of outputs.
        size: height and width of the input in pixels, 8 or more each.

    Raises:
        ValueError: a side is below 8 pixels.
    """

    def __init__(self, channels: int, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        height, width = size
        if min(size) < _SMALLEST:
            raise ValueError(f"AlexNet needs images of at least {_SMALLEST} pixels a side, got {height}x{width}")
        self.body = nn.Sequential(
            nn.Conv2d(channels, 128, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 192, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(192, 192, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Linear(192 * (height // 8) * (width // 8), classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of preprocessed images `[B, channels, H, W]`."""
        logits: Tensor = self.classifier(torch.flatten(self.body(images), 1))
        return logits
