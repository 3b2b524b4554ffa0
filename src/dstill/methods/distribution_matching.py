"""DM: distribution matching (Zhao and Bilen 2023). Matches mean features of real and synthetic images in random networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch

from dstill.config.settings import Count, Passes, Positive
from dstill.methods.base import State
from dstill.methods.batches import ImageConfig, ImageMethod, mean_distance
from dstill.methods.drawing import Drawn
from dstill.nets import networks as nets
from dstill.training.fit import described


class DistributionMatchingConfig(ImageConfig):
    """Distribution matching (DM)."""

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        return [Passes("forward", classes, self.batch_real), Passes("library", classes, ipc)]

    iterations: Count = 20000
    """Updates, each with its own network."""
    lr_images: Positive = 1.0
    """Step size of the images, in preprocessed units squared per unit of the objective."""


@final
class DistributionMatching(ImageMethod):
    """A draw is one network, which is never trained."""

    Settings = DistributionMatchingConfig

    def draw(self, state: State, iteration: int, number: int, generator: torch.Generator) -> Iterator[Drawn]:
        net = self.problem.fresh_network(generator).eval().requires_grad_(False)
        total, gradient = 0.0, torch.zeros_like(state["images"])
        for c in range(self.problem.real.classes):
            with torch.enable_grad():
                batch = self.batches.draw(c, state["images"], generator)
                loss = mean_distance(described(net, batch.real), nets.features(net, batch.synthetic))
            gradient[batch.rows] = torch.autograd.grad(loss, batch.source)[0]
            total += float(loss.detach())
        yield Drawn({"images": gradient}, {"loss": total / self.problem.real.classes})
