"""Imports the distilled sets that scripts of the field publish. Nothing in their files is executed."""

from __future__ import annotations

import contextlib
import json
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstill.artifacts import foreign, set_file, whitening
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.foreign import LARGEST_BYTES, Found
from dstill.artifacts.looks import look_of
from dstill.config import recipes, yamls
from dstill.config.settings import NetConfig
from dstill.data import preprocess as preprocessing
from dstill.data import siamese
from dstill.data.preprocess import Preprocess, Standardise
from dstill.data.real import RealSet
from dstill.errors import DstillError, DstillWarning
from dstill.support.cache import cache_folder

Changes = Sequence[str] | Mapping[str, Any]

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


def import_set(
    path: str | Path,
    real: RealSet,
    *,
    preprocess: Preprocess | str = "published",
    method: str = "imported",
    net: str | NetConfig = "convnet",
    augmentation: str = "colour_crop_cutout_flip_scale_rotate",
    alpha: float | None = None,
    parts: int = 1,
) -> DistilledSet:
    """A distilled set from the files of another program; see `dstill.import_set`, which also checks the network."""
    siamese.parse(augmentation)
    config = network_of(net, real) if isinstance(net, str) else net
    source = Path(path)
    ours = _own(source)
    if ours is not None:
        ours.check_fits(real)
        return whitening.completed(ours, real, cache_folder())
    found = foreign.read(source, real)
    images = foreign.tensor(found.images, "images", source)
    expected = (real.channels, *real.size)
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise DstillError(f"{source} holds images {tuple(images.shape)}, {real.name} has images {expected}: is it another set?")
    labels = _labels(found.labels, (len(images), len(images) * parts**2), real.classes, source)
    ipc = _ipc(labels, len(images), real, source)
    fitted, images = _preprocessed(images, found, preprocess, real, source, plain=parts == 1)
    return DistilledSet(
        images=images,
        labels=labels,
        alpha=alpha if alpha is not None else found.alpha,
        preprocess=fitted,
        method=method,
        ipc=ipc,
        class_names=real.class_names,
        augmentation=augmentation,
        net=config,
        data=real.name,
        data_fingerprint=real.fingerprint,
        recipe=None,
        seed=0,
        parts=parts,
    )


def network_of(net: str, real: RealSet, changes: Changes = ()) -> NetConfig:
    """The network of a foreign set by name. The depth of a ConvNet follows from the size of the images, as in our recipes.

    Args:
        net: its name.
        real: the data.
        changes: assignments `net.<option>=value`.

    Raises:
        DstillError: a change is not one of the network, or an option is unknown.

    Example:
        >>> from dstill.data.real import Split
        >>> split = Split(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> network_of("convnet", RealSet("pets", split, split, ("cat", "dog")), ["net.width=64"])
        NetConfig(name='convnet', width=64, depth=4, norm=None)
    """
    values: dict[str, Any] = {"net": {"name": net}}
    if net == "convnet":
        values["net"]["depth"] = recipes.usual_depth(min(real.size))
    recipes.assign(values, recipes.assignments(changes))
    other = next((key for key in values if key != "net"), None)
    if other is not None:
        raise DstillError(f"an imported set has no setting {other!r}: only those of its network can be set, as net.depth=4")
    return yamls.validate(NetConfig, values["net"], "--set net")


def _preprocessed(
    images: Tensor, found: Found, told: Preprocess | str, real: RealSet, source: Path, *, plain: bool
) -> tuple[Preprocess, Tensor]:
    """The preprocessing, and the images after it. Warns if the images look as if another one had been applied."""
    if told == "published" and found.preprocessing is not None:
        return _beside(found.preprocessing, images, source), images.float()
    kind = told if isinstance(told, str) else told.kind
    pixels = found.pictures or kind == "pixels" or images.dtype == torch.uint8
    if plain:
        _check_look(images.float(), "pixels" if pixels else kind, real)
    if isinstance(told, Preprocess):
        fitted = told
    elif pixels and (kind == "pixels" or (kind == "published" and real.known not in PUBLISHED_STATISTICS)):
        fitted = preprocessing.fit("standardise", real.train.images)
    else:
        fitted = published_preprocess(kind, real)
    return fitted, fitted.forward(_unit(images)) if pixels else images.float()


def _unit(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], from those or from bytes, which some programs store as floats."""
    floats = pixels.float()
    as_bytes = pixels.dtype == torch.uint8 or (float(floats.min()) >= 0 and float(floats.max()) > 2)
    return floats / 255 if as_bytes else floats


def _beside(tensors: dict[str, Tensor], images: Tensor, source: Path) -> Preprocess:
    """The preprocessing that dstill wrote beside the images."""
    fitted = preprocessing.from_tensors("zca" if "basis" in tensors else "standardise", tensors)
    with contextlib.suppress(RuntimeError, TypeError):
        back = fitted.invert(images[:1].float())
        if back.shape == images[:1].shape and bool(torch.isfinite(back).all()):
            return fitted
    raise DstillError(f"the preprocess.pt beside {source} does not fit the images: remove it, and pass --preprocess")


def _check_look(images: Tensor, kind: str, real: RealSet) -> None:
    look = look_of(images, real)
    applied = kind if kind in ("zca", "pixels") else "standardise"
    slightly_outside = kind == "pixels" and float(images.min()) > -1  # distilled pixels may leave [0, 1] a little
    if look.kind in ("", applied) or slightly_outside:
        return
    names = {"pixels": "pixels without any preprocessing", "zca": "whitened", "standardise": "standardised, not whitened"}
    remedy = {"pixels": "pixels", "zca": "zca", "standardise": "published or standardise"}[look.kind]
    warnings.warn(
        f"the images do not look as preprocess {kind} says, but {names[look.kind]}: {look.why}. If they are, pass --preprocess "
        f"{remedy}; with a wrong one, accuracies are too low",
        DstillWarning,
        stacklevel=2,
    )


def _ipc(labels: Tensor, images: int, real: RealSet, source: Path) -> int:
    """Images per class. A set without images of a class is refused or, if its labels are soft, named."""
    soft, each = labels.is_floating_point(), max(1, len(labels) // max(1, images))  # labels of a stored image
    counts = torch.bincount(labels.argmax(1) if soft else labels, minlength=real.classes) // each
    has = [name for name, count in zip(real.class_names, counts.tolist(), strict=True) if count]
    without = [name for name in real.class_names if name not in has]
    named = ", ".join(without[:10]) + (" …" if len(without) > 10 else "")
    if without and not soft:
        raise DstillError(
            f"{source} has images of {len(has)} of {real.classes} classes and none of {named}: if it is one of several parts "
            f"of a set, join them; if the set is for these classes only, pass --classes {','.join(has)}"
        )
    if without:
        said = f"no soft label of {source} favours {len(without)} of {real.classes} classes ({named})"
        warnings.warn(f"{said}: is it a part of a set?", DstillWarning, stacklevel=2)
    most, least = int(counts.max()), int(counts.min())
    if least < most and not soft:
        few = real.class_names[int(counts.argmin())]
        warnings.warn(f"{source} has from {least} ({few}) to {most} images of a class", DstillWarning, stacklevel=2)
    return max(1, images // real.classes if soft else most)


def published_preprocess(kind: str, real: RealSet) -> Preprocess:
    """The preprocessing of a set that another program distilled.

    Args:
        kind: `published`: with the constants that the field's scripts have for this data set. `standardise` or
            `zca`: fitted on `real`, as kornia's ZCA is in trajectory matching; a whitening is kept in the cache.
        real: the real data.

    Raises:
        DstillError: the scripts have no constants for these data, or the kind is unknown.
    """
    if kind != "published":
        return whitening.fitted(kind, real, cache_folder())
    if real.known not in PUBLISHED_STATISTICS:
        known = ", ".join(PUBLISHED_STATISTICS)
        raise DstillError(
            f"no published statistics are known for {real.name!r}, only for {known}: pass standardise or zca. If the files are "
            "a part of one of these, put its name before the path, such as cifar10@PATH"
        )
    return Standardise(*(torch.tensor(values) for values in PUBLISHED_STATISTICS[real.known]))


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
            foreign.check_size(path, sum(member.file_size for member in archive.infolist()), LARGEST_BYTES)
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "header"}
            header = dict(json.loads(str(arrays["header"])))
    except DstillError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many unrelated types for damaged files
        raise DstillError(f"{path} is damaged or not an export of dstill ({error})") from error
    return set_file.from_contents(header, tensors, path)


def _own(source: Path) -> DistilledSet | None:
    """The set in a file or folder that dstill wrote; None if dstill did not write it."""
    if source.is_dir():
        kept = [file for file in (set_file.located(source), source / "distilled.npz") if file.exists()]
        source = kept[0] if kept else source
    match source.suffix:
        case ".safetensors":
            return set_file.read(source)
        case ".npz":
            return _from_npz(source)
    return None
