"""Reads images: from disk or from the Hugging Face hub by `datasets`, or from tensors in memory."""

from __future__ import annotations

import glob
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from dstill.data.catalog import DATASETS, Entry
from dstill.data.local import TEST_NAMES, VALIDATION_NAMES, splits_of
from dstill.data.quiet import load_dataset
from dstill.errors import DstillError, suggest

_GREY = ("1", "L", "LA", "I;16", "I;16B", "I;16L")
_IMAGENET_CLASSES = 1000
_FITS = ("pad", "resize", "crop", "error")


@dataclass(frozen=True)
class RawSplit:
    """A decoded split: images uint8 `[N, C, H, W]`, class ids int64 `[N]`, and class names; () if they are not known."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Raw:
    """Decoded splits, before their classes are aligned.

    Attributes:
        name: name of the data set.
        train: the training split.
        test: the test split; None if the source has none.
        found: names of all splits in the source.
    """

    name: str
    train: RawSplit
    test: RawSplit | None
    found: tuple[str, ...]


def read(source: Any, *, image_size: int | None, fit: str | None) -> Raw:
    """Decodes a source.

    Args:
        source: see `dstill.load_real`.
        image_size: side in pixels to bring images to; None for the usual size of the data set.
        fit: how to bring them to it; None for the usual way.

    Raises:
        DstillError: the source is unknown, cannot be read or fetched, or holds something else than labelled images.
    """
    if fit is not None and fit not in _FITS:
        raise DstillError(f"unknown fit {fit!r}; {suggest(fit, _FITS)}")
    if isinstance(source, tuple):
        source = {"train": source}
    if isinstance(source, Mapping):
        return _resized(_from_arrays(source), image_size, fit)
    name = str(source)
    if name == "digits":
        return _resized(_digits(), image_size, fit)
    subset, _, root = name.partition("@")
    entry = DATASETS.get(subset)
    if entry is not None and (root or not Path(name).exists()):
        usual = "resize" if image_size and entry.fit == "error" else entry.fit
        entry = replace(entry, size=image_size or entry.size, fit=fit or usual)
        return _from_path(subset, root, entry) if root else _from_hub(subset, entry)
    path = Path(name).expanduser()
    entry = Entry(name, size=image_size, fit=fit or ("resize" if image_size else "error"))
    if path.exists() or glob.glob(str(path)):
        stem = path.name if path.is_dir() else path.stem
        label = stem.replace("-train", "").replace("*", "").strip("-_") or path.resolve().name
        return _from_path(label, name, entry)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name, entry)
    raise DstillError(f"{name!r} is neither a file, a folder nor a known data set; {suggest(name, DATASETS)}")


def _from_arrays(splits: Mapping[str, Any]) -> Raw:
    parts: dict[str, RawSplit] = {}
    for key, pair in splits.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise DstillError(f"in-memory data are pairs (images, labels), got {type(pair).__name__} for the split {key!r}")
        images, labels = pair
        pixels, ids = (_tensor(part, what) for part, what in ((images, "images"), (labels, "labels")))
        if pixels.ndim != 4 or pixels.shape[1] > 4:
            raise DstillError(f"in-memory images must have the shape [N, C, H, W] with C up to 4, got {tuple(pixels.shape)}")
        if pixels.dtype != torch.uint8:
            if not pixels.is_floating_point() or not bool(((pixels >= 0) & (pixels <= 1)).all()):
                raise DstillError("in-memory images must be uint8, or floats in [0, 1]")
            pixels = (pixels * 255).round().to(torch.uint8)
        if ids.shape != (len(pixels),) or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
            raise DstillError(
                f"in-memory labels must be one whole number for each image: got {ids.dtype} {tuple(ids.shape)} "
                f"for {len(pixels)} images"
            )
        parts[key] = RawSplit(pixels, ids.to(torch.int64), ())
    if "train" not in parts:
        raise DstillError(f"in-memory data needs a 'train' split, got {', '.join(parts) or 'no split'}")
    test = next((parts[key] for key in TEST_NAMES if key in parts), None)
    return Raw("in-memory", parts["train"], test, tuple(parts))


def _tensor(values: Any, what: str) -> torch.Tensor:
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DstillError(f"in-memory {what} must be numbers in a tensor or an array ({error})") from error


def _digits() -> Raw:
    """scikit-learn's digits, with values 0 .. 16 stored as 0 .. 240 and a stratified 80/20 split with a fixed seed."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy((data.images * 15).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(data.target.astype(np.int64))
    fitting, testing = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=data.target, random_state=0)
    names = tuple(str(c) for c in data.target_names)
    train, test = (RawSplit(images[rows], labels[rows], names) for rows in (fitting, testing))
    return Raw("digits", train, test, ("train", "test"))


def _from_hub(name: str, entry: Entry) -> Raw:
    try:
        splits = load_dataset(entry.hub, entry.config)
    except Exception as error:  # the hub client raises many unrelated types, even for "no network" and "not found"
        raise DstillError(
            f"{name!r} could not be fetched from the Hugging Face hub ({type(error).__name__}). Without a network, "
            "pass a folder of images or Parquet files instead of the name"
        ) from error
    return _decode_splits(name, splits, entry)


def _from_path(name: str, path: str, entry: Entry) -> Raw:
    try:
        return _decode_splits(name, splits_of(path), entry)
    except (DstillError, MemoryError):
        raise
    except Exception as error:  # pyarrow and datasets raise many unrelated types for damaged files
        cause = error.__cause__ or error  # `datasets` wraps the reason in "an error occurred"
        reason = str(cause).splitlines()[0] if str(cause) else type(cause).__name__
        raise DstillError(f"{path} could not be read as Parquet files or an image folder: {reason}") from error


def _decode_splits(name: str, splits: Any, entry: Entry) -> Raw:
    found = tuple(splits)
    if "train" not in splits:
        raise DstillError(f"{name} has no train split (found: {', '.join(found)})")
    # One split is taken for the test, never both test and validation: the one that the catalogue names, else the test split.
    order = (*VALIDATION_NAMES, "test") if entry.test in VALIDATION_NAMES else TEST_NAMES
    wanted = [key for key in (entry.test, *order) if key in splits and key != "train"]
    parts = [_Decoder(name, splits[key], entry) for key in ("train", *wanted[:1])]
    mode = "RGB" if any(part.mode() == "RGB" for part in parts) else "L"
    decoded = [part.decode(mode) for part in parts]
    return Raw(name, decoded[0], decoded[1] if len(decoded) > 1 else None, found)


class _Decoder:
    """One split of a `datasets.Dataset`. Images are decoded one by one, so that an error can name the file.

    Args:
        name: name of the data set, for errors.
        split: the split.
        entry: label column, classes and size of the data set.

    Raises:
        DstillError: the split has no image column or no class column, or lacks the classes of ImageNet.
    """

    def __init__(self, name: str, split: Any, entry: Entry) -> None:
        import datasets

        self.name, self.entry = name, entry
        columns = split.features
        image = [c for c, feature in columns.items() if isinstance(feature, datasets.Image)]
        label = [entry.label] if entry.label else [c for c, f in columns.items() if isinstance(f, datasets.ClassLabel)]
        label = label or [c for c in ("label", "labels", "fine_label") if c in columns]
        if not image or not label or label[0] not in columns:
            raise DstillError(f"{name} has the columns {', '.join(columns)}: an image column and a class column are needed")
        self.image, self.label = image[0], label[0]
        feature = columns[self.label]
        self.class_names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()
        split = split.select_columns([self.image, self.label]).cast_column(self.image, datasets.Image(decode=False))
        if entry.imagenet_ids:
            if len(self.class_names) not in (0, _IMAGENET_CLASSES):
                raise DstillError(
                    f"{name} is drawn from the {_IMAGENET_CLASSES} classes of ImageNet, but the data has "
                    f"{len(self.class_names)}: pass a complete copy of ILSVRC-1k, or only the path, without the subset's name"
                )
            wanted = set(entry.imagenet_ids)
            split = split.select([i for i, c in enumerate(split[self.label]) if c in wanted])
        self.split = split

    def _open(self, record: dict[str, Any] | None, *, header_only: bool = False) -> Image.Image:
        path, content = (record or {}).get("path"), (record or {}).get("bytes")
        try:
            if content is None:
                if path is None:
                    raise ValueError("the cell is empty")
                content = Path(path).read_bytes()
            image = Image.open(io.BytesIO(content))
            if image.mode in ("I", "F"):
                raise ValueError("the range of its 32-bit values is not known")
            return image if header_only else ImageOps.exif_transpose(image)  # cameras store how they were held
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            where = path or "in a row without a path"
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            raise DstillError(f"image {where} of {self.name} cannot be read ({reason}): repair or remove it") from error

    def mode(self) -> str:
        """The mode to decode to: "L" if every image is grey, else "RGB". Stops at the first image with colour."""
        grey = all(self._open(record, header_only=True).mode in _GREY for record in self.split[self.image])
        return "L" if grey else "RGB"

    def _labels(self) -> np.ndarray:
        values = self.split[self.label]
        try:
            return np.asarray(values, dtype=np.int64)
        except (TypeError, ValueError) as error:
            raise DstillError(
                f"the column {self.label} of {self.name} holds {self.split.features[self.label]}, not class ids: "
                "cast it with datasets' class_encode_column and save it again"
            ) from error

    def decode(self, mode: str) -> RawSplit:
        """Decodes all images to the mode "L" or "RGB", and brings them to the size of the entry."""
        labels = self._labels()
        names = self.class_names
        if self.entry.imagenet_ids:
            position = {c: i for i, c in enumerate(self.entry.imagenet_ids)}
            labels = np.asarray([position[c] for c in labels], dtype=np.int64)
            names = tuple(names[c] for c in self.entry.imagenet_ids) if names else ()
        pixels: np.ndarray | None = None
        for row, record in enumerate(self.split[self.image]):
            image = _fitted(_opaque(_eight_bit(self._open(record))).convert(mode), self.entry.size, self.entry.fit)
            array = np.asarray(image)
            if pixels is None:
                pixels = np.empty((len(labels), *array.shape), dtype=np.uint8)
            if array.shape != pixels.shape[1:]:
                raise DstillError(
                    f"images of {self.name} differ in size ({pixels.shape[2]}x{pixels.shape[1]} and {image.width}x"
                    f"{image.height}: {record.get('path')}): pass --image-size, and --fit pad, resize or crop"
                )
            pixels[row] = array
        if pixels is None:
            raise DstillError(f"{self.name} has an empty split")
        tensor = torch.from_numpy(pixels)
        tensor = tensor.unsqueeze(1) if tensor.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
        return RawSplit(tensor, torch.from_numpy(labels), names)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow's own conversion would clip every value above 255 to white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


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
    planes = [np.asarray(_fitted(Image.fromarray(plane), size, fit)) for plane in images.flatten(0, 1).numpy()]
    return torch.from_numpy(np.stack(planes)).view(*images.shape[:2], size, size)


def _resized(raw: Raw, size: int | None, fit: str | None) -> Raw:
    if size is None:
        return raw
    train = replace(raw.train, images=resize(raw.train.images, size, fit or "resize"))
    if raw.test is None:
        return replace(raw, train=train)
    return replace(raw, train=train, test=replace(raw.test, images=resize(raw.test.images, size, fit or "resize")))


def _fitted(image: Image.Image, size: int | None, fit: str) -> Image.Image:
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
