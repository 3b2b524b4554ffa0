"""Pictures of a distilled set, of a run, and of the real images beside them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.files import atomic
from dstill.data.real import Split
from dstill.errors import DamagedFileError

REAL_NAME = "real.webp"
_REAL_COLUMNS = 10
_MANY_CLASSES = 50
_GAP = 2
_MIN_TILE = 64
_STRIP = 8


def grid(distilled: DistilledSet, columns: int | None = None, *, stored: bool = False) -> Image.Image:
    """A picture of the images in natural colours, one row for each class, enlarged to at least 64 pixels a side.

    Below an image with a soft label is a strip with one cell for each class; the darker the cell, the more probable the class.

    Args:
        distilled: the set.
        columns: most images in a row; 10 if left out.
        stored: the stored images, instead of what they hold. A label of a part is not shown then.
    """
    distilled = distilled if stored else distilled.decoded
    per_class = min(distilled.ipc, columns or 10)
    shown = [rows[:per_class] for rows in rows_by_class(distilled)]
    # With one image per class, rows of ten classes are easier to look at than a single column.
    flat = [int(index) for row in shown for index in row]
    rows = _chunks(flat, per_class if per_class > 1 else 10)
    pixels = (distilled.pixels() * 255).round().byte()
    scale = max(1, -(-_MIN_TILE // min(pixels.shape[2:])))
    height, width = pixels.shape[2] * scale, pixels.shape[3] * scale
    labelled = distilled.labels.is_floating_point() and len(distilled.labels) == len(pixels)
    strip = _STRIP if labelled else 0
    across, down = width + _GAP, height + strip + _GAP
    canvas = Image.new("RGB", (max(len(row) for row in rows) * across + _GAP, len(rows) * down + _GAP), "white")
    for y, row in enumerate(rows):
        for x, index in enumerate(row):
            place = (_GAP + x * across, _GAP + y * down)
            canvas.paste(image_of(pixels[index]).resize((width, height), Image.Resampling.NEAREST), place)
            if strip:
                label = _label_strip(distilled.labels[index]).resize((width, strip), Image.Resampling.NEAREST)
                canvas.paste(label, (place[0], place[1] + height))
    return canvas


def _label_strip(logits: Tensor) -> Image.Image:
    """One grey pixel for each class: white for probability 0, black for 1."""
    return Image.fromarray(((1 - logits.softmax(0)) * 255).round().byte()[None].numpy()).convert("RGB")


def rows_by_class(distilled: DistilledSet) -> list[Tensor]:
    """The row numbers of each class. Sets with soft labels are stored class by class, whatever class a label favours."""
    if distilled.labels.is_floating_point():
        return list(torch.arange(len(distilled.images)).split(distilled.ipc))
    return [(distilled.class_ids == c).nonzero().squeeze(1) for c in range(distilled.classes)]


def _chunks(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def image_of(pixels: Tensor) -> Image.Image:
    """An image of uint8 pixels `[C, H, W]`: the first three channels as colours; the first as grey, if there are fewer."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] < 3 else array[:, :, :3])


def png_of(pixels: Tensor) -> bytes:
    """A PNG file of uint8 pixels `[C, H, W]`."""
    buffer = io.BytesIO()
    image_of(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def uri_of(picture: Image.Image, *, quality: int | None = None) -> str:
    """A picture as a `data:` address, to be put into a page.

    Args:
        picture: the picture.
        quality: of a WebP, from 0 to 100, where small differences do not matter; without it, the picture is an exact PNG.
    """
    buffer = io.BytesIO()
    kind, options = ("png", {"optimize": True}) if quality is None else ("webp", {"quality": quality})
    picture.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def real_sheet(split: Split, classes: int) -> Image.Image:
    """A few real images of each class, as a small picture that stays with a run.

    Each class has a square of its first four images with lines between them, ten classes to a row. It is a single image if
    there are more than 50 classes or if a class has fewer than four. Images are reduced to 64 pixels a side, or 32 with more
    than 50 classes.

    Args:
        split: the images.
        classes: the number of classes.
    """
    rows, few = split.by_class(classes), classes <= _MANY_CLASSES
    side = 2 if few and min(map(len, rows)) >= 4 else 1
    height, width = split.images.shape[2:]
    scale = min(1.0, (64 if few else 32) / max(height, width))
    across, down = max(1, round(width * scale)), max(1, round(height * scale))
    line = max(1, max(across, down) // 16)
    square = (side * (across + line) - line, side * (down + line) - line)
    columns = min(classes, _REAL_COLUMNS)
    canvas = Image.new("RGB", (columns * square[0], -(-classes // columns) * square[1]), "white")
    for c, own in enumerate(rows):
        left, top = c % columns * square[0], c // columns * square[1]
        for k, row in enumerate(own[: side**2].tolist()):
            picture = image_of(split.images[row]).resize((across, down))
            canvas.paste(picture, (left + k % side * (across + line), top + k // side * (down + line)))
    return canvas


def save_real(split: Split, classes: int, path: Path) -> None:
    """Writes `real_sheet` as a WebP, atomically; without loss up to 32 pixels a side, of which each one counts."""
    exact = max(split.images.shape[2:]) <= 32
    with atomic(path) as temporary:
        real_sheet(split, classes).save(temporary, format="WEBP", lossless=exact, quality=85)


def load_real(path: Path, classes: int) -> list[Image.Image]:
    """The square of real images of each class, from the file of `save_real`; an empty list if there is none.

    Raises:
        DamagedFileError: the file is no such picture.
    """
    if not path.exists():
        return []
    try:
        with Image.open(path) as picture:
            sheet = picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise DamagedFileError(f"{path} is damaged: remove it ({error})") from error
    columns = min(classes, _REAL_COLUMNS)
    width, height = sheet.width // columns, sheet.height // -(-classes // columns)
    corners = [(c % columns * width, c // columns * height) for c in range(classes)]
    return [sheet.crop((x, y, x + width, y + height)) for x, y in corners]


def save_grid(distilled: DistilledSet, path: Path, *, stored: bool = False) -> Path:
    """Writes the grid atomically: as lossless WebP if the name of the file ends in .webp, else as PNG."""
    with atomic(path) as temporary:
        form = {"format": "WEBP", "lossless": True} if path.suffix == ".webp" else {"format": "PNG"}
        grid(distilled, stored=stored).save(temporary, **form)
    return path


def save_animation(frames: Sequence[Path], path: Path, milliseconds: int = 200) -> None:
    """Writes the pictures one after another as a looping WebP, atomically. The last one stays longer.

    Args:
        frames: the pictures. Nothing is written for fewer than two.
        path: the file to write.
        milliseconds: how long each picture is shown.
    """
    if len(frames) < 2:
        return
    images = [Image.open(frame).convert("RGB") for frame in frames]
    times = [milliseconds] * (len(images) - 1) + [8 * milliseconds]
    with atomic(path) as temporary:
        images[0].save(temporary, format="WEBP", save_all=True, append_images=images[1:], duration=times, loop=0, lossless=True)
