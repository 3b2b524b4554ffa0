"""Random: real images drawn uniformly without replacement in each class. The floor under every other row."""

from __future__ import annotations

from typing import final

import torch

from dstill.artifacts.distilled import DistilledSet
from dstill.methods.base import Metrics, Problem, State
from dstill.methods.initialisation import random_rows


@final
class Random:
    """See the module."""

    def start(self, problem: Problem) -> None:
        self.problem = problem

    def initialise(self, generator: torch.Generator) -> State:
        real = self.problem.real
        return {
            "images": self.problem.prepared(random_rows(real.train.labels, real.classes, self.problem.recipe.ipc, generator))
        }

    def iterations(self) -> int:
        return 0

    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        return {}

    def result(self, state: State) -> DistilledSet:
        return self.problem.result(state["images"], self.problem.labels(), None)
