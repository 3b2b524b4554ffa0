"""The confusion matrix is readable for few classes and for many."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from dstill.reporting.confusion import MOST_CELLS, MOST_PAIRS, Confusion, Pair


def test_shares_are_of_the_true_class_and_an_empty_class_has_none() -> None:
    one = Confusion.of([[6, 2, 0], [0, 0, 0], [1, 0, 3]], ["a", "b", "c"])
    assert one is not None
    assert one.shares == ((0.75, 0.25, 0.0), (0.0, 0.0, 0.0), (0.25, 0.0, 0.75))
    assert one.pairs == (Pair("a", "b", 0.25), Pair("c", "a", 0.25)) and one.heat == ""
    assert Confusion.of((), ["a"]) is None


def test_many_classes_are_a_picture_and_their_worst_pairs() -> None:
    size = MOST_CELLS + 1
    counts = np.diag(np.full(size, 100))
    counts[3, 5], counts[7, 2] = 300, 100
    names = [f"n{i}" for i in range(size)]
    one = Confusion.of(counts.tolist(), names)
    assert one is not None
    assert one.pairs == (Pair("n3", "n5", 0.75), Pair("n7", "n2", 0.5))
    with Image.open(io.BytesIO(base64.b64decode(one.heat.split(",")[1]))) as picture:
        heat = np.asarray(picture)
    assert heat.shape == (size, size, 4)
    assert heat[0, 0, 3] == 255 and heat[0, 1, 3] == 0
    assert heat[7, 2, 3] / 255 == pytest.approx(0.5**0.5, abs=0.01)
    few = Confusion.of(np.ones((MOST_CELLS, MOST_CELLS), dtype=int).tolist(), names[:-1])
    assert few is not None and few.heat == "" and len(few.pairs) == MOST_PAIRS
