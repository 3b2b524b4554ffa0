"""Decoding: image files, bytes and Pillow images become one uint8 tensor of one size and one number of channels."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dstill.data.walking import is_foreign
from dstill.errors import DstillError

_GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")
_DARK = 1 << 14  # a largest value of 16-bit images below which they use only the lowest bits
_TICK = 200  # images
_NAMED = 20  # damaged images that an error names


class Fault(NamedTuple):
    """An image that cannot be read: its row, counted from 0, its path if it has one, and why."""

    row: int
    path: str
    reason: str


class _DamageError(Exception):
    """An image cannot be read; the argument is the reason."""


class Pictures:
    """The images of a split that are still to be decoded.

    Args:
        name: name of the data set, for errors.
        cells: each image as a path, as bytes, as a Pillow image, or as a record with `bytes` or `path`. They are passed
            twice: for the headers, and to decode them.
    """

    def __init__(self, name: str, cells: Sequence[Any]) -> None:
        self.name, self.cells = name, cells
        self.deepest: int | None = None  # the largest value of the 16-bit images that are decoded

    def __len__(self) -> int:
        return len(self.cells)

    def are_grey(self) -> bool:
        """Whether every image that can be read is grey. Stops at the first image with colour."""
        return all(_is_grey(cell) for cell in self.cells)

    def decode(
        self, mode: str, size: int | None, fit: str, tick: Callable[[int], None] = lambda _: None
    ) -> tuple[Tensor, list[Fault]]:
        """Decodes the images one by one, so that damaged ones can be named.

        Args:
            mode: `L` or `RGB`.
            size: side in pixels to bring them to; None to keep their size.
            fit: how, see `load_real`.
            tick: called now and then with the number of images that are decoded, and at the end.

        Returns:
            uint8 `[N, C, H, W]`, and the damaged images, whose place in the tensor is not filled.

        Raises:
            DstillError: images differ in size.
        """
        decoded: np.ndarray | None = None
        faults: list[Fault] = []
        for row, cell in enumerate(self.cells):
            if row % _TICK == 0:
                tick(row)
            try:
                opened = _upright(cell)
                if _is_deep(opened):
                    self.deepest = max(self.deepest or 0, int(np.asarray(opened).max()))
                image = _opaque(_eight_bit(opened)).convert(mode)
            except _DamageError as damage:
                faults.append(Fault(row, _path(cell), str(damage)))
                continue
            array = np.asarray(fitted(image, size, fit))
            if decoded is None:
                decoded = np.empty((len(self.cells), *array.shape), dtype=np.uint8)
            if array.shape != decoded.shape[1:]:
                raise DstillError(
                    f"images of {self.name} differ in size ({decoded.shape[2]}x{decoded.shape[1]} and {array.shape[1]}x"
                    f"{array.shape[0]}: {_path(cell) or f'row {row}'}): pass --image-size, and --fit pad, resize or crop"
                )
            decoded[row] = array
        tick(len(self.cells))
        if decoded is None:
            return torch.empty(len(self.cells), 3 if mode == "RGB" else 1, 0, 0, dtype=torch.uint8), faults
        tensor = torch.from_numpy(decoded)
        return tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous(), faults


def refuse_dark(splits: Sequence[Pictures]) -> None:
    """Raises `DstillError` if the 16-bit images of all splits use only the lowest bits, as those of 12-bit cameras do."""
    found = [one.deepest for one in splits if one.deepest is not None]
    if found and (largest := max(found)) < _DARK:
        raise DstillError(
            f"images of {splits[0].name} have 16 bits, but no value above {largest:,}, so that they would be nearly black. "
            f"Convert them, for example by (image >> {max(0, largest.bit_length() - 8)}).astype('uint8')"
        )


def damaged(name: str, faults: Sequence[Fault]) -> str:
    """A sentence that names the damaged images of a data set, up to twenty of them.

    Example:
        >>> damaged("pets", [Fault(3, "a.png", "truncated")])
        'image a.png of pets cannot be read (truncated)'
    """
    if len(faults) == 1:
        [(row, path, reason)] = faults
        where, reason = (path, reason) if path else ("in a row without a path", f"row {row}, counted from 0: {reason}")
        return f"image {where} of {name} cannot be read ({reason})"
    listed = ", ".join(f"{fault.path or f'row {fault.row}'} ({fault.reason})" for fault in faults[:_NAMED])
    more = f" and {len(faults) - _NAMED:,} more" if len(faults) > _NAMED else ""
    return f"{len(faults):,} images of {name} cannot be read: {listed}{more}"


def _path(cell: Any) -> str:
    """The path of an image; empty if it has none."""
    path = cell.get("path") if isinstance(cell, dict) else cell
    return str(path) if isinstance(path, str | Path) else str(getattr(cell, "filename", ""))


def _open(cell: Any) -> Image.Image:
    """The image of a cell, whose pixels may not be read yet."""
    image = cell if isinstance(cell, Image.Image) else _of_file(cell)
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # Pillow has a mode of 32 bits for 16-bit PGM
        raise _DamageError("the range of its 32-bit values is not known")
    return image


def _of_file(cell: Any) -> Image.Image:
    record = cell if isinstance(cell, dict) else {"bytes" if isinstance(cell, bytes) else "path": cell}
    content, path = record.get("bytes"), record.get("path")
    try:
        if content is None:
            if not isinstance(path, str | Path):
                raise _DamageError("the cell is empty" if path is None else f"the cell holds {type(path).__name__}")
            content = Path(path).read_bytes()
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError as error:
        foreign = isinstance(path, str | Path) and is_foreign(Path(path))
        raise _DamageError("convert this format, for example to PNG" if foreign else "not an image") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _DamageError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The reason of an error; the path of a missing file is named beside it anyway."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _is_grey(cell: Any) -> bool:
    try:
        return _open(cell).mode in _GREY
    except _DamageError:
        return True  # named when it is decoded


def _upright(cell: Any) -> Image.Image:
    """The decoded image, turned as the camera was held."""
    image = _open(cell)
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _DamageError(_reason(error)) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow's own conversion would clip every value above 255 to white."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if _is_deep(image) else image


def _is_deep(image: Image.Image) -> bool:
    """Whether an image is of 16-bit grey."""
    return image.mode == "I" or image.mode.startswith("I;16")


def _opaque(image: Image.Image) -> Image.Image:
    """Puts transparent images on white; the hidden colour of a transparent pixel means nothing."""
    if not image.has_transparency_data:
        return image
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image.convert("RGBA"))
    return canvas.convert("RGB")


def resize(images: Tensor, size: int, fit: str) -> Tensor:
    """Brings uint8 images `[N, C, H, W]` to `[N, C, size, size]`, as images in files are (see `load_real`)."""
    if images.shape[2:] == (size, size) or not len(images):
        return images
    planes = [np.asarray(fitted(Image.fromarray(plane), size, fit)) for plane in images.flatten(0, 1).numpy()]
    return torch.from_numpy(np.stack(planes)).view(*images.shape[:2], size, size)


def fitted(image: Image.Image, size: int | None, fit: str) -> Image.Image:
    """An image of `size` x `size` pixels, or the image itself if there is no size.

    Raises:
        DstillError: `fit` does not allow it.
    """
    if size is None or image.size == (size, size):
        return image
    if fit == "resize":
        return image.resize((size, size), Image.Resampling.BILINEAR)
    if fit == "crop":
        scale = size / min(image.size)
        image = image.resize(
            (max(size, round(image.width * scale)), max(size, round(image.height * scale))), Image.Resampling.BILINEAR
        )
        left, top = (image.width - size) // 2, (image.height - size) // 2
        return image.crop((left, top, left + size, top + size))
    if fit == "pad":
        if image.width > size or image.height > size:
            raise DstillError(
                f"an image of {image.width}x{image.height} cannot be padded to {size}x{size}: use --fit resize or crop"
            )
        canvas = Image.new(image.mode, (size, size))
        canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        return canvas
    raise DstillError(f"an image is {image.width}x{image.height}, not {size}x{size}: pass --fit pad, resize or crop")
