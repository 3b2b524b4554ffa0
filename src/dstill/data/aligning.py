"""The classes of training and test images: one order, one numbering, and nothing outside of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dstill.data.labels import HIDDEN
from dstill.data.splits import Raw, RawSplit
from dstill.errors import DstillError, suggest


def aligned(raw: Raw, *, renumbered: bool = False) -> tuple[RawSplit, RawSplit | None, tuple[str, ...]]:
    """The splits of a source with the classes of its training images.

    Args:
        raw: the decoded splits.
        renumbered: the user names the classes to keep, so that numbers need not start at 0.

    Returns:
        The training split, the test split, and the names of the classes.

    Raises:
        DstillError: a label is out of range, the test images have other classes, or another shape.
    """
    train, test = raw.train, raw.test
    if len(train.labels) == 0:
        raise DstillError(f"{raw.name} (train) has no images")
    names = train.class_names or tuple(str(c) for c in range(int(train.labels.max()) + 1))
    if not train.class_names and not renumbered:
        _check_start(raw)
    if test is None:
        _check(raw.name, train, names)
        return train, None, names
    if test.class_names and test.class_names != names:
        # Checked before the look-up: -1, which usually marks unlabelled images, would index the last class.
        _check(f"{raw.name} (test)", test, test.class_names)
        test = replace(test, labels=_by_name(test.class_names, names, raw.name)[test.labels])
    for part, split in (("train", train), ("test", test)):
        _check(f"{raw.name} ({part})", split, names)
    if train.images.shape[1:] != test.images.shape[1:]:
        channels = train.images.shape[1] != test.images.shape[1]
        raise DstillError(
            f"{raw.name}: training images are {tuple(train.images.shape[1:])} and test images "
            f"{tuple(test.images.shape[1:])} (channels, height, width): "
            + ("convert them to one number of channels" if channels else "pass --image-size")
        )
    return train, test, names


def _check_start(raw: Raw) -> None:
    """Refuses numbers from 1, as MATLAB counts: they would become a class 0 without images beside those that there are."""
    splits = [raw.train, *([raw.test] if raw.test else [])]
    if all(len(split.labels) and int(split.labels.min()) > 0 for split in splits) and int(raw.train.labels.min()) == 1:
        high = int(raw.train.labels.max())
        raise DstillError(
            f"{raw.name} has labels from 1 to {high}, but classes are numbered from 0: pass labels - 1, or keep the numbers as "
            f"names by --classes {','.join(map(str, range(1, min(high, 3) + 1)))}{',…' if high > 3 else ''}"
        )


def _by_name(theirs: tuple[str, ...], ours: tuple[str, ...], name: str) -> Tensor:
    unknown = sorted(set(theirs) - set(ours))
    if unknown:
        raise DstillError(f"{name}: test class {unknown[0]!r} is not a training class; {suggest(unknown[0], ours)}")
    return torch.tensor([ours.index(c) for c in theirs])


def _check(where: str, split: RawSplit, names: tuple[str, ...]) -> None:
    if len(split.labels) == 0:
        raise DstillError(f"{where} has no images")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= len(names):
        right = f"they must be 0 to {len(names) - 1}{_hint(split)}"
        raise DstillError(f"{where} has labels from {low} to {high}, but {len(names)} classes: {right}")


def _hint(split: RawSplit) -> str:
    """What negative labels usually mean."""
    unlabelled = int((split.labels == HIDDEN).sum())
    if split.labels.unique().tolist() == [-1, 1]:
        return ". If they are two classes, pass (labels + 1) // 2"
    return f". {unlabelled:,} have -1, which usually stands for no label: leave them out" if unlabelled else ""
