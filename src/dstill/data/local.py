"""What lies on disk: a folder of images, Parquet files, an .npz file, or a list of image files."""

from __future__ import annotations

import functools
import glob
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dstill.data.catalog import Entry
from dstill.data.columns import check_imagenet, part_of, renumbered
from dstill.data.folders import folder_parts
from dstill.data.labels import Labels
from dstill.data.listings import SUFFIXES, is_list, listed_parts, read_listing
from dstill.data.objects import archive
from dstill.data.parquet import parquet_parts, with_sibling
from dstill.data.pictures import Pictures
from dstill.data.splits import Part, Parts, Reading, keyed
from dstill.errors import DstillError

_SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # what `save_to_disk` leaves
_PACKED = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar", ".bz2", ".xz")
_PYTHON = (".npy", ".pt", ".pth", ".pkl", ".pickle", ".mat", ".h5", ".hdf5", ".arrow")
FILES = (".parquet", ".npz", *SUFFIXES, *_PACKED, *_PYTHON)
KINDS = "a folder of images, Parquet files, an .npz file, or a list such as metadata.csv"


def parts_at(pattern: str, name: str, entry: Entry, how: Reading) -> Parts:
    """The splits of local data by name.

    Args:
        pattern: path of a folder, a file, or a pattern for Parquet files.
        name: name of the data set, for errors.
        entry: label column and classes of the data set.
        how: columns and class names that the user gives.

    Raises:
        DstillError: there are no such files, or a file cannot be assigned to a split and a class.
    """
    path = Path(pattern).expanduser()
    if any(all((path / file).is_file() for file in files) for files in _SAVED):
        return _saved(path, name, entry, how)
    if path.is_dir():
        tables = sorted(path.rglob("*.parquet"))
        if tables:
            return parquet_parts(path, tables, name, entry, how)
        parts = folder_parts(path, name, how)
        if not entry.imagenet_ids:
            return parts
        return {key: functools.partial(_of_imagenet, read, name, entry) for key, read in parts.items()}
    if entry.imagenet_ids and path.is_file() and (path.suffix.lower() == ".npz" or is_list(path)):
        raise DstillError(f"{name} is drawn from the classes of ImageNet: pass class folders or Parquet files, not {path}")
    if path.is_file() and path.suffix.lower() == ".npz":
        return archive(_npz(path), str(path), how)
    if path.is_file() and is_list(path):
        return _list(path, name, how)
    tables = with_sibling(path) if path.is_file() else sorted(Path(match) for match in glob.glob(str(path)))
    if not tables:
        raise DstillError(f"{path} does not exist: pass {KINDS}")
    wrong = next((file for file in tables if file.suffix.lower() != ".parquet"), None)
    if wrong is not None and wrong.suffix.lower() in _PACKED:
        raise DstillError(f"{wrong} is a packed file: unpack it, and pass the folder")
    if wrong is not None and wrong.suffix.lower() in _PYTHON:
        raise DstillError(f"{wrong} must be read in Python: pass what it holds, dstill.load_real((images, labels))")
    if wrong is not None:
        raise DstillError(f"{wrong} is not a Parquet file: pass {KINDS}")
    return parquet_parts(path, tables, name, entry, how)


def _of_imagenet(read: Callable[[], Part], name: str, entry: Entry) -> Part:
    """The images of a subset, in class folders that are called by WordNet ids. Their order is that of ILSVRC-1k."""
    part = read()
    subset = set(entry.imagenet_ids)
    if part.labels.hidden or len(part.labels.names) == len(subset):  # the latter is a copy of the subset itself
        return part
    check_imagenet(name, part.labels.names)
    odd = next((folder for folder in part.labels.names if not re.fullmatch(r"n[0-9]{8}", folder)), None)
    if odd is not None:
        raise DstillError(f"{name} needs folders that are called by WordNet ids, such as n01440764, but there is {odd}")
    wanted = [row for row, c in enumerate(part.labels.ids.tolist()) if c in subset]
    assert isinstance(part.images, Pictures)
    images = Pictures(name, [part.images.cells[row] for row in wanted])
    return Part(images, renumbered(Labels(part.labels.ids[wanted], part.labels.names), entry))


def _saved(path: Path, name: str, entry: Entry, how: Reading) -> Parts:
    """The splits of what `datasets` has saved to disk."""
    import datasets

    saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return {split: functools.partial(part_of, name, table, entry, how) for split, table in keyed(splits).items()}


def _npz(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DstillError(f"{path} cannot be read as an .npz file: {error}") from error


def _list(path: Path, name: str, how: Reading) -> Parts:
    found = read_listing(path, how)
    if found is None:
        raise DstillError(
            f"{path} is not a Parquet file, nor a list of images: none of its columns holds paths of images, seen from "
            f"{path.parent}"
        )
    return listed_parts(found, name, how)
