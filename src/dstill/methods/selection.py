"""Selection: the synthetic set is a subset of the real images, chosen by Random, Herding or Forgetting."""

from __future__ import annotations

import abc
from typing import Self

import torch
from torch import Tensor

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import DistillConfig, TrainingConfig
from dstill.methods.base import Method, Metrics, State


class SelectionConfig(DistillConfig):
    """Selection by a trained network (Herding, Forgetting)."""

    training: TrainingConfig = TrainingConfig()
    """How the recipe's network is trained before it is used to select images."""

    @property
    def network_training(self) -> TrainingConfig:
        return self.training

    def smoke(self) -> Self:
        return self.model_copy(update={"training": self.training.model_copy(update={"epochs": 2})})


class Selection(Method):
    """A method that selects real images and takes no steps."""

    starts_from_a_set = False

    @abc.abstractmethod
    def choose(self, generator: torch.Generator) -> Tensor:
        """`ipc` distinct rows of each class, class by class."""

    def initialise(self, generator: torch.Generator) -> State:
        return {"images": self.problem.prepared(self.choose(generator))}

    def iterations(self) -> int:
        return 0

    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        raise AssertionError("a selection method takes no steps")

    def result(self, state: State) -> DistilledSet:
        return self.problem.result(state["images"], self.problem.labels(), None)
