"""Methods whose draws unroll a student. An NVIDIA card can take several of these draws side by side."""

from __future__ import annotations

import abc
import functools
from collections.abc import Iterator, Mapping

import torch

from dstill.config.settings import Recipe
from dstill.data.catalog import Shape
from dstill.methods.drawing import DrawingMethod, Drawn
from dstill.unrolling.student import Student


class UnrollingMethod(DrawingMethod):
    """A method that averages draws, each of which unrolls `student`.

    A process takes its draws in rounds of `Problem.streams`. The draws of a round take their steps together, each in a branch
    of one recorded graph, see `Student.side_by_side`.
    """

    student: Student

    @property
    def beside(self) -> int:
        """How many draws of this process run side by side."""
        return at_once(self.problem.streams, len(self.crew.share(self.problem.recipe.distill.draws)))

    @property
    def sharers(self) -> int:
        """How many unrolled students divide the memory of the machine between them, those of other processes included."""
        return self.crew.size * self.beside

    def taken(self, draws: Mapping[int, Iterator[Drawn]]) -> dict[int, Drawn]:
        numbers, found = list(draws), dict[int, Drawn]()
        for first in range(0, len(numbers), self.beside):
            some = numbers[first : first + self.beside]
            works = [functools.partial(next, draws[k]) for k in some]
            found |= zip(some, self.student.side_by_side(works), strict=True)
        return found

    @classmethod
    @abc.abstractmethod
    def peak_bytes(cls, recipe: Recipe, shape: Shape, device: torch.device, students: int = 1) -> float:
        """As in `Method`, for this number of students side by side."""


def at_once(streams: int, draws: int) -> int:
    """How many of the draws of a process run side by side, of at most `streams`; one, if it has none."""
    return max(1, min(streams, draws))
