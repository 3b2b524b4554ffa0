"""Images in 8 bits, which networks can still be trained on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class EightBits:
    """Images as bytes, over the range of each colour channel: value = low + byte / 255 * (high - low).

    A channel that does not leave [0, 1] has just this range. Natural colours that can be shown thus have the bytes of an
    ordinary picture.

    Attributes:
        content: uint8 `[S, C, H, W]`.
        low, high: the range of each channel `[C]`.

    Example:
        >>> import torch
        >>> eight = EightBits.of(torch.tensor([-0.5, 0.0, 0.25, 2.0]).view(4, 1, 1, 1))
        >>> eight.content.flatten().tolist(), eight.low.tolist(), eight.high.tolist()
        ([0, 51, 76, 255], [-0.5], [2.0])
        >>> round(float((eight.pixels().flatten() - torch.tensor([-0.5, 0.0, 0.25, 2.0])).abs().max()), 4)
        0.0049
    """

    content: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, pixels: Tensor) -> EightBits:
        """The nearest bytes of pixels `[S, C, H, W]`."""
        low, high = pixels.amin((0, 2, 3)).clamp_max(0), pixels.amax((0, 2, 3)).clamp_min(1)
        start, span = low.view(1, -1, 1, 1), (high - low).view(1, -1, 1, 1)
        return cls(((pixels - start) / span * 255).round().byte(), low, high)

    def pixels(self) -> Tensor:
        """What the bytes stand for."""
        low, high = self.low.view(1, -1, 1, 1), self.high.view(1, -1, 1, 1)
        return low + self.content / 255 * (high - low)
