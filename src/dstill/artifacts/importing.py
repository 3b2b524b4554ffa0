"""Imports the distilled sets that scripts of the field publish. Nothing in their files is executed."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.config.settings import NetConfig
from dstill.data import preprocess as preprocessing
from dstill.data.preprocess import Preprocess, Standardise
from dstill.data.real import RealSet
from dstill.errors import DstillError

LARGEST_BYTES = 4 * 2**30

# The channel means and deviations with which the public code of the DC family and of trajectory matching normalises. Some are
# not those of the data: CIFAR-10's deviations are means over the deviations of single images.
PUBLISHED_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny-imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2861,), (0.3530,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    **dict.fromkeys(("nette", "woof", "meow", "squawk", "fruit", "yellow"), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
}


@dataclass(frozen=True)
class _Found:
    """The parts of a set that a file holds."""

    images: Tensor
    labels: Tensor
    alpha: float | None


def import_set(
    path: str | Path,
    real: RealSet,
    *,
    preprocess: Preprocess | str = "published",
    method: str = "imported",
    net: str = "convnet",
    augmentation: str = "colour_crop_cutout_flip_scale_rotate",
    alpha: float | None = None,
    parts: int = 1,
) -> DistilledSet:
    """A distilled set from the files of another program, ready for `evaluate`.

    Args:
        path: one of: a folder or file that `export` wrote (`hf`, `png` or `npz`); a `.pt` file of images such as
            `images_best.pt`, with `labels_best.pt` and perhaps `lr_best.pt` beside it; a `.pt` file of DC, DSA or DM
            (`res_*.pt`), from which the last repetition is taken.
        real: the data that the set was distilled from. It gives the class names.
        preprocess: the preprocessing of the images: a kind for `published_preprocess`, or a fitted preprocessing. A set that
            dstill exported brings its own.
        method: name of the method, for tables.
        net: the network that the set was distilled with.
        augmentation: DSA strategy to train with.
        alpha: the learning rate to train with; if left out, that in the file, if any.
        parts: images in each stored image along a side, see `dstill.data.formation`. Labels are those of stored images or of
            their parts.

    Returns:
        The set. Floating-point labels are label logits, unless they lie in [0, 1] and each row adds up to one: then they are
        probabilities.

    Raises:
        DstillError: the file does not exist, is damaged, is too large, holds more than tensors, or does not fit `real`.

    Example:
        >>> import tempfile
        >>> from dstill.data.real import Split
        >>> split = Split(torch.arange(128, dtype=torch.uint8).view(2, 1, 8, 8), torch.tensor([0, 1]))
        >>> real = RealSet("pets", split, split, ("cat", "dog"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(torch.zeros(2, 1, 8, 8), f"{folder}/images_best.pt")
        ...     torch.save(torch.tensor([0, 1]), f"{folder}/labels_best.pt")
        ...     import_set(f"{folder}/images_best.pt", real, preprocess="standardise")
        DistilledSet('imported' of 'pets', 2 images of 1x8x8, 2 classes)
    """
    source = Path(path)
    ours = _own(source)
    if ours is not None:
        ours.check_fits(real)
        return ours
    if source.is_dir():
        source = source / "images_best.pt"
    found = _read(source)
    images = _tensor(found.images, "images", source).float()
    expected = (real.channels, *real.size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise DstillError(f"{source} holds images {tuple(images.shape)}, {real.name} has images {expected}: is it another set?")
    labels = _labels(found.labels, (len(images), len(images) * parts**2), real.classes, source)
    soft = labels.is_floating_point()  # images with soft labels cannot be counted by class
    each = max(1, len(labels) // max(1, len(images)))  # labels of a stored image
    ipc = len(images) // real.classes if soft else int(torch.bincount(labels, minlength=real.classes).max()) // each
    return DistilledSet(
        images=images,
        labels=labels,
        alpha=alpha if alpha is not None else found.alpha,
        preprocess=published_preprocess(preprocess, real) if isinstance(preprocess, str) else preprocess,
        method=method,
        ipc=max(1, ipc),
        class_names=real.class_names,
        augmentation=augmentation,
        net=NetConfig(name=net),
        data=real.name,
        data_fingerprint=real.fingerprint,
        recipe=None,
        seed=0,
        parts=parts,
    )


def published_preprocess(kind: str, real: RealSet) -> Preprocess:
    """The preprocessing of a set that another program distilled.

    Args:
        kind: `published`: with the constants that the field's scripts have for this data set. `standardise` or
            `zca`: fitted on `real`, as kornia's ZCA is in trajectory matching.
        real: the real data.

    Raises:
        DstillError: the scripts have no constants for these data, or the kind is unknown.
    """
    if kind != "published":
        return preprocessing.fit(kind, real.train.images)
    if real.known not in PUBLISHED_STATISTICS:
        known = ", ".join(PUBLISHED_STATISTICS)
        raise DstillError(
            f"no published statistics are known for {real.name!r}, only for {known}: pass standardise or zca. If the files are "
            "a part of one of these, put its name before the path, such as cifar10@PATH"
        )
    return Standardise(*(torch.tensor(values) for values in PUBLISHED_STATISTICS[real.known]))


def _read(path: Path) -> _Found:
    content = trusted(path)
    if isinstance(content, dict):
        return _from_dc(content, path)
    if not isinstance(content, Tensor):
        raise DstillError(f"{path} holds {type(content).__name__}, neither images nor a result of DC, DSA or DM")
    beside = {kind: path.with_name(path.name.replace("images", kind)) for kind in ("labels", "lr")}
    if beside["labels"] == path or not beside["labels"].exists():
        raise DstillError(f"there are no labels beside {path}: put {path.name.replace('images', 'labels')} there")
    alpha = float(_tensor(trusted(beside["lr"]), "learning rate", beside["lr"])) if beside["lr"].exists() else None
    return _Found(content.detach(), _tensor(trusted(beside["labels"]), "labels", beside["labels"]), alpha)


def _tensor(value: Any, what: str, path: Path) -> Tensor:
    """A tensor, from a tensor or from numbers."""
    try:
        found = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DstillError(f"{path} holds no {what} but {type(value).__name__}") from error
    if found.is_complex() or (what == "learning rate" and found.numel() != 1):
        raise DstillError(f"{path} holds no {what} but {found.dtype} {tuple(found.shape)}")
    return found


def _from_dc(content: dict[str, Any], path: Path) -> _Found:
    try:
        images, labels = content["data"][-1][:2]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DstillError(f"{path} holds no `data` of images and labels, as results of DC, DSA and DM do") from error
    return _Found(_tensor(images, "images", path), _tensor(labels, "labels", path), None)


def _labels(labels: Tensor, counts: tuple[int, int], classes: int, path: Path) -> Tensor:
    """Class ids `[S]` or label logits `[S, K]`, from class ids, probabilities or logits; S is one of `counts`."""
    if labels.ndim not in (1, 2) or len(labels) not in counts or (labels.ndim == 2 and labels.shape[1] != classes):
        raise DstillError(f"{path}: {counts[0]} images have labels {tuple(labels.shape)} for {classes} classes")
    if labels.ndim == 1:
        ids = labels.long()
        if not bool(((ids >= 0) & (ids < classes)).all()):
            raise DstillError(f"{path}: class ids from {int(ids.min())} to {int(ids.max())} for {classes} classes")
        return ids
    rows = labels.float()
    if bool((rows >= 0).all()) and torch.allclose(rows.sum(1), torch.ones(len(rows)), atol=1e-3):
        return rows.clamp_min(1e-12).log()
    return rows


def _from_npz(path: Path) -> DistilledSet:
    if not path.is_file():
        raise DstillError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_size(path, sum(member.file_size for member in archive.infolist()))
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "header"}
            header = dict(json.loads(str(arrays["header"])))
    except DstillError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many unrelated types for damaged files
        raise DstillError(f"{path} is damaged or not an export of dstill ({error})") from error
    return DistilledSet.from_contents(header, tensors, path)


def _check_size(path: Path, count: int) -> None:
    if count > LARGEST_BYTES:
        raise DstillError(f"{path} holds {count / 2**30:.1f} GiB, more than a distilled set or a buffer has")


def trusted(path: Path) -> Any:
    """The content of a `.pt` file: tensors and plain containers. No code in it is run.

    Raises:
        DstillError: the file does not exist, is too large, is damaged, or holds anything else.
    """
    if not path.is_file():
        raise DstillError(f"{path} does not exist")
    _check_size(path, path.stat().st_size)
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


def _own(source: Path) -> DistilledSet | None:
    """The set in a file or folder that dstill wrote; None if dstill did not write it."""
    if source.is_dir():
        kept = [source / name for name in (FILE_NAME, "distilled.npz") if (source / name).exists()]
        source = kept[0] if kept else source
    match source.suffix:
        case ".safetensors":
            return DistilledSet.load(source)
        case ".npz":
            return _from_npz(source)
    return None
