"""A machine whose speed is known."""

from __future__ import annotations

import torch

from dstill.config.settings import ExpertConfig, NetConfig, Passes
from dstill.data.catalog import Shape
from dstill.planning.clock import Clock


class Steady(Clock):
    """A machine on which an image takes the same time everywhere: a forward and backward pass at width 128 `second` seconds."""

    def __init__(self, shape: Shape, second: float) -> None:
        super().__init__(shape, torch.device("cpu"))
        self.second = second

    def _image(self, net: NetConfig) -> float:
        return self.second * ((net.width or 128) / 128) ** 2

    def passes(self, own: NetConfig, passes: Passes, threads: int | None = None) -> float:
        return passes.times * passes.images * self._image(passes.net or own)

    def training(self, net: NetConfig, images: int, augmentation: str, threads: int) -> float:
        return images * self._image(net)

    def expert(self, net: NetConfig, config: ExpertConfig, threads: int) -> float:
        return config.batch_size * self._image(net)
