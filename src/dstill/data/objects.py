"""Data that a program holds: arrays, lists of images, map-style data sets of PyTorch, and data sets of Hugging Face."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dstill.data import columns
from dstill.data.arrays import is_archive, pairs_of, pixels, tensor
from dstill.data.catalog import Entry
from dstill.data.labels import read_labels
from dstill.data.pictures import Pictures, resize
from dstill.data.splits import Part, Parts, Reading, keyed
from dstill.data.walking import is_image
from dstill.errors import DstillError

NAME = "in-memory"
_IMAGE_KEYS = ("image", "img", "images", "pixel_values", "x")
_HELP = (
    "pass (images, labels), {'train': (images, labels), 'test': (images, labels)}, a list of (image, label), a map-style data "
    "set of PyTorch, or a data set of Hugging Face"
)


def parts_of(source: Any, how: Reading) -> Parts:
    """The splits of data in memory.

    Args:
        source: a pair `(images, labels)`; two such pairs or two data sets, for training and test; a mapping of names of
            splits to any of these; arrays by names such as `x_train`; a list of `(image, label)`; a map-style
            `torch.utils.data.Dataset`; a `datasets.Dataset` or `DatasetDict`.
        how: columns and class names that the user gives.

    Raises:
        DstillError: the source is none of them.
    """
    if isinstance(source, tuple) and len(source) == 2 and all(map(_is_whole, source)):
        source = {"train": source[0], "test": source[1]}
    if not isinstance(source, Mapping):
        source = {"train": source}
    named = keyed({str(key): value for key, value in source.items()})
    if "train" not in named and is_archive(named):
        return archive(source, NAME, how)
    if "train" not in named:
        raise DstillError(f"in-memory data needs a 'train' split, got {', '.join(named) or 'no split'}")
    return {key: functools.partial(_part, value, key, how) for key, value in named.items()}


def archive(arrays: Mapping[str, Any], name: str, how: Reading) -> Parts:
    """The splits of named arrays, such as those of an .npz file; an array is read when its split is.

    Args:
        arrays: arrays by names such as `train_images` or `x_train`.
        name: what holds them, for errors.
        how: class names that the user gives.
    """
    pairs = pairs_of(list(arrays), name)

    def read(split: str) -> Part:
        images, labels = pairs[split]
        try:
            where = f"{name} ({split})"
            return _without_columns(_pair(arrays[images], arrays[labels], where, how), where, how)
        except DstillError:
            raise
        except Exception as error:  # numpy raises many types for damaged or pickled members
            raise DstillError(f"{name}: the arrays {images} and {labels} cannot be read ({error})") from error

    return {split: functools.partial(read, split) for split in pairs}


def _part(source: Any, split: str, how: Reading) -> Part:
    """A split in memory, whatever it is."""
    where = f"{NAME} ({split})"
    hugging_face = sys.modules.get("datasets")
    if hugging_face is not None and isinstance(source, hugging_face.Dataset):
        return columns.part_of(NAME, source, Entry(""), how)
    if isinstance(source, torch.utils.data.DataLoader):
        raise DstillError(f"{where} is a DataLoader, which gives batches: pass its data set, loader.dataset")
    if type(source).__module__.partition(".")[0] == "pandas":
        raise DstillError(f"{where} is a table of pandas: pass datasets.Dataset.from_pandas(frame)")
    if isinstance(source, torch.utils.data.TensorDataset) and len(source.tensors) == 2:
        source = source.tensors
    if isinstance(source, (tuple, list)) and len(source) == 2 and not _are_items(source):
        return _without_columns(_pair(source[0], source[1], where, how), where, how)
    if _is_dataset(source) or (isinstance(source, (tuple, list)) and _are_items(source)):
        return _items((source[i] for i in range(len(source))), where, how, _classes_of(source))
    if isinstance(source, (tuple, list)) and source and all(isinstance(image, Image.Image) for image in source):
        raise DstillError(f"{where} is a list of images without labels: pass (images, labels)")
    raise DstillError(
        f"in-memory data are pairs (images, labels), got {type(source).__name__} for the split {split!r}: {_HELP}"
    )


def _is_whole(value: Any) -> bool:
    """Whether this is a split by itself: a pair of images and as many labels, a list of items, or a data set."""
    if isinstance(value, (tuple, list)):
        return _are_items(value) or (len(value) == 2 and _length(value[0]) == _length(value[1]) > 0)
    return _is_dataset(value)


def _is_dataset(value: Any) -> bool:
    plain = isinstance(value, (str, bytes, list, tuple, Mapping, np.ndarray, Tensor, Image.Image))
    return not plain and hasattr(value, "__getitem__") and hasattr(value, "__len__")


def _length(value: Any) -> int:
    if isinstance(value, Tensor | np.ndarray):
        return len(value) if value.ndim else 0
    return len(value) if isinstance(value, (list, tuple)) else 0


def _are_items(source: Sequence[Any]) -> bool:
    """Whether these are items of a data set, each of an image and its label, and not images beside labels."""
    return len(source) > 0 and all(isinstance(item, (tuple, list)) and len(item) == 2 and _is_image(item[0]) for item in source)


def _is_image(value: Any) -> bool:
    if isinstance(value, str | Path):
        return is_image(Path(value))  # a word may be a label
    return isinstance(value, Image.Image | bytes) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 1)


def _without_columns(part: Part, where: str, how: Reading) -> Part:
    """The part, unless the user names columns, which it does not have."""
    if how.asks_for_columns:
        raise _no_columns(where)
    return part


def _no_columns(where: str) -> DstillError:
    return DstillError(f"{where} has images and labels but no columns: leave out image_column and label_column")


def _pair(images: Any, labels: Any, where: str, how: Reading, names: Sequence[str] = ()) -> Part:
    """Images beside labels."""
    if isinstance(labels, str) or not hasattr(labels, "__len__") or getattr(labels, "ndim", 1) == 0:
        raise DstillError(f"{where}: labels must be one whole number for each image, got {type(labels).__name__}: {_HELP}")
    read = read_labels(labels, where, names=names, class_names=how.class_names)
    if not isinstance(images, list | tuple) or not images or not _is_image(images[0]):
        found: Tensor | Pictures = pixels(images, len(read))
    elif isinstance(images[0], Tensor | np.ndarray):
        found = _joined([_small(image, how) for image in images])
    else:
        found = Pictures(NAME, images)
    if len(read) != len(found):
        raise DstillError(
            f"{where}: labels must be one whole number for each image: got {len(read):,} labels for {len(found):,} images"
        )
    return Part(found, read)


def _items(items: Iterable[Any], where: str, how: Reading, names: Sequence[str]) -> Part:
    """The items of a map-style data set: `(image, label)`, or mappings with an image and a label."""
    images: list[Any] = []
    labels: list[Any] = []
    for item in items:
        image, label = _image_and_label(item, where, how)
        # Reduced to bytes at once, so that floats do not pile up.
        images.append(_small(image, how) if isinstance(image, Tensor | np.ndarray) else image)
        labels.append(label)
    if not images:
        raise DstillError(f"{where} has no images")
    if not isinstance(images[0], Tensor):
        return _pair(images, labels, where, how, names)
    return Part(_joined(images), read_labels(labels, where, names=names, class_names=how.class_names))


def _image_and_label(item: Any, where: str, how: Reading) -> tuple[Any, Any]:
    if isinstance(item, Mapping):
        keys = list(map(str, item))
        image = _key(keys, how.image_column, _IMAGE_KEYS, where, "--image-column", "images")
        return item[image], item[_key(keys, how.label_column, columns.LABEL_NAMES, where, "--label-column", "classes")]
    if how.asks_for_columns:
        raise _no_columns(where)
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        held = f"{len(item)} values" if isinstance(item, (tuple, list)) else f"{type(item).__name__} alone"
        raise DstillError(f"{where} gives {held} for each image: make its items (image, label)")
    return item[0], item[1]


def _key(keys: list[str], asked: str | None, usual: Sequence[str], where: str, option: str, what: str) -> str:
    found = [key for key in keys if key == asked] if asked else [key for key in keys if key.lower() in usual]
    if not found:
        argument = option.removeprefix("--").replace("-", "_")
        raise DstillError(f"the items of {where} have the keys {', '.join(keys)}: pass the one of the {what} as {argument}")
    return columns.choose(where, found, option, what)


def _small(image: Any, how: Reading) -> Tensor:
    """An image that is an array of its own as bytes `[1, C, H, W]`, at the size asked for."""
    found = pixels(tensor(image, "images").unsqueeze(0))
    return found if how.image_size is None else resize(found, how.image_size, how.fit or "resize")


def _joined(images: Sequence[Tensor]) -> Tensor:
    first = images[0].shape
    other = next((image.shape for image in images if image.shape != first), None)
    if other is not None:
        raise DstillError(
            f"in-memory images differ in shape ({tuple(first[1:])} and {tuple(other[1:])} as channels, height, width): pass "
            "image_size and fit, and images with one number of channels"
        )
    return torch.cat(list(images))


def _classes_of(source: Any) -> tuple[str, ...]:
    """Names of the classes of a data set, as torchvision gives them; also of the one inside a `Subset` or `ConcatDataset`."""
    names = getattr(source, "classes", None)
    if isinstance(names, list | tuple) and all(isinstance(name, str) for name in names):
        return tuple(names)
    inner = getattr(source, "dataset", None) or next(iter(getattr(source, "datasets", ())), None)
    return () if inner is None else _classes_of(inner)
