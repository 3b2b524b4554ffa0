"""Selection by how hard an image is for networks early in their training: the common part of GraNd and EL2N."""

from __future__ import annotations

import abc
from typing import Annotated, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from dstill.config.settings import Count, TrainingConfig
from dstill.methods.selection import Selection, SelectionConfig, finite, highest


class EarlyTrainingConfig(TrainingConfig):
    """Plain training that ends early."""

    epochs: Annotated[int, Field(ge=0, le=10**9)] = 20
    """Passes over the real training set; 0 for scores at initialisation."""


class DifficultyConfig(SelectionConfig):
    """Selection by scores of networks early in their training (Paul et al. 2021)."""

    training: EarlyTrainingConfig = EarlyTrainingConfig()
    """How each of the networks is trained before it scores images."""
    networks: Count = 10
    """Networks over which a score is averaged."""
    choose: Literal["hardest", "easiest"] = "easiest"
    """Images with the highest scores of their class, as published, or with the lowest, which do better at 1 and 10 a class."""

    @property
    def network_count(self) -> int:
        return self.networks

    def smoke(self) -> Self:
        return super().smoke().model_copy(update={"networks": min(self.networks, 2)})


class Difficulty(Selection):
    """Takes the hardest or the easiest images of each class, by a score averaged over several networks."""

    Settings = DifficultyConfig

    @abc.abstractmethod
    def score(self, net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """How hard images `[n, C, H, W]` with class ids `[n]` are for a network, `[n]`; higher is harder."""

    def scores(self) -> Tensor:
        """The mean score of each training image over the networks, float64 `[N]`."""
        train, device = self.problem.real.train, self.problem.device
        total = torch.zeros(len(train), dtype=torch.float64)
        for net in self.problem.trained_networks():
            for rows in train.by_class(self.problem.real.classes):
                total[rows] += finite(self.score(net, self.problem.prepared(rows), train.labels[rows].to(device)))
        return total / len(self.problem.trained)

    def choose(self, generator: torch.Generator) -> Tensor:
        scores, ipc = self.scores(), self.problem.recipe.ipc
        if self.problem.settings(DifficultyConfig).choose == "easiest":
            scores = -scores
        by_class = self.problem.real.train.by_class(self.problem.real.classes)
        return torch.cat([rows[highest(scores[rows], ipc, generator)] for rows in by_class])
