"""Random: real images drawn uniformly without replacement in each class. The baseline of every other method."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dstill.methods.initialisation import random_rows
from dstill.methods.selection import Selection


@final
class Random(Selection):
    """Draws `ipc` images of each class."""

    def choose(self, generator: torch.Generator) -> Tensor:
        return random_rows(self.problem.real.train, self.problem.real.classes, self.problem.recipe.ipc, generator)
