"""Forgetting: the real images that a network's training forgets most often (Toneva et al. 2019)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dstill.methods.selection import Selection, SelectionConfig, highest


@final
class Forgetting(Selection):
    """Selects the images of each class that a network forgot most often during training; ties are broken at random."""

    Settings = SelectionConfig

    def choose(self, generator: torch.Generator) -> Tensor:
        forgotten, ipc = self.problem.trained[0].forgotten, self.problem.recipe.ipc
        by_class = self.problem.real.train.by_class(self.problem.real.classes)
        return torch.cat([rows[highest(forgotten[rows], ipc, generator)] for rows in by_class])
