"""Reads images from wherever they are: a name, the Hugging Face hub, a path, or memory."""

from __future__ import annotations

import functools
import glob
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dstill.data import objects
from dstill.data.catalog import DATASETS, Entry, named
from dstill.data.columns import part_of
from dstill.data.labels import Labels
from dstill.data.local import FILES, KINDS, parts_at
from dstill.data.quiet import load_dataset
from dstill.data.splits import Part, Parts, Raw, Reading, decoded, keyed
from dstill.errors import DstillError, suggest

_FITS = ("pad", "resize", "crop", "error")


def read(source: Any, how: Reading) -> Raw:
    """Decodes a source.

    Args:
        source: see `dstill.load_real`.
        how: how it is read.

    Raises:
        DstillError: the source is unknown, cannot be read or fetched, or holds something else than labelled images.
    """
    if how.fit is not None and how.fit not in _FITS:
        raise DstillError(f"unknown fit {how.fit!r}; {suggest(how.fit, _FITS)}")
    if not isinstance(source, str | Path):
        return decoded(objects.NAME, objects.parts_of(source, how), how, size=how.image_size, fit=how.fit or "resize")
    name = str(source)
    subset, _, root = name.partition("@")
    entry = DATASETS[subset] if root and subset in DATASETS else named(name)
    if entry is not None:
        usual = "resize" if how.image_size and entry.fit == "error" else entry.fit
        entry = replace(entry, size=how.image_size or entry.size, fit=how.fit or usual)
        return replace(_decoded(subset, root or None, entry, how), known=subset)
    path = Path(name).expanduser()
    entry = Entry(name, size=how.image_size, fit=how.fit or ("resize" if how.image_size else "error"))
    if name and (path.exists() or glob.glob(str(path))):
        if name in DATASETS:
            how.say(f"{name} is read from {path.resolve()}, not the data set of that name: rename it to load that one")
        stem = path.name if path.is_dir() else path.stem
        label = stem.replace("-train", "").replace("*", "").strip("-_") or path.resolve().name
        return _decoded(label, name, entry, how)
    if path.suffix.lower() in FILES or (name.count("/") == 1 and path.parent.is_dir()):
        raise DstillError(f"{name} does not exist: pass {KINDS}, or a name of dstill ls datasets")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _decoded(name, None, entry, how)
    raise DstillError(f"{name!r} is neither a file, a folder nor a known data set; {suggest(name, DATASETS)}")


def _decoded(name: str, path: str | None, entry: Entry, how: Reading) -> Raw:
    """The data of an entry: at a path, else on the hub, else embedded."""

    def decode(parts: Parts) -> Raw:
        return decoded(name, parts, how, usual=entry.test, size=entry.size, fit=entry.fit)

    if entry.hub or path is not None:
        how.tell(0, 1)  # opening the files takes a while, too
    if path is None:
        return decode(_hub(name, entry, how) if entry.hub else _digits())
    try:
        return decode(parts_at(path, name, entry, how))
    except (DstillError, MemoryError):
        raise
    except Exception as error:  # pyarrow and datasets raise many unrelated types for damaged files
        cause = error.__cause__ or error  # `datasets` wraps the reason in "an error occurred"
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise DstillError(f"{path} could not be read as Parquet files or a folder of images: {reason}") from error


def _digits() -> Parts:
    """scikit-learn's digits, with values 0 .. 16 stored as 0 .. 240 and a stratified 80/20 split with a fixed seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy((data.images * 15).astype(np.uint8)).unsqueeze(1)
    ids, names = data.target.astype(np.int64), tuple(str(c) for c in data.target_names)
    fitting, testing = train_test_split(np.arange(len(ids)), test_size=0.2, stratify=data.target, random_state=0)

    def part(rows: np.ndarray) -> Part:
        return Part(images[rows], Labels(ids[rows], names))

    return {"train": functools.partial(part, fitting), "test": functools.partial(part, testing)}


def _hub(name: str, entry: Entry, how: Reading) -> Parts:
    try:
        splits = load_dataset(entry.hub, entry.config)
    except Exception as error:  # the hub client raises many unrelated types, even for "no network" and "not found"
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        said = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise DstillError(
            f"{name!r} could not be fetched from the Hugging Face hub ({said}). Without a network, "
            "pass a folder of images or Parquet files instead of the name"
        ) from error
    return {split: functools.partial(part_of, name, table, entry, how) for split, table in keyed(splits).items()}
