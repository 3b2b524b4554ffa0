"""Selection, once: the synthetic set is some of the real images. Random, Herding and Forgetting say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from dstill.artifacts.distilled import DistilledSet
from dstill.methods.base import Metrics, Problem, State


@final
class Selection:
    """A method without steps.

    Args:
        choose: `ipc` distinct rows of each class, class by class.
    """

    def __init__(self, choose: Callable[[Problem, torch.Generator], Tensor]) -> None:
        self.choose = choose

    def start(self, problem: Problem) -> None:
        self.problem = problem

    def initialise(self, generator: torch.Generator) -> State:
        return {"images": self.problem.prepared(self.choose(self.problem, generator))}

    def iterations(self) -> int:
        return 0

    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        raise AssertionError("a selection takes no steps")

    def result(self, state: State) -> DistilledSet:
        return self.problem.result(state["images"], self.problem.labels(), None)
