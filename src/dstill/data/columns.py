"""Tables of the library `datasets`, from Parquet files, the hub or memory: which column is the image, which the class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dstill.data.arrays import pixels
from dstill.data.catalog import DATASETS, Entry
from dstill.data.labels import Labels, hidden, read_labels
from dstill.data.pictures import Pictures
from dstill.data.splits import Part, Reading
from dstill.errors import DstillError, suggest

# What people call the column of classes.
LABEL_NAMES = (
    *("label", "labels", "fine_label", "coarse_label", "class", "classes", "class_name", "class_id", "class_label"),
    *("target", "targets", "category", "y"),
)
_LABEL_TYPES = ("string", "large_string", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
_IMAGENET_CLASSES = 1000


def part_of(name: str, table: Any, entry: Entry, how: Reading) -> Part:
    """The images and labels of a `datasets.Dataset`. Images are not decoded yet.

    Args:
        name: name of the data set, for errors.
        table: the split.
        entry: label column and classes of the data set.
        how: columns and class names that the user gives.

    Raises:
        DstillError: a column is missing, or several may be meant, or the split lacks the classes of ImageNet.
    """
    import datasets

    table = table.with_format(None)
    columns = table.features
    image = _image_column(name, columns, how)
    if how.label_column is not None and how.label_column not in columns:
        raise _lacking(name, columns, how.label_column)
    label = how.label_column or (entry.label if entry.label in columns else _label_column(name, columns, image, how))
    if label is None:
        return Part(_images(name, table, image), hidden(len(table)))
    feature = columns[label]
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
    if entry.imagenet_ids:
        table, names = _subset(name, table, label, names, entry)
    labels = read_labels(table[label], f"{name} (column {label})", names=names, class_names=how.class_names)
    if entry.imagenet_ids:
        labels = renumbered(labels, entry)
    return Part(_images(name, table, image), labels)


def _images(name: str, table: Any, image: str) -> Pictures | Tensor:
    """The column of images: not decoded, or as pixels if it holds arrays."""
    import datasets

    table = table.select_columns([image])
    if kind := _array_type(table.features[image]):
        numbers = np.asarray(table.with_format("numpy")[image][:], dtype=kind)
        if numbers.dtype.kind in "iu" and numbers.size and numbers.min() >= 0 and numbers.max() <= 255:
            numbers = numbers.astype(np.uint8)  # lists of Python numbers become int64 in a table
        return pixels(numbers)
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    return Pictures(name, table[image])


def choose(name: str, candidates: Sequence[str], option: str, what: str) -> str:
    """The only candidate for a column.

    Raises:
        DstillError: there are several; names them, and the option that tells which one is meant.
    """
    if len(candidates) > 1:
        argument = option.removeprefix("--").replace("-", "_")
        raise DstillError(
            f"{name}: {' and '.join(candidates)} may each be the column of {what}: pass {option} {candidates[0]} "
            f"({argument}={candidates[0]!r}), or another of them"
        )
    return candidates[0]


def _image_column(name: str, columns: Any, how: Reading) -> str:
    import datasets

    if how.image_column is not None:
        if how.image_column not in columns:
            raise _lacking(name, columns, how.image_column)
        return how.image_column
    found = [c for c, feature in columns.items() if isinstance(feature, datasets.Image)]
    # Files that other programs wrote say nothing about images: structs of bytes and path, or bytes alone.
    found = found or [c for c, f in columns.items() if isinstance(f, dict) and "bytes" in f]
    found = found or [c for c, f in columns.items() if getattr(f, "dtype", None) in ("binary", "large_binary")]
    found = found or [c for c, feature in columns.items() if _array_type(feature)]
    if not found:
        raise _lacking(name, columns)
    return choose(name, found, "--image-column", "images")


def _array_type(feature: Any) -> str:
    """The type of the numbers of a column that holds arrays of two or three axes, or lists in lists; empty for all others."""
    import datasets

    if isinstance(feature, datasets.Array2D | datasets.Array3D):
        return str(feature.dtype)
    depth = 0
    while isinstance(feature, datasets.List):
        feature, depth = feature.feature, depth + 1
    return str(getattr(feature, "dtype", "")) if depth > 1 else ""


def _label_column(name: str, columns: Any, image: str, how: Reading) -> str | None:
    """The column of classes; None if no column can be one."""
    import datasets

    found = [c for c, feature in columns.items() if isinstance(feature, datasets.ClassLabel)]
    found = found or [c for c in columns if c.lower() in LABEL_NAMES and c != image]
    named = [c for c in found if c in {entry.label for entry in DATASETS.values()}]
    if len(found) > 1 and len(named) == 1:
        how.say(f"{name}: the classes are those of {named[0]}; --label-column takes another of {', '.join(found)}")
        return named[0]
    if not found:
        found = [c for c, feature in columns.items() if c != image and getattr(feature, "dtype", "") in _LABEL_TYPES]
    if not found:
        return None
    return choose(name, found, "--label-column", "classes")


def _lacking(name: str, columns: Any, asked: str | None = None) -> DstillError:
    if asked is not None:
        return DstillError(f"{name} has no column {asked!r}; {suggest(asked, columns)}")
    return DstillError(
        f"{name} has the columns {', '.join(columns)}: an image column and a class column are needed. Pass --image-column and "
        "--label-column if they have other names"
    )


def _subset(name: str, table: Any, label: str, names: tuple[str, ...], entry: Entry) -> tuple[Any, tuple[str, ...]]:
    """The rows of the entry's classes of ImageNet."""
    if names:
        check_imagenet(name, names)
    wanted = set(entry.imagenet_ids)
    return table.select([i for i, c in enumerate(table[label]) if c in wanted]), names


def check_imagenet(name: str, names: Sequence[str]) -> None:
    """Raises `DstillError` if these are not as many classes as ImageNet has."""
    if len(names) != _IMAGENET_CLASSES:
        raise DstillError(
            f"{name} is drawn from the {_IMAGENET_CLASSES} classes of ImageNet, but the data has {len(names)}: pass a complete "
            "copy of ILSVRC-1k, or only the path, without the subset's name"
        )


def renumbered(labels: Labels, entry: Entry) -> Labels:
    """Classes of ImageNet as positions in the subset."""
    position = {c: i for i, c in enumerate(entry.imagenet_ids)}
    ids = np.asarray([position[c] for c in labels.ids.tolist()], dtype=np.int64)
    return Labels(ids, tuple(labels.names[c] for c in entry.imagenet_ids) if labels.names else ())
