"""Forgetting: the real images that a network's training forgets most often (Toneva et al. 2019)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from dstill.methods.selection import Selection, SelectionConfig


def most_forgotten(forgotten: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of the `count` images with the most forgetting events, of `[n]` counts; ties are broken at random."""
    shuffled = torch.randperm(len(forgotten), generator=generator)
    order = forgotten[shuffled].argsort(descending=True, stable=True)
    return shuffled[order[:count]]


@final
class Forgetting(Selection):
    """Selects the images of each class that a network forgot most often during training."""

    Settings = SelectionConfig

    def choose(self, generator: torch.Generator) -> Tensor:
        assert self.problem.trained is not None
        forgotten, ipc = self.problem.trained.forgotten, self.problem.recipe.ipc
        by_class = self.problem.real.train.by_class(self.problem.real.classes)
        return torch.cat([rows[most_forgotten(forgotten[rows], ipc, generator)] for rows in by_class])
