"""Image folders and Parquet files on disk, as splits of `datasets`. A file that cannot be assigned is an error, not ignored."""

from __future__ import annotations

import functools
import glob
import mimetypes
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from dstill.data.quiet import load_dataset
from dstill.errors import DstillError

VALIDATION_NAMES = ("val", "valid", "validation", "dev")
TEST_NAMES = ("test", "eval", "evaluation", *VALIDATION_NAMES)
_SPLITS = {name: name for name in ("train", *TEST_NAMES)} | {"training": "train", "testing": "test"}
_UNREADABLE = (".heic", ".heif", ".avif", ".jxl")


def splits_of(pattern: str) -> dict[str, Any]:
    """The splits of local data by name.

    Args:
        pattern: path of an image folder, a Parquet file or a folder of Parquet files, or a pattern for Parquet files.

    Raises:
        DstillError: there are no such files, or a file cannot be assigned to a split and a class.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
        if not files:
            return _image_folder(path)
    elif path.is_file():
        files = _siblings(path)
    else:
        files = sorted(Path(match) for match in glob.glob(str(path)))
    if not files:
        raise DstillError(f"{path} does not exist: pass Parquet files or the root of an image folder")
    wrong = next((file for file in files if file.suffix != ".parquet"), None)
    if wrong is not None:
        raise DstillError(f"{wrong} is not a Parquet file: pass Parquet files or the root of an image folder")
    # One call for each split: in a single call, `datasets` would read every split with the class names of the first file.
    return {
        split: load_dataset("parquet", data_files=[glob.escape(str(file)) for file in shards], split="train")
        for split, shards in _by_split(path, files).items()
    }


# --- Parquet files ----------------------------------------------------------------------------------------------------


def _by_split(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """The files of each split. Files that name no split are training files, provided that no other file names one."""
    inside = root.is_dir()  # then the name of a folder inside may also tell the split
    named = [
        (_split_of(file.stem) or (_split_of(file.parent.name) if inside and file.parent != root else None), file)
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


def _split_of(name: str) -> str | None:
    """The split in the name of a file or folder, even one that is never read, such as `extra` in extra-00000-of-00001."""
    words = re.split(r"[-_.]", name.lower())
    known = next((_SPLITS[word] for word in words if word in _SPLITS), None)
    shard = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", name.lower())
    return known or (shard and shard[1])


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


def _siblings(file: Path) -> list[Path]:
    """The file and, for a training file such as `x-train.parquet`, the test file beside it, such as `x-test.parquet`."""
    others = [file.with_name(file.name.replace("train", word)) for word in TEST_NAMES] if "train" in file.name else []
    return [file, *[other for other in others if other.exists()][:1]]


# --- image folders ----------------------------------------------------------------------------------------------------


def _image_folder(root: Path) -> dict[str, Any]:
    """The splits of `root/<split>/<class>/…` or `root/<class>/…`.

    A split is a folder in `root` with folders inside. A class may therefore be called `train`.
    """
    folders = _folders(root)
    if not folders:
        raise DstillError(f"{root} has neither Parquet files nor class folders: expected {root}/train/<class>/<image>")
    _check_links(root)
    by_split: dict[str, list[Path]] = {}
    for folder in folders:
        if folder.name.lower() in _SPLITS and _folders(folder):
            by_split.setdefault(_SPLITS[folder.name.lower()], []).append(folder)
    if by_split:
        _check_placed(folders, [folder for parts in by_split.values() for folder in parts])
    else:
        by_split["train"] = [root]
    splits = {split: found for split, parts in by_split.items() if (found := _split(parts)) is not None}
    if not splits or ("train" in splits and splits["train"].features["label"].num_classes < 2):
        raise DstillError(f"{root} does not have two class folders or more: expected {root}/train/<class>/<image>")
    return splits


def _check_placed(folders: list[Path], splits: list[Path]) -> None:
    for folder in folders:
        if folder not in splits and any(_is_image(file) for file in _files(folder)):
            raise DstillError(
                f"{folder} has images that belong to no split and no class, beside {splits[0]}/<class>: move it, or remove it"
            )


def _split(parts: list[Path]) -> Any:
    """A `datasets.Dataset` of the images in the class folders of these folders; None if there are no images."""
    import datasets

    found = sorted((str(image), folder.name) for part in parts for folder in _class_folders(part) for image in _images(folder))
    if not found:
        return None
    names = sorted({name for _, name in found})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    ids = {name: c for c, name in enumerate(names)}
    columns = {"image": [path for path, _ in found], "label": [ids[name] for _, name in found]}
    return datasets.Dataset.from_dict(columns, features=features)


def _class_folders(part: Path) -> list[Path]:
    loose = next((file for file in sorted(part.iterdir()) if _visible(file) and file.is_file() and _is_image(file)), None)
    if loose is not None:
        raise DstillError(f"{loose} lies beside the class folders, so it has no class: move it into one of them, or remove it")
    return _folders(part)


def _images(folder: Path) -> list[Path]:
    """The images of a class, at any depth below its folder."""
    files = list(_files(folder))
    images = [file for file in files if _is_image(file)]
    if not images:
        only = f", only files such as {files[0].name}" if files else ""
        raise DstillError(f"{folder} holds no image that can be read{only}: remove it")
    inner = next((part for file in images for part in file.relative_to(folder).parents if part.name.lower() in _SPLITS), None)
    if inner is not None:
        raise DstillError(f"{folder / inner} looks like a split inside of a class: pass {folder} itself, or rename it")
    return images


def _files(folder: Path) -> Iterator[Path]:
    for inner, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(inner, name) for name in sorted(names) if not name.startswith("."))


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if _visible(child) and child.is_dir())


def _visible(path: Path) -> bool:
    return not path.name.startswith(".")


def _is_image(file: Path) -> bool:
    """Whether a file is an image: by its suffix or, if the suffix tells nothing, by its content.

    Raises:
        DstillError: the file is an image in a format that cannot be read.
    """
    if file.suffix.lower() in _readable():
        return True
    kind = mimetypes.guess_type(file.name)[0]
    if file.suffix.lower() in _UNREADABLE or (kind or "").startswith("image/"):
        raise DstillError(f"{file} is an image in a format that cannot be read: convert it, for example to PNG, or remove it")
    return kind is None and _opens(file)


@functools.cache
def _readable() -> frozenset[str]:
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _opens(file: Path) -> bool:
    try:
        with Image.open(file):
            return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def _check_links(root: Path) -> None:
    """Refuses links to folders, which may form cycles, and broken links, whose images would be missing."""
    for folder, folders, names in os.walk(root):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        lost = [name for name in names if not os.path.exists(os.path.join(folder, name))]
        for name, reason in [*((name, "a link to a folder") for name in linked), *((name, "a broken link") for name in lost)]:
            raise DstillError(
                f"{folder}/{name} is {reason}, so its images would be left out: copy them here, or remove the link"
            )
