"""Labels of any kind as class ids: numbers, words, columns, lists of one. Several labels of an image are refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dstill.errors import DstillError, suggest

HIDDEN = -1  # what stands where a label is kept secret or was never given


@dataclass(frozen=True)
class Labels:
    """The classes of the images of a split.

    Attributes:
        ids: class ids, int64 `[N]`; -1 where there is none.
        names: names of the ids; () if they are not known.
    """

    ids: np.ndarray
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def hidden(self) -> bool:
        """Whether no image at all has a label, as in the test split of a competition."""
        return len(self.ids) > 0 and bool((self.ids == HIDDEN).all())


def hidden(count: int) -> Labels:
    """The labels of images that come without any."""
    return Labels(np.full(count, HIDDEN, dtype=np.int64))


def read_labels(values: Any, where: str, *, names: Sequence[str] = (), class_names: Sequence[str] | None = None) -> Labels:
    """Class ids from what people call labels.

    Args:
        values: numbers or words, one for each image: a list, a column of a table, an array or a tensor, `[N]` or `[N, 1]`.
        where: what they belong to, for errors.
        names: names of the classes in the order of their ids, if the source knows them.
        class_names: names that the user gives: of the numbers, in their order, or all words, in the order of their ids.

    Raises:
        DstillError: an image has several labels or none, the labels are neither whole numbers nor words, or `class_names` do
            not fit them.

    Example:
        >>> read_labels(["dog", "cat", "dog"], "pets")
        Labels(ids=array([1, 0, 1]), names=('cat', 'dog'))
        >>> read_labels([[2], [0]], "digits").ids
        array([2, 0])
    """
    array = _one_each(values, where)
    if not len(array):
        return Labels(np.zeros(0, dtype=np.int64), tuple(names))
    missing = _missing(array)
    if missing and len(missing) == len(array):
        return hidden(len(array))
    if missing:
        rows = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
        raise DstillError(
            f"{len(missing)} of {len(array)} images of {where} have no label (rows counted from 0: {rows}): give them one, or "
            "leave them out"
        )
    if array.dtype.kind == "O":
        array = _of_one_kind(array.tolist(), where)
    if array.dtype.kind in "US":
        words = [_text(word) for word in array.tolist()]
        if not class_names or not _are_ids(words, class_names):
            return _words(words, where, names, class_names)
        array = np.asarray([int(word) for word in words])
    return _numbers(array, where, tuple(names), class_names)


def _one_each(values: Any, where: str) -> np.ndarray:
    """The labels as an array `[N]`. Columns and lists of one are opened; several labels of one image are refused."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    if not isinstance(values, np.ndarray) or values.dtype.kind == "O":
        items = [_plain(value) for value in values]
        deep = any(isinstance(item, list) for item in items)
        lengths = {len(item) if isinstance(item, list) else 1 for item in items}
        if deep and lengths != {1}:
            raise _several(items, where)
        opened = [item[0] if isinstance(item, list) else item for item in items]
        values = np.empty(len(opened), dtype=object)
        values[:] = opened
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim == 2:
        raise _several(values.tolist(), where)
    if values.ndim != 1:
        raise DstillError(f"{where}: labels must be one whole number for each image, or one word: got the shape {values.shape}")
    return values


def _plain(value: Any) -> Any:
    """A tensor or array as a number or a list, and a sequence as a list."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    return list(value) if isinstance(value, tuple | set | frozenset) else value


def _several(rows: list[Any], where: str) -> DstillError:
    """The error for images with several labels, or with one that is written as a row of zeros and a one."""
    example = next((row for row in rows if isinstance(row, list) and len(row) != 1), rows[0])
    same = all(isinstance(row, list) and len(row) == len(example) for row in rows)
    single = same and all(sum(value == 1 for value in row) == 1 == len(row) - sum(value == 0 for value in row) for row in rows)
    remedy = "choose the images with exactly one label, or one of the labels as the class"
    if single:
        remedy = "if each row of zeros has its one at the place of the class, pass labels.argmax(1)"
    return DstillError(
        f"images of {where} have several labels each, or none (for example {str(example)[:60]}), but a distilled set has one "
        f"class per image: {remedy}"
    )


def _missing(array: np.ndarray) -> list[int]:
    """The rows without a label: nothing, not a number, or, among numbers that are written out, -1; -1 and 1 are two classes."""
    if array.dtype.kind not in "OfUS":
        return []
    values = array.tolist()
    nothing = [value is None or value in ("", b"") or (isinstance(value, float) and value != value) for value in values]
    words = [value for value, empty in zip(values, nothing, strict=True) if not empty]
    if {*words} != {"-1", "1"} and all(isinstance(word, str) and re.fullmatch(r"[0-9]+|-1", word) for word in words):
        nothing = [empty or value == "-1" for value, empty in zip(values, nothing, strict=True)]
    return [row for row, empty in enumerate(nothing) if empty]


def _of_one_kind(values: list[Any], where: str) -> np.ndarray:
    """Python values as an array of words or of numbers."""
    if all(isinstance(value, str | bytes) for value in values):
        return np.asarray([_text(value) for value in values])
    if all(isinstance(value, bool | int | float) for value in values):
        return np.asarray(values)
    odd = next(value for value in values if not isinstance(value, bool | int | float))
    numbers = any(isinstance(value, bool | int | float) for value in values)
    kinds = f"both numbers and {type(odd).__name__}" if numbers else f"of the type {type(odd).__name__}"
    raise DstillError(f"{where}: labels must be one whole number for each image, or one word: they are {kinds}")


def _text(word: str | bytes) -> str:
    return word.decode(errors="replace") if isinstance(word, bytes) else word


def _words(words: list[str], where: str, known: Sequence[str], class_names: Sequence[str] | None) -> Labels:
    """Labels that are words: classes in the order of `class_names`, else of the alphabet; numbers written out by value."""
    if not class_names and not known:
        _refuse_tags(words, where)
    names = tuple(map(str, class_names or known)) or tuple(sorted(set(words), key=_natural))
    ids = {name: c for c, name in enumerate(names)}
    lost = next((word for word in words if word not in ids), None)
    if lost is not None:
        raise DstillError(f"{where} has the label {lost!r}, which is not among the class names; {suggest(lost, names)}")
    return Labels(np.asarray([ids[word] for word in words], dtype=np.int64), names)


def _are_ids(words: Sequence[str], class_names: Sequence[str]) -> bool:
    """Whether words are numbers written out, such as those of a CSV file, which the names are meant for."""
    return all(re.fullmatch(r"[0-9]{1,18}", word) for word in words) and not set(words) & set(map(str, class_names))


def _refuse_tags(words: list[str], where: str) -> None:
    """Refuses words such as `cat|dog` beside `dog|owl`, which are several labels each."""
    split = {word: [part.strip() for part in re.split(r"[,;|]", word)] for word in set(words)}
    used = Counter(part for parts in split.values() for part in set(parts))
    tags = next(
        (word for word, parts in sorted(split.items()) if len(parts) > 1 and all(used[part] > 1 for part in parts)), None
    )
    if tags is not None:
        raise _several([tags], where)


def _natural(word: str) -> tuple[int, int, str]:
    """Sorts whole numbers by value before all words."""
    return (0, int(word), word) if re.fullmatch(r"[0-9]{1,18}", word) else (1, 0, word)


def _numbers(array: np.ndarray, where: str, names: tuple[str, ...], class_names: Sequence[str] | None) -> Labels:
    if array.dtype.kind not in "iu":
        remedy = "labels.astype(int)" if array.dtype.kind in "fb" else "whole numbers or words"
        raise DstillError(
            f"{where}: labels must be one whole number for each image, or one word: got {array.dtype}. Pass {remedy}"
        )
    ids = array.astype(np.int64)
    if class_names is None:
        return Labels(ids, names)
    given = tuple(map(str, class_names))
    if names and sorted(given) == sorted(names):
        order = np.asarray([given.index(name) for name in names])
        inside = (ids >= 0) & (ids < len(names))
        return Labels(np.where(inside, order[np.where(inside, ids, 0)], ids), given)
    if names and len(given) != len(names):
        raise DstillError(f"{where} has {len(names)} classes, but {len(given)} class_names are given: name every class once")
    return Labels(ids, given)
