"""Folders of images: one folder for each class, or a list that names the classes. What cannot be placed is an error."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from dstill.data.labels import hidden, read_labels
from dstill.data.listings import Listing, is_list, labelled, listed_part, listed_parts, listing_in, read_listing, several
from dstill.data.parquet import split_of
from dstill.data.pictures import Pictures
from dstill.data.splits import SPLITS, Part, Parts, Reading
from dstill.data.walking import check_links, files_below, files_in, folders_in, images_below, is_image
from dstill.errors import DstillError

# A single folder of such a name, in a split for testing, is no class: it holds images whose classes are kept secret.
_NO_CLASS = ("images", "image", "imgs", "img", "data", "unknown", "unlabeled", "unlabelled", *SPLITS)
_HOW = "<class>/<image>, or a file metadata.csv with the columns file_name and label"


def folder_parts(root: Path, name: str, how: Reading) -> Parts:
    """The splits of `root/<split>/<class>/…`, `root/<class>/…`, or of the lists in these folders.

    A split is a folder in `root` that is called like one and holds folders, a list, or only images. A class may therefore be
    called `train`, as long as it lies among other classes.

    Args:
        root: the folder.
        name: name of the data set, for errors.
        how: columns and class names that the user gives.

    Raises:
        DstillError: an image belongs to no split or no class, or the classes may be told in two ways.
    """
    check_links(root)
    splits = _split_folders(root)
    lists = [one for file in files_in(root) if (one := read_listing(file, how)) is not None]
    if lists and (how.asks_for_columns or not _sorted_by_class(root, splits)):
        return _listed(lists, name, how)
    if not splits:
        if not folders_in(root):
            loose = any(map(is_image, files_in(root)))
            held = "images, but no class folders" if loose else "neither Parquet files nor class folders"
            raise DstillError(f"{root} has {held}: expected {root}/train/{_HOW}")
        return {"train": functools.partial(_split, "train", [root], name, how)}
    for one in filter(labelled, lists):
        _say_unread(one, how)
    _check_placed(folders_in(root), [folder for folders in splits.values() for folder in folders])
    return {split: functools.partial(_split, split, folders, name, how) for split, folders in splits.items()}


def _say_unread(listing: Listing, how: Reading) -> None:
    how.say(f"{listing.path} is not read, since the folders say the classes; --label-column takes a column of it")


def _split_folders(root: Path) -> dict[str, list[Path]]:
    """The folders of each split; empty if the folders are classes."""
    folders = folders_in(root)
    called = [folder for folder in folders if folder.name.lower() in SPLITS]
    certain = [folder for folder in called if folders_in(folder) or any(map(is_list, files_in(folder)))]
    several = len({SPLITS[folder.name.lower()] for folder in called}) > 1
    # One folder of images called `train` among others may be a class, railways beside buses; two such names are splits.
    taken = called if certain or several else []
    found: dict[str, list[Path]] = {}
    for folder in taken:
        if folder in certain or any(map(is_image, files_in(folder))):
            found.setdefault(SPLITS[folder.name.lower()], []).append(folder)
    return found


def _sorted_by_class(root: Path, splits: dict[str, list[Path]]) -> bool:
    """Whether the folders of training images say the classes, by themselves or by lists of their own."""
    folders = splits.get("train", [] if splits else [root])
    return any(
        len(folders_in(folder)) > 1 or (folder != root and any(map(is_list, files_in(folder)))) for folder in folders
    ) and not any(map(is_image, files_in(root)))


def _listed(lists: Sequence[Listing], name: str, how: Reading) -> Parts:
    """The splits of the lists in a folder: of a single one, or of one for each split."""
    main = [one for one in lists if one.path.stem == "metadata"] or [one for one in lists if split_of(one.path.stem)] or lists
    for one in lists:
        if one not in main:
            how.say(f"{one.path} is not read, since {main[0].path} lists the images")
    parts: dict[str, functools.partial[Part]] = {}
    for one in main:
        for split, read in listed_parts(one, name, how).items():
            if split in parts:
                raise several([other.path for other in main], f"{split} images")
            parts[split] = functools.partial(read)
    _note_unlisted(main, how)
    return parts


def _note_unlisted(lists: Sequence[Listing], how: Reading) -> None:
    folder = lists[0].path.parent
    listed = {one.finder.find(cell) for one in lists for cell in one.cells(one.file)}
    left = [image for image in images_below(folder) if image not in listed]
    if left:
        how.say(f"{len(left):,} images in {folder} are in no list and left out, for example {left[0]}")


def _check_placed(folders: list[Path], splits: list[Path]) -> None:
    for folder in folders:
        if folder not in splits and any(is_image(file) for file in files_below(folder)):
            raise DstillError(
                f"{folder} has images that belong to no split and no class, beside {splits[0]}/<class>: move it, or remove it"
            )


def _split(split: str, folders: Sequence[Path], name: str, how: Reading) -> Part:
    """The images of a split: of its list, or of its class folders, or images without classes."""
    if len(folders) == 1:
        folder, inner = folders[0], folders_in(folders[0])
        listing = listing_in(folder, how)
        loose = next((file for file in files_in(folder) if is_image(file)), None)
        if listing is not None and (loose or len(inner) < 2 or how.asks_for_columns):
            _note_unlisted([listing], how)
            return listed_part(listing, name, how)
        if listing is not None and labelled(listing):
            _say_unread(listing, how)
        without = not inner if loose else len(inner) == 1 and inner[0].name.lower() in _NO_CLASS
        if without and split != "train":
            images = images_below(folder)
            return Part(Pictures(name, images), hidden(len(images)))
        if without:
            raise DstillError(f"{folder} holds images without classes: expected {folder}/{_HOW}")
    return _sorted(split, folders, name, how)


def _sorted(split: str, folders: Sequence[Path], name: str, how: Reading) -> Part:
    """The images in the class folders of these folders."""
    if how.asks_for_columns:
        raise DstillError(f"{folders[0]} has class folders and no list of images: leave out --label-column and --image-column")
    classes = [folder for part in folders for folder in _class_folders(part)]
    found = sorted((str(image), folder.name) for folder in classes for image in _images(folder))
    names = sorted({folder.name for folder in classes})
    if split == "train" and len(names) < 2:
        raise DstillError(f"{folders[0]} does not have two class folders or more: expected {folders[0]}/{_HOW}")
    labels = read_labels([c for _, c in found], str(folders[0]), names=names, class_names=how.class_names)
    return Part(Pictures(name, [path for path, _ in found]), labels)


def _class_folders(part: Path) -> list[Path]:
    loose = next((file for file in files_in(part) if is_image(file)), None)
    if loose is not None:
        raise DstillError(f"{loose} lies beside the class folders, so it has no class: move it into one of them, or remove it")
    folders = folders_in(part)
    odd = next((folder for folder in folders if not _is_text(folder.name)), None)
    if odd is not None:
        raise DstillError(f"the folder {str(odd)!a} could not be read: its name is not text in UTF-8: rename it")
    return folders


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _images(folder: Path) -> list[Path]:
    """The images of a class, at any depth below its folder."""
    files = list(files_below(folder))
    images = [file for file in files if is_image(file)]
    if not images:
        only = f", only files such as {files[0].name}" if files else ""
        raise DstillError(f"{folder} holds no image that can be read{only}: remove it")
    inner = next((part for file in images for part in file.relative_to(folder).parents if part.name.lower() in SPLITS), None)
    if inner is not None:
        raise DstillError(f"{folder / inner} looks like a split inside of a class: pass {folder} itself, or rename it")
    return images
