"""Distilled sets that the field's scripts publish. Nothing in their files is ever executed."""

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

# Channel means and deviations that the public code of the DC family and of trajectory matching normalises with. Some are not
# the data's true ones: CIFAR-10's deviations are means of single images' deviations.
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
    """What a file says of a set."""

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
) -> DistilledSet:
    """A distilled set from files of other programs, ready for `evaluate`.

    Args:
        path: a folder or file of ours (`export`: hf, png, npz); a `.pt` file of images (`images_best.pt`), beside which
            `labels_best.pt` and `lr_best.pt` are looked for; or a `.pt` file of DC, DSA or DM (`res_*.pt`), of which the last
            repetition is taken.
        real: the data that it was distilled from: for the names of the classes, and for evaluation.
        preprocess: what the images of other programs went through: a kind of `published_preprocess`, or a fitted one. Our
            own files bring theirs.
        method: name of the method, for tables.
        net: network that it was distilled with.
        augmentation: DSA strategy to train with.
        alpha: learning rate, where no file tells it.

    Returns:
        The set. Labels in `[0, 1]` whose rows add up to one are taken as probabilities, other floats as logits.

    Raises:
        DstillError: no such file, not such a file, too large, holding more than tensors, or not fitting `real`.
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
    labels = _labels(found.labels, len(images), real.classes, source)
    soft = labels.is_floating_point()  # then an image belongs to no class
    ipc = len(images) // real.classes if soft else int(torch.bincount(labels, minlength=real.classes).max())
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
    )


def published_preprocess(kind: str, real: RealSet) -> Preprocess:
    """The preprocessing that a foreign set went through.

    Args:
        kind: `published`: the constants of the field's scripts for data of this name; `standardise` or `zca`: fitted on
            `real`, as `kornia`'s ZCA of trajectory matching is.
        real: the real data.

    Raises:
        DstillError: the scripts have no constants for these data.
    """
    if kind != "published":
        return preprocessing.fit(kind, real.train.images)
    if real.name not in PUBLISHED_STATISTICS:
        known = ", ".join(PUBLISHED_STATISTICS)
        raise DstillError(
            f"no published statistics are known for {real.name!r} (there are for {known}): pass standardise or zca"
        )
    return Standardise(*(torch.tensor(values) for values in PUBLISHED_STATISTICS[real.name]))


def _read(path: Path) -> _Found:
    content = trusted(path)
    if isinstance(content, dict):
        return _from_dc(content, path)
    if not isinstance(content, Tensor):
        raise DstillError(f"{path} holds {type(content).__name__}, neither images nor a result of DC, DSA or DM")
    beside = {kind: path.with_name(path.name.replace("images", kind)) for kind in ("labels", "lr")}
    if beside["labels"] == path or not beside["labels"].exists():
        raise DstillError(f"there are no labels beside {path}: a file named {path.name.replace('images', 'labels')} is wanted")
    alpha = float(_tensor(trusted(beside["lr"]), "learning rate", beside["lr"])) if beside["lr"].exists() else None
    return _Found(content.detach(), _tensor(trusted(beside["labels"]), "labels", beside["labels"]), alpha)


def _tensor(value: Any, what: str, path: Path) -> Tensor:
    """A tensor, or numbers as one."""
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


def _labels(labels: Tensor, images: int, classes: int, path: Path) -> Tensor:
    """Class ids, or logits."""
    if labels.ndim not in (1, 2) or len(labels) != images or (labels.ndim == 2 and labels.shape[1] != classes):
        raise DstillError(f"{path}: {images} images have labels {tuple(labels.shape)} for {classes} classes")
    if labels.ndim == 1:
        ids = labels.long()
        if not bool(((ids >= 0) & (ids < classes)).all()):
            raise DstillError(f"{path}: class ids from {int(ids.min())} to {int(ids.max())} for {classes} classes")
        return ids
    rows = labels.float()
    if bool((rows >= 0).all()) and torch.allclose(rows.sum(1), torch.ones(images), atol=1e-3):
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
    except Exception as error:  # zipfile, zlib and numpy raise many unrelated types at damaged files
        raise DstillError(f"{path} is damaged or not an export of dstill ({error})") from error
    return DistilledSet.from_parts(header, tensors, path)


def _check_size(path: Path, count: int) -> None:
    if count > LARGEST_BYTES:
        raise DstillError(f"{path} holds {count / 2**30:.1f} GiB, more than a distilled set or a buffer has")


def trusted(path: Path) -> Any:
    """The content of a `.pt` file: tensors and plain containers, nothing that runs."""
    if not path.is_file():
        raise DstillError(f"{path} does not exist")
    _check_size(path, path.stat().st_size)
    # Accuracies beside the images are NumPy numbers: harmless, and named one by one.
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    harmless = [scalar, np.dtype, np.float64, type(np.dtype(np.float64))]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is wrong with the file
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise DstillError(
            f"{path} cannot be read as tensors ({reason}): it is damaged, or holds code, which is refused"
        ) from error


def _own(source: Path) -> DistilledSet | None:
    """A set in a file or folder that dstill wrote; None where it did not."""
    if source.is_dir():
        kept = [source / name for name in (FILE_NAME, "distilled.npz") if (source / name).exists()]
        source = kept[0] if kept else source
    match source.suffix:
        case ".safetensors":
            return DistilledSet.load(source)
        case ".npz":
            return _from_npz(source)
    return None
