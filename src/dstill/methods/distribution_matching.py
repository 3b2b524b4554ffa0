"""DM: distribution matching (Zhao and Bilen 2023). Matches mean features of real and synthetic images in random networks."""

from __future__ import annotations

from typing import final

import torch

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import Count, Passes, Positive
from dstill.methods.base import Method, Metrics, Problem, State
from dstill.methods.batches import ClassBatches, ImageConfig, initial_state, mean_distance, update_images
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
class DistributionMatching(Method):
    """State: `images` and `images.momentum` `[S, C, H, W]`. A step draws one network, which is never trained."""

    Settings = DistributionMatchingConfig

    def start(self, problem: Problem) -> None:
        self.problem, self.settings = problem, problem.settings(DistributionMatchingConfig)
        self.batches = ClassBatches(problem, self.settings)

    def initialise(self, generator: torch.Generator) -> State:
        return initial_state(self.problem, self.settings, generator)

    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        settings, net = self.settings, self.problem.fresh_network(generator).eval().requires_grad_(False)
        total, gradient = 0.0, torch.zeros_like(state["images"])
        for c in range(self.problem.real.classes):
            with torch.enable_grad():
                batch = self.batches.draw(c, state["images"], generator)
                loss = mean_distance(described(net, batch.real), nets.features(net, batch.synthetic))
            gradient[batch.rows] = torch.autograd.grad(loss, batch.source)[0]
            total += float(loss.detach())
        update_images(state, gradient, settings.lr_images, settings.image_momentum)
        return {"loss": total / self.problem.real.classes}

    def result(self, state: State) -> DistilledSet:
        return self.problem.result(state["images"], self.problem.labels(), None)
