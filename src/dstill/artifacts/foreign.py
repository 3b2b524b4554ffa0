"""Reads the files in which other programs publish distilled sets: `.pt` files and folders of images. Runs nothing in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from dstill.artifacts.card import safe_name
from dstill.data.real import RealSet
from dstill.data.walking import readable
from dstill.errors import DstillError, suggest

LARGEST_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Found:
    """The parts of a set that a file or a folder holds.

    Attributes:
        images: `[S, C, H, W]`.
        labels: class ids, probabilities or logits.
        alpha: learning rate; None if there is none.
        preprocessing: tensors of the preprocessing, by name, if the files tell them.
        pictures: whether the images are files of pixels, so that no preprocessing has been applied.
    """

    images: Tensor
    labels: Tensor
    alpha: float | None = None
    preprocessing: dict[str, Tensor] | None = None
    pictures: bool = False


def read(path: Path, real: RealSet) -> Found:
    """The contents of a `.pt` file of images with its neighbours, of a result of DC, DSA or DM, or of a folder of images.

    Raises:
        DstillError: there is no such file, it is damaged or too large, holds more than tensors, or holds no set.
    """
    if path.is_dir():
        files = sorted(path.glob("images*.pt")) or sorted(path.glob("res*.pt"))
        if not files:
            return _pictures(path, real)
        if len(files) > 1:
            raise DstillError(f"{path} holds several sets: pass one of {', '.join(str(file) for file in files)}")
        path = files[0]
    content = trusted(path)
    if isinstance(content, dict):
        return _from_dc(content, path)
    if not isinstance(content, Tensor):
        raise DstillError(f"{path} holds {type(content).__name__}, neither images nor a result of DC, DSA or DM")
    beside = {kind: path.with_name(path.name.replace("images", kind)) for kind in ("labels", "lr")}
    if beside["labels"] == path or not beside["labels"].exists():
        raise DstillError(f"there are no labels beside {path}: put {path.name.replace('images', 'labels')} there")
    alpha = float(tensor(trusted(beside["lr"]), "learning rate", beside["lr"])) if beside["lr"].exists() else None
    labels = tensor(trusted(beside["labels"]), "labels", beside["labels"])
    return Found(content.detach(), labels, alpha, _preprocessing(path.with_name("preprocess.pt")))


def _preprocessing(path: Path) -> dict[str, Tensor] | None:
    """The tensors that dstill writes beside the images of an export."""
    content = trusted(path) if path.exists() else None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return {str(name).removeprefix("preprocess."): value for name, value in content.items()}


def tensor(value: Any, what: str, path: Path) -> Tensor:
    """A tensor, from a tensor or from numbers.

    Raises:
        DstillError: it is neither, or no single number where a learning rate is expected.
    """
    try:
        found = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DstillError(f"{path} holds no {what} but {type(value).__name__}") from error
    if found.is_complex() or (what == "learning rate" and found.numel() != 1):
        raise DstillError(f"{path} holds no {what} but {found.dtype} {tuple(found.shape)}")
    return found


def _from_dc(content: dict[str, Any], path: Path) -> Found:
    try:
        images, labels = content["data"][-1][:2]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DstillError(f"{path} holds no `data` of images and labels, as results of DC, DSA and DM do") from error
    return Found(tensor(images, "images", path), tensor(labels, "labels", path))


def check_size(path: Path, count: int, most: int = LARGEST_BYTES) -> None:
    """Refuses what is larger than any distilled set."""
    if count > most:
        raise DstillError(f"{path} holds {count / 2**30:.1f} GiB, more than a distilled set or a buffer has")


def trusted(path: Path) -> Any:
    """The content of a `.pt` file: tensors and plain containers. No code in it is run.

    Raises:
        DstillError: the file does not exist, is too large, is damaged, or holds anything else.
    """
    if not path.is_file():
        raise DstillError(f"{path} does not exist")
    check_size(path, path.stat().st_size)
    # Some files also hold accuracies as NumPy numbers. These types are harmless.
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    harmless = [scalar, np.dtype, np.float64, type(np.dtype(np.float64))]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, depending on what is wrong with the file
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DstillError(
            f"{path} cannot be read as tensors ({reason}): it is damaged, or it holds code, which is refused"
        ) from error


# --- folders of images ------------------------------------------------------------------------------------------------


def _pictures(folder: Path, real: RealSet) -> Found:
    """Images in folders of classes, or beside each other with the class in the name of the file, class by class."""
    files = _image_files(folder)
    if not files:
        raise DstillError(
            f"{folder} holds no set: there is no images_best.pt, no export of dstill, and no folder of images (<class>/*.png)"
        )
    if real.channels not in (1, 3):
        raise DstillError(f"image files have 1 or 3 channels, {real.name} has {real.channels}")
    check_size(folder, len(files) * real.train.images[0].numel())
    placed = sorted((_class_of_file(file, folder, files, real.class_names), file) for file in files)
    images = torch.stack([_decoded(file, real) for _, file in placed])
    return Found(images, torch.tensor([label for label, _ in placed]), pictures=True)


def _image_files(folder: Path) -> list[Path]:
    found = [file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.suffix.lower() in readable()]
    hidden = [file for file in found if any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = sorted(set(found) - set(hidden))
    inside = [file for file in files if file.parent != folder]
    # A picture of the whole set may lie beside the folders of classes.
    return inside or files


def _class_of_file(file: Path, folder: Path, files: Sequence[Path], names: tuple[str, ...]) -> int:
    """The class in the name of the folder; without folders, in that of the file, such as class003_id000.jpg or cat_3.png."""
    if file.parent != folder:
        said, known = file.parent.name, class_id(file.parent.name, names)
    else:
        parted = re.fullmatch(r"(.+?)[_-](?:id|img)?\d+", file.stem)
        alone = len(files) <= len(names)  # then a plain number may be that of a class
        said = parted[1] if parted else file.stem
        known = class_id(said, names) if parted or alone or not said.isdigit() else None
    if known is None:
        raise DstillError(
            f"{file} does not say its class: {said!r} is neither a class nor the number of one; {suggest(said, names)}. Put "
            "the images of each class into a folder with its name or number"
        )
    return known


def class_id(said: str, names: tuple[str, ...]) -> int | None:
    """The class that a name means: its own, the same in other case, a numbered one as dstill writes it, or its number.

    Numbers count from 0, with any word before them, as in `new003`. Where classes are called by numbers, their names count.

    Example:
        >>> names = ("cat", "big dog")
        >>> [class_id(said, names) for said in ("cat", "Big Dog", "big_dog", "001-big_dog", "00001", "new000", "class1", "2")]
        [0, 1, 1, 1, 1, 0, 1, None]
        >>> class_id("04", ("4", "9")), class_id("1", ("4", "9"))
        (0, None)
    """
    plain = [safe_name(name).lower() for name in names]
    for form in (said, re.sub(r"^\d{3,}-", "", said)):
        if form in names:
            return names.index(form)
        if plain.count(safe_name(form).lower()) == 1:
            return plain.index(safe_name(form).lower())
    number = re.fullmatch(r"[A-Za-z]*[_-]?(\d{1,6})", said)
    if number is None:
        return None
    if all(name.isdecimal() for name in names):
        return next((c for c, name in enumerate(names) if int(name) == int(number[1])), None)
    return int(number[1]) if int(number[1]) < len(names) else None


def _decoded(file: Path, real: RealSet) -> Tensor:
    """The pixels of an image file, uint8 `[C, H, W]`."""
    height, width = real.size
    try:
        with Image.open(file) as image:
            size, deep = image.size, image.mode.startswith(("I", "F"))
            if size == (width, height) and not deep:
                array = np.array(image.convert("L" if real.channels == 1 else "RGB"))
                return torch.from_numpy(array.reshape(height, width, -1)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
        raise DstillError(f"{file} cannot be read ({reason}): repair or remove it") from error
    if deep:
        raise DstillError(f"{file} has more than 8 bits a channel: save it with 8")
    raise DstillError(
        f"{file} has {size[0]}x{size[1]} pixels, {real.name} has {width}x{height} as it is read here: pass --image-size "
        f"{size[0]}, or resize the images"
    )
