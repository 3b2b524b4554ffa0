"""What budgets have reached: the figures of `results/budget` that commands show. Imports no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from dstill.config import yamls

_FILE = Path(__file__).parent / "measured.yaml"


class Reached(NamedTuple):
    """The accuracy of a run with `--minutes` on one core, beside that of the best coreset.

    Attributes:
        data: name of the data.
        side: side of the images in pixels.
        classes: number of classes.
        ipc: images per class.
        minutes: the budget.
        method: the method that was chosen.
        accuracy: test accuracy in percent.
        coreset: test accuracy of the best of the coresets that were measured beside it, in percent.
    """

    data: str
    side: int
    classes: int
    ipc: int
    minutes: float
    method: str
    accuracy: float
    coreset: float


def reached() -> list[Reached]:
    """All figures, in the order of the file.

    Example:
        >>> {one.data for one in reached()} >= {"digits", "cifar10"}
        True
    """
    return [Reached(**row) for row in yamls.read_mapping(_FILE)["reached"]]


def reached_nearby(side: int, classes: int, ipc: int) -> list[Reached]:
    """The figures of the case that is nearest in side, classes and IPC, by budget.

    Example:
        >>> {(one.data, one.ipc) for one in reached_nearby(28, 10, 1)}
        {('cifar10', 1)}
    """

    def distance(one: Reached) -> float:
        pairs = ((side, one.side), (classes, one.classes), (ipc, one.ipc))
        return sum(abs(math.log2(ours / theirs)) for ours, theirs in pairs)

    rows = reached()
    nearest = min(rows, key=distance)
    return sorted((one for one in rows if (one.data, one.ipc) == (nearest.data, nearest.ipc)), key=lambda one: one.minutes)
