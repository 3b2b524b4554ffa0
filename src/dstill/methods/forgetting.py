"""Forgetting: the real images that a network's training forgets most often (Toneva et al. 2019)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dstill.methods.base import Problem
from dstill.methods.selection import Selection


def most_forgotten(forgotten: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Rows of the `count` highest numbers of events `[n]`; ties are broken at random."""
    shuffled = torch.randperm(len(forgotten), generator=generator)
    order = forgotten[shuffled].argsort(descending=True, stable=True)
    return shuffled[order[:count]]


def _rows(problem: Problem, generator: torch.Generator) -> Tensor:
    assert problem.trained is not None
    forgotten, ipc = problem.trained.forgotten, problem.recipe.ipc
    by_class = problem.real.train.by_class(problem.real.classes)
    return torch.cat([rows[most_forgotten(forgotten[rows], ipc, generator)] for rows in by_class])


Forgetting = functools.partial(Selection, _rows)
