"""Finding image files below a folder: hidden ones are passed over, links to folders refused, files told by their content."""

from __future__ import annotations

import functools
import mimetypes
import os
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from dstill.errors import DstillError

_UNREADABLE = (".heic", ".heif", ".avif", ".jxl")
_JUNK = ("__MACOSX", "@eaDir", "lost+found")  # what archives, network drives and disks leave behind


def files_below(folder: Path) -> Iterator[Path]:
    """All files at any depth, in a fixed order."""
    for inner, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if visible(Path(name))]
        yield from (Path(inner, name) for name in sorted(names) if visible(Path(name)))


def files_in(folder: Path) -> list[Path]:
    """The files directly in a folder."""
    return sorted(child for child in folder.iterdir() if visible(child) and child.is_file())


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in a folder."""
    return sorted(child for child in folder.iterdir() if visible(child) and child.is_dir())


def images_below(folder: Path) -> list[Path]:
    """The images at any depth."""
    return [file for file in files_below(folder) if is_image(file)]


def visible(path: Path) -> bool:
    """Whether a file or folder is one that a user has put there."""
    return not path.name.startswith(".") and path.name not in _JUNK


def is_image(file: Path) -> bool:
    """Whether a file is an image, even one that cannot be read: by its suffix or, if that tells nothing, by its content."""
    if file.suffix.lower() in readable() or is_foreign(file):
        return True
    return mimetypes.guess_type(file.name)[0] is None and _opens(file)


def is_foreign(file: Path) -> bool:
    """Whether a file is, by its suffix, an image in a format that cannot be read."""
    suffix, kind = file.suffix.lower(), mimetypes.guess_type(file.name)[0] or ""
    return suffix not in readable() and (suffix in _UNREADABLE or kind.startswith("image/"))


@functools.cache
def readable() -> frozenset[str]:
    """The suffixes of image files that can be read, in lower case."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def _opens(file: Path) -> bool:
    try:
        with Image.open(file):
            return True
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def check_links(root: Path) -> None:
    """Refuses links to folders, which may form cycles, and broken links, whose images would be missing."""
    for folder, folders, names in os.walk(root):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        lost = [name for name in names if not os.path.exists(os.path.join(folder, name))]
        for name, reason in [*((name, "a link to a folder") for name in linked), *((name, "a broken link") for name in lost)]:
            raise DstillError(
                f"{folder}/{name} is {reason}, so its images would be left out: copy them here, or remove the link"
            )
