"""Selection: the synthetic set is a subset of the real images: at random, by the features of a network, or by a score."""

from __future__ import annotations

import abc
from typing import Self

import torch
from torch import Tensor

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import DistillConfig, TrainingConfig
from dstill.errors import DstillError
from dstill.methods.base import Method, Metrics, State
from dstill.training.fit import described


class SelectionConfig(DistillConfig):
    """Selection by a trained network."""

    training: TrainingConfig = TrainingConfig()
    """How the recipe's network is trained before it is used to select images."""

    @property
    def network_training(self) -> TrainingConfig:
        return self.training

    def quicker(self, ipc: int) -> Self | None:
        """Half as many epochs."""
        if self.training.epochs < 2:
            return None
        return self.model_copy(update={"training": self.training.model_copy(update={"epochs": self.training.epochs // 2})})

    def smoke(self) -> Self:
        return self.model_copy(update={"training": self.training.model_copy(update={"epochs": min(self.training.epochs, 2)})})


def highest(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of the `count` highest of `[n]` scores, from the highest on; ties are broken at random.

    Example:
        >>> highest(torch.tensor([0, 5, 2, 9]), 3, torch.Generator()).tolist()
        [3, 1, 2]
    """
    shuffled = torch.randperm(len(scores), generator=generator)
    order = scores[shuffled].argsort(descending=True, stable=True)
    return shuffled[order[:count]]


def finite(values: Tensor) -> Tensor:
    """The values that a trained network gives, on the CPU, where the rows of real images are.

    Raises:
        DstillError: one of them is not a finite number: the training of the network diverged.
    """
    if not bool(values.isfinite().all()):
        raise DstillError("the network that selects images gives values that are not finite: lower distill.training.lr")
    return values.cpu()


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


class FeatureSelection(Selection):
    """A selection that looks at the features of one class at a time.

    Features are the inputs of the last linear layer of the recipe's network, trained on all real images.
    """

    Settings = SelectionConfig

    @abc.abstractmethod
    def pick(self, features: Tensor, generator: torch.Generator) -> Tensor:
        """`ipc` distinct rows of one class with these features `[n, F]`, which are finite and on the CPU."""

    def choose(self, generator: torch.Generator) -> Tensor:
        net, chosen = self.problem.trained_network(), []
        for rows in self.problem.real.train.by_class(self.problem.real.classes):
            features = finite(described(net, self.problem.prepared(rows)))
            chosen.append(rows[self.pick(features, generator)])
        return torch.cat(chosen)
