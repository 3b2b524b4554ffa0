"""Parquet files on disk as splits of `datasets`. A file that cannot be assigned is an error, not ignored."""

from __future__ import annotations

import functools
import glob
import re
from pathlib import Path

from dstill.data.catalog import Entry
from dstill.data.columns import part_of
from dstill.data.quiet import load_dataset
from dstill.data.splits import SPLITS, TEST_NAMES, Part, Parts, Reading
from dstill.errors import DstillError


def parquet_parts(root: Path, files: list[Path], name: str, entry: Entry, how: Reading) -> Parts:
    """The splits of Parquet files of one data set.

    Args:
        root: the folder, file or pattern that was given.
        files: the files.
        name: name of the data set, for errors.
        entry: label column and classes of the data set.
        how: columns and class names that the user gives.

    Raises:
        DstillError: a file cannot be assigned to a split, or belongs to another data set.
    """

    # One call for each split: in a single call, `datasets` would read every split with the class names of the first file.
    def read(shards: list[Path]) -> Part:
        table = load_dataset("parquet", data_files=[glob.escape(str(file)) for file in shards], split="train")
        return part_of(name, table, entry, how)

    return {split: functools.partial(read, shards) for split, shards in _by_split(root, files).items()}


def with_sibling(file: Path) -> list[Path]:
    """The file and, for a training file such as `x-train.parquet`, the test file beside it, such as `x-test.parquet`."""
    others = [file.with_name(file.name.replace("train", word)) for word in TEST_NAMES] if "train" in file.name else []
    return [file, *[other for other in others if other.exists()][:1]]


def split_of(name: str) -> str | None:
    """The split in the name of a file or folder, even one that is never read, such as `extra` in extra-00000-of-00001."""
    words = re.split(r"[-_.]", name.lower())
    known = next((SPLITS[word] for word in words if word in SPLITS), None)
    shard = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", name.lower())
    return known or (shard and shard[1])


def _by_split(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split. Files that name no split are training files, provided that no other file names one."""
    inside = root.is_dir()  # then the name of a folder inside may also tell the split
    named = [
        (split_of(file.stem) or (split_of(file.parent.name) if inside and file.parent != root else None), file)
        for file in files
    ]
    lost = next((file for split, file in named if split is None), None)
    if lost is not None and any(split for split, _ in named):
        raise DstillError(
            f"{lost} does not say which split it is, but other files beside it do: put train or test into its name, or pass "
            "a pattern that does not match it, such as 'cifar10-*.parquet'"
        )
    by_split: dict[str, list[Path]] = {}
    for split, file in named:
        by_split.setdefault(split or "train", []).append(file)
    for shards in by_split.values():
        _check_shards(shards)
    return by_split


def _check_shards(files: list[Path]) -> None:
    """Refuses to join files of different data sets, since this would mix up their classes."""
    import pyarrow.parquet as pq

    first, *others = [(file, pq.read_schema(file)) for file in files]
    for file, schema in others:
        ours, theirs = (dict(s.metadata or {}).get(b"huggingface") for s in (first[1], schema))
        if ours != theirs or not schema.equals(first[1]):
            raise DstillError(
                f"{first[0]} and {file} differ in columns or classes, so they are not parts of one data set: pass the "
                "files of one data set, for example by a pattern such as 'cifar10-*.parquet'"
            )
