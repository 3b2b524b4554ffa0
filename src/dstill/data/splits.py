"""From the splits of a source to decoded training and test images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from dstill.data.labels import Labels
from dstill.data.pictures import Fault, Pictures, damaged, refuse_dark, resize
from dstill.errors import DstillError, suggest

VALIDATION_NAMES = ("val", "valid", "validation", "dev")
TEST_NAMES = ("test", "eval", "evaluation", *VALIDATION_NAMES)
_T = TypeVar("_T")
# The usual words for splits, and what they are called here.
SPLITS = {name: name for name in ("train", *TEST_NAMES)} | {"training": "train", "testing": "test"}


def usual(split: str) -> str:
    """What a split is called here: `train` for `training`, `test` for `Testing`; other words stay as they are."""
    return SPLITS.get(split.lower(), split)


def keyed(splits: Mapping[str, _T]) -> dict[str, _T]:
    """Splits by what they are called here. A name stays as it is if another split has the usual one."""
    return {split if usual(split) in splits else usual(split): one for split, one in splits.items()}


def _nobody(*_: object) -> None:
    pass


@dataclass(frozen=True)
class Reading:
    """How a source is read; `load_real` explains the fields.

    Attributes:
        image_size: side in pixels to bring images to; None for the usual size of the data set.
        fit: how to bring them to it; None for the usual way.
        image_column: column of a table that holds the images or names their files.
        label_column: column of a table that holds the classes.
        test_split: name of the split that holds the test images.
        class_names: names of the classes, in the order of their ids.
        skip_damaged: leave images out that cannot be read.
        say: is told what the user should know of how the data were read.
        tell: is told how many of all images have been decoded, now and then.
    """

    image_size: int | None = None
    fit: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    test_split: str | None = None
    class_names: Sequence[str] | None = None
    skip_damaged: bool = False
    say: Callable[[str], None] = field(default=_nobody)
    tell: Callable[[int, int], None] = field(default=_nobody)

    def arguments(self) -> dict[str, Any]:
        """The fields that differ from their defaults, by name; `say` and `tell` are none of them."""
        usual = vars(Reading())
        return {name: value for name, value in vars(self).items() if not callable(value) and value != usual[name]}

    @property
    def asks_for_columns(self) -> bool:
        """Whether the user names columns, which only tables and lists have."""
        return self.image_column is not None or self.label_column is not None

    @property
    def asks_for_more_than_a_size(self) -> bool:
        """Whether the user says how the data are to be read, beyond the size of the images."""
        return self.asks_for_columns or self.test_split is not None or self.class_names is not None or self.skip_damaged


@dataclass(frozen=True)
class Part:
    """A split of a source: its images, as uint8 `[N, C, H, W]` or still to be decoded, and its labels."""

    images: Tensor | Pictures
    labels: Labels


Parts = Mapping[str, Callable[[], Part]]
"""What reads each split, by name: only the splits that are needed are read."""


@dataclass(frozen=True)
class RawSplit:
    """A decoded split: images uint8 `[N, C, H, W]`, class ids int64 `[N]`, and class names; () if they are not known."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Raw:
    """Decoded splits, before their classes are aligned.

    Attributes:
        name: name of the data set.
        train: the training split.
        test: the test split; None if the source has none whose labels are known.
        found: names of all splits in the source.
        hidden: names of the splits for testing whose labels are hidden.
        known: name in the catalogue of the data set that was asked for by it; empty for all others.
    """

    name: str
    train: RawSplit
    test: RawSplit | None
    found: tuple[str, ...]
    hidden: tuple[str, ...] = ()
    known: str = ""


def decoded(name: str, parts: Parts, how: Reading, *, usual: str = "test", size: int | None = None, fit: str = "resize") -> Raw:
    """Reads and decodes the training split and one split for testing, never both test and validation.

    Args:
        name: name of the data set.
        parts: what reads each split.
        how: how they are read.
        usual: the split that holds the labelled test images of this data set.
        size: side in pixels to bring images to; None to keep their size.
        fit: how to bring them to it.

    Raises:
        DstillError: there is no training split, or not the test split asked for, or images cannot be read.
    """
    if "train" not in parts:
        raise DstillError(f"{name} has no train split (found: {', '.join(parts) or 'none'})")
    train = parts["train"]()
    if train.labels.hidden:
        raise DstillError(
            f"{name}: no training image has a label: sort the images into a folder for each class, name the classes in a list "
            "such as metadata.csv, or pass --label-column"
        )
    test, hidden = _test(name, parts, how, usual)
    both = [train] if test is None else [train, test]
    split = _decode(name, both, how, size, fit)
    return Raw(name, split[0], split[1] if test else None, tuple(parts), hidden)


def _test(name: str, parts: Parts, how: Reading, usual: str) -> tuple[Part | None, tuple[str, ...]]:
    """The split for testing, and the names of those that are passed over since their labels are hidden."""
    if how.test_split is not None:
        asked = how.test_split if how.test_split in parts else SPLITS.get(how.test_split.lower(), how.test_split)
        if asked not in parts or asked == "train":
            raise DstillError(
                f"{name} has no split {how.test_split!r} to test on; {suggest(how.test_split, {*parts} - {'train'})}"
            )
        candidates = [asked]
    else:
        order = (*VALIDATION_NAMES, "test") if usual in VALIDATION_NAMES else TEST_NAMES
        candidates = [key for key in dict.fromkeys((usual, *order)) if key in parts]
    hidden: list[str] = []
    for key in candidates:
        part = parts[key]()
        if not part.labels.hidden:
            if hidden:
                how.say(f"{name}: the labels of {' and '.join(hidden)} are hidden, so accuracies are measured on {key}")
            return part, tuple(hidden)
        hidden.append(key)
    return None, tuple(hidden)


def _decode(name: str, parts: Sequence[Part], how: Reading, size: int | None, fit: str) -> list[RawSplit]:
    """Decodes splits with one number of channels, and leaves damaged images out if the user says so."""
    grey = all(_are_grey(part.images) for part in parts)
    found: list[RawSplit] = []
    faults: list[Fault] = []
    counts = [len(part.images) if isinstance(part.images, Pictures) else 0 for part in parts]
    for i, part in enumerate(parts):
        if isinstance(part.images, Tensor):
            images, bad = part.images if size is None else resize(part.images, size, fit), list[Fault]()
        else:
            before, total = sum(counts[:i]), sum(counts)
            images, bad = part.images.decode("L" if grey else "RGB", size, fit, functools.partial(_add, how, before, total))
        faults += bad
        labels = torch.from_numpy(part.labels.ids)
        if bad and how.skip_damaged:
            kept = torch.from_numpy(np.delete(np.arange(len(labels)), [fault.row for fault in bad]))
            images, labels = images[kept], labels[kept]
        found.append(RawSplit(images, labels, part.labels.names))
    refuse_dark([part.images for part in parts if isinstance(part.images, Pictures)])
    if faults and not how.skip_damaged:
        remedy = "repair or remove it" if len(faults) == 1 else "repair or remove them"
        raise DstillError(f"{damaged(name, faults)}: {remedy}, or pass --skip-damaged (skip_damaged=True)")
    if faults:
        how.say(f"left out: {damaged(name, faults)}")
    return found


def _add(how: Reading, before: int, total: int, done: int) -> None:
    how.tell(before + done, total)


def _are_grey(images: Tensor | Pictures) -> bool:
    return images.are_grey() if isinstance(images, Pictures) else images.shape[1] == 1
