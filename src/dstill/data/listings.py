"""Lists that name the class of each image file: metadata.csv and .jsonl of Hugging Face, CSV and TSV, val_annotations.txt."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstill.data.columns import LABEL_NAMES, choose
from dstill.data.labels import Labels, hidden, read_labels
from dstill.data.parquet import split_of
from dstill.data.pictures import Pictures
from dstill.data.splits import SPLITS, Part, Parts, Reading
from dstill.data.walking import files_in, folders_in, images_below
from dstill.errors import DstillError, suggest

SUFFIXES = (".csv", ".tsv", ".jsonl")
_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: file, class and box, without a heading
_SPLIT_NAMES = ("split", "set", "subset", "partition", "data set", "dataset")
_PROBED = 20  # rows that tell whether a column names files


@dataclass(frozen=True)
class Listing:
    """A list of image files.

    Attributes:
        path: the file of the list.
        columns: names of the columns; their numbers from 1 if the list has no heading.
        rows: the cells of each row.
        file: column that names the image files.
        finder: where the files are.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    file: str
    finder: Finder

    def cells(self, column: str) -> list[Any]:
        """The cells of a column."""
        place = self.columns.index(column)
        return [row[place] for row in self.rows]


class Finder:
    """Finds the files that a list names: by their path from its folder, or by their name, with or without a suffix.

    Args:
        listing: the list. Images that `train.csv` names may lie in the folder `train` beside it.
    """

    def __init__(self, listing: Path) -> None:
        self.folder = listing.parent
        split = split_of(listing.stem)
        own = [folder for folder in folders_in(self.folder) if split and SPLITS.get(folder.name.lower()) == split]
        self._places = [self.folder, *own]

    @functools.cached_property
    def _by_name(self) -> dict[str, Path | None]:
        """Images by name and by name without suffix; None for a name that several have."""
        found: dict[str, Path | None] = {}
        for image in images_below(self._places[-1]):
            for name in {image.name, image.stem}:
                found[name] = None if name in found else image
        return found

    def find(self, value: Any) -> Path | None:
        """The image that a cell names; None if there is none."""
        if not isinstance(value, str) or not value or "\0" in value:
            return None
        spellings = dict.fromkeys((value, value.replace("\\", "/")))  # lists that were written on Windows
        files = (place / one for one in spellings for place in self._places if len(one) < 500)
        direct = next((file for file in files if file.is_file()), None)
        return direct or (self._by_name.get(value) if "/" not in value else None)


def listing_in(folder: Path, how: Reading) -> Listing | None:
    """The list of image files in a folder, if there is one.

    Raises:
        DstillError: there are several; or a list cannot be read.
    """
    found = [one for file in files_in(folder) if (one := read_listing(file, how)) is not None]
    named = [one for one in found if one.path.stem == "metadata"]
    if len(found) > 1 and len(named) != 1:
        raise several([one.path for one in found], "images")
    return next(iter(named or found), None)


def several(paths: Sequence[Path], what: str) -> DstillError:
    """The error for lists of which only one can count."""
    return DstillError(f"{' and '.join(map(str, paths))} all list {what}: pass the one that counts, or remove the others")


def is_list(file: Path) -> bool:
    """Whether the name of a file is that of a list."""
    return file.suffix.lower() in SUFFIXES or file.name == _ANNOTATIONS


def read_listing(file: Path, how: Reading) -> Listing | None:
    """A file as a list of images; None if none of its columns names image files.

    Raises:
        DstillError: it cannot be read, or several columns name image files.
    """
    if not is_list(file):
        return None
    try:
        heading, rows = _jsonl(file) if file.suffix.lower() == ".jsonl" else _separated(file)
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise DstillError(f"{file} cannot be read as a list of images: {error}") from error
    finder = Finder(file)
    if any(map(finder.find, heading)) and not any(map(_is_label_name, heading)):
        heading, rows = tuple(map(str, range(1, len(heading) + 1))), [heading, *rows]
    candidates = _file_columns(heading, rows[:_PROBED], finder)
    if not candidates and how.image_column not in heading:
        return None
    column = how.image_column or ("file_name" if "file_name" in candidates else None)
    column = column or choose(str(file), candidates, "--image-column", "images")
    if column not in heading:
        raise DstillError(f"{file} has no column {column!r}; {suggest(column, heading)}")
    return Listing(file, heading, tuple(rows), column, finder)


def _file_columns(heading: Sequence[str], rows: Sequence[Sequence[Any]], finder: Finder) -> list[str]:
    """The columns that name image files: with their suffix, or else all of them without."""
    found = [[finder.find(row[i]) for row in rows] for i in range(len(heading))]
    cells = [[Path(str(row[i])).name for row in rows] for i in range(len(heading))]
    whole = [
        any(path and path.name == name for path, name in zip(*both, strict=True)) for both in zip(found, cells, strict=True)
    ]
    bare = [bool(rows) and all(paths) and heading[i].lower() not in LABEL_NAMES for i, paths in enumerate(found)]
    return [column for column, named in zip(heading, whole if any(whole) else bare, strict=True) if named]


def listed_parts(listing: Listing, name: str, how: Reading) -> Parts:
    """The splits of a list: those that its column `split` names, else the one in its file name, else training images.

    Raises:
        DstillError: several columns may be the class, or there is none.
    """
    split = next((c for c in listing.columns if c.lower() in _SPLIT_NAMES and _tells_splits(listing.cells(c))), None)
    if split is None:
        key = split_of(listing.path.stem) or "train"
        return {key: functools.partial(listed_part, listing, name, how)}
    words = [SPLITS.get(str(word).lower(), "") for word in listing.cells(split)]
    if others := [str(cell) for cell, word in zip(listing.cells(split), words, strict=True) if not word]:
        how.say(
            f"{len(others):,} images of {listing.path} are left out, since their {split} is neither for training nor for "
            f"testing, for example {others[0]!r}"
        )

    def read(key: str) -> Part:
        rows = tuple(row for row, word in zip(listing.rows, words, strict=True) if word == key)
        return listed_part(replace(listing, rows=rows), name, how, beside=(split,))

    return {key: functools.partial(read, key) for key in dict.fromkeys(words) if key}


def _tells_splits(cells: Sequence[Any]) -> bool:
    """Whether cells are words for splits, or some are and say which images are for training and which for testing."""
    known = {SPLITS.get(str(cell).lower()) for cell in cells}
    return None not in known or ("train" in known and len(known) > 2)


def listed_part(listing: Listing, name: str, how: Reading, beside: Sequence[str] = ()) -> Part:
    """The images of a list and their classes. Files that are not there are damaged images."""
    found = [listing.finder.find(cell) for cell in listing.cells(listing.file)]
    cells = [path or listing.finder.folder / str(cell) for path, cell in zip(found, listing.cells(listing.file), strict=True)]
    return Part(Pictures(name, cells), _labels(listing, how, beside))


def labelled(listing: Listing) -> bool:
    """Whether a column of a list is called like one of classes."""
    return listing.path.name == _ANNOTATIONS or any(map(_is_label_name, listing.columns))


def _is_label_name(column: str) -> bool:
    return column.lower() in LABEL_NAMES


def _labels(listing: Listing, how: Reading, beside: Sequence[str]) -> Labels:
    """The classes that a list gives; hidden ones if it names files alone."""
    others = [c for c in listing.columns if c not in (listing.file, *beside)]
    column = how.label_column or _label_column(listing, others)
    if column is None:
        return hidden(len(listing.rows))
    if column not in listing.columns:
        raise DstillError(f"{listing.path} has no column {column!r}; {suggest(column, listing.columns)}")
    return read_labels(listing.cells(column), f"{listing.path} (column {column})", class_names=how.class_names)


def _label_column(listing: Listing, columns: Sequence[str]) -> str | None:
    """The column that is called like one of classes, or else the only one; None if there is none."""
    named = columns[:1] if listing.path.name == _ANNOTATIONS else [c for c in columns if _is_label_name(c)]
    candidates = named or columns
    if not candidates:
        return None
    if len(candidates) > 1 and all(str(cell) in ("0", "1") for c in candidates for cell in listing.cells(c)):
        raise DstillError(
            f"{listing.path} has a column of 0 and 1 for each class ({', '.join(candidates)}), but one column must name the "
            f"class: if each image has one, add it by frame['label'] = frame[{[*candidates]!r}].idxmax(axis=1)"
        )
    column = choose(str(listing.path), candidates, "--label-column", "classes")
    cells = list(map(str, listing.cells(column)))
    if not named and len(set(cells)) == len(cells) > 2:
        raise DstillError(
            f"{listing.path}: the column {column} has another value for each image, so it is not one of classes: add a column "
            "label, or pass --label-column"
        )
    return column


# --- reading files ----------------------------------------------------------------------------------------------------

_Rows = tuple[tuple[str, ...], list[tuple[Any, ...]]]


def _separated(file: Path) -> _Rows:
    """Heading and rows of a file with commas, semicolons or tabs."""
    text = file.read_bytes().decode("utf-8-sig")
    first = text.partition("\n")[0]
    mark = "\t" if file.suffix.lower() != ".csv" or "\t" in first else ";" if ";" in first and "," not in first else ","
    cells = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    lines = [tuple(cell.strip() for cell in line) for line in cells if line]
    if not lines:
        return (), []
    heading, *rows = lines
    uneven = next((number for number, row in enumerate(rows, 2) if len(row) != len(heading)), None)
    if uneven is not None:
        raise ValueError(f"line {uneven} has not as many cells as the first line")
    return heading, rows


def _jsonl(file: Path) -> _Rows:
    """Heading and rows of a file with a JSON object in each line."""
    objects = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not all(isinstance(one, dict) for one in objects):
        raise ValueError("each line must be a JSON object")
    heading = tuple(dict.fromkeys(str(key) for one in objects for key in one))
    return heading, [tuple(one.get(key) for key in heading) for one in objects]
