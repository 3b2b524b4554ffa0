"""Which classes are taken for which, ready for a page: a table for few classes, a picture and the worst pairs for many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dstill.artifacts.pictures import uri_of

MOST_CELLS = 20  # classes of a table with numbers
MOST_PAIRS = 12
_BLUE = (47, 111, 222)


@dataclass(frozen=True)
class Pair:
    """A class that is often taken for another.

    Attributes:
        true: name of the class.
        predicted: name of the other.
        share: how often, as a fraction of the images of the class.
    """

    true: str
    predicted: str
    share: float


@dataclass(frozen=True)
class Confusion:
    """The confusion matrix of the networks of a set.

    Attributes:
        shares: what fraction of the images of a class (row) is classified as each class (column).
        heat: the matrix as a picture with a pixel for each cell, as a data URI; empty if it is a table.
        pairs: the pairs that are confused most often, worst first.
    """

    shares: tuple[tuple[float, ...], ...]
    heat: str
    pairs: tuple[Pair, ...]

    @classmethod
    def of(cls, counts: Sequence[Sequence[int]], names: Sequence[str]) -> Confusion | None:
        """From counts by true and predicted class; None if there are none.

        Example:
            >>> one = Confusion.of([[3, 1], [0, 2]], ["cat", "dog"])
            >>> one.shares, one.pairs
            (((0.75, 0.25), (0.0, 1.0)), (Pair(true='cat', predicted='dog', share=0.25),))
        """
        if not counts:
            return None
        matrix = np.array(counts, dtype=np.float64)
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        wrong = shares - np.diag(np.diag(shares))
        order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
        places = [divmod(int(place), len(names)) for place in order if wrong.flat[place] > 0]
        return cls(
            shares=tuple(tuple(row) for row in shares.tolist()),
            heat=_heat(shares) if len(names) > MOST_CELLS else "",
            pairs=tuple(Pair(names[i], names[j], float(wrong[i, j])) for i, j in places),
        )


def _heat(shares: np.ndarray) -> str:
    """Blue that is the more opaque the larger the share, so that it suits a light and a dark page. Small shares are raised."""
    cells = np.empty((*shares.shape, 4), dtype=np.uint8)
    cells[..., :3], cells[..., 3] = _BLUE, np.round(255 * np.sqrt(shares))
    return uri_of(Image.fromarray(cells, "RGBA"))
