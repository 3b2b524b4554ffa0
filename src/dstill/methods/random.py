"""Random: real images drawn uniformly without replacement in each class. The floor under every other row."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dstill.methods.base import Problem
from dstill.methods.initialisation import random_rows
from dstill.methods.selection import Selection


def _rows(problem: Problem, generator: torch.Generator) -> Tensor:
    return random_rows(problem.real.train, problem.real.classes, problem.recipe.ipc, generator)


Random = functools.partial(Selection, _rows)
