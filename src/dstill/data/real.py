"""Real data: a labelled image set, decoded once into uint8 tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dstill.data import sources
from dstill.errors import DstillError, suggest
from dstill.support import seeding

VALIDATION_FRACTION = 0.1


@dataclass(frozen=True)
class Split:
    """The images of one split and their classes.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: class ids, int64 `[N]`.

    Example:
        >>> split = Split(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0]))
        >>> len(split), [rows.tolist() for rows in split.by_class(2)]
        (3, [[0, 2], [1]])
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Split:
        """The images with these row numbers, in this order."""
        return Split(self.images[rows], self.labels[rows])

    def by_class(self, classes: int) -> list[Tensor]:
        """The row numbers of each of `classes` classes."""
        return [(self.labels == c).nonzero().squeeze(1) for c in range(classes)]


@dataclass(frozen=True)
class RealSet:
    """A labelled real image set.

    Attributes:
        name: name in logs and file headers.
        train: the images that experts and methods see.
        test: the images that the final accuracy is measured on, once.
        class_names: name of each class id.
        judged_on: `test`; `validation` after `holdout`.
        fingerprint: the first 16 hex digits of a SHA-256 of pixels, labels and class names; computed if left out.

    Example:
        >>> split = Split(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> real = RealSet("tiny", split, split, ("cat", "dog"))
        >>> real
        RealSet('tiny', 2 + 2 images of 3x8x8, 2 classes)
        >>> real.channels, real.size, real.classes
        (3, (8, 8), 2)
    """

    name: str
    train: Split
    test: Split
    class_names: tuple[str, ...]
    judged_on: str = "test"
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self))

    def __repr__(self) -> str:
        shape = "x".join(map(str, (self.channels, *self.size)))
        return f"RealSet({self.name!r}, {len(self.train)} + {len(self.test)} images of {shape}, {self.classes} classes)"

    @property
    def channels(self) -> int:
        """Colour channels of the images."""
        return self.train.images.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return self.train.images.shape[2], self.train.images.shape[3]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    def holdout(self, seed: int, fraction: float = VALIDATION_FRACTION) -> RealSet:
        """The same set for making choices: a stratified part of the training images takes the place of the test images.

        The result does not contain the test images, so no choice made with it can have seen them.

        Args:
            seed: decides which images are set aside.
            fraction: share of each class that is set aside, rounded, at least one image.

        Returns:
            The set with `judged_on="validation"`.

        Raises:
            DstillError: a class has a single image, so none can be set aside.

        Example:
            >>> split = Split(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1] * 4))
            >>> held = RealSet("tiny", split, split, ("cat", "dog")).holdout(seed=0, fraction=0.25)
            >>> len(held.train), len(held.test), held.judged_on
            (6, 2, 'validation')
        """
        fitting, validation = stratified(self.train.labels, self.class_names, fraction, seeding.generator(seed, "holdout"))
        return replace(
            self,
            train=self.train.take(fitting),
            test=self.train.take(validation),
            judged_on="validation",
            fingerprint="",
        )


def _fingerprint(real: RealSet) -> str:
    digest = hashlib.sha256("\n".join(real.class_names).encode())
    for tensor in (real.train.images, real.train.labels, real.test.images, real.test.labels):
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def stratified(labels: Tensor, names: Sequence[str], fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Splits row numbers into a rest and a part that holds the same share of each class.

    Args:
        labels: class ids `[N]`.
        names: names of the classes, in the order of their ids.
        fraction: share of each class in the part, above 0 and below 1; rounded, but at least one image.
        generator: draws the part.

    Returns:
        Row numbers of the rest and of the part, each in ascending order.

    Raises:
        DstillError: a class has fewer than two images, or `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise DstillError(f"the fraction to set aside must be above 0 and below 1, got {fraction}")
    rest: list[Tensor] = []
    part: list[Tensor] = []
    for c, name in enumerate(names):
        rows = (labels == c).nonzero().squeeze(1)
        if len(rows) < 2:
            raise DstillError(f"class {name!r} has {len(rows)} image(s): at least two are needed to set a part aside")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1)
        part.append(rows[:count])
        rest.append(rows[count:])
    return torch.cat(rest).sort().values, torch.cat(part).sort().values


Pair = tuple["Tensor | np.ndarray", "Tensor | np.ndarray | Sequence[int]"]
# What `load_real` takes.
Source = str | Path | Pair | Mapping[str, Pair] | RealSet


def load_real(
    source: Source,
    *,
    image_size: int | None = None,
    fit: str | None = None,
    train_fraction: float = 1.0,
    classes: Sequence[str] | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
) -> RealSet:
    """Loads a labelled image set.

    Args:
        source: one of: a name listed by `dstill ls datasets`; another id on the Hugging Face hub (`owner/name`); the root of
            an image folder (`train/<class>/*.png`, or `<class>/*.png` with `test_fraction`); a Parquet file, a folder of
            Parquet files, or a pattern such as `data/cifar10-*.parquet`; an ImageNet subset drawn from your own copy
            (`nette@/path`); a pair `(images, labels)`, or a mapping of split names to pairs. Images are `[N, C, H, W]`, uint8
            or float in [0, 1].
        image_size: side in pixels that every image is brought to. Needed if images differ in size.
        fit: how images are brought to `image_size`. `pad`: zeros around the centred image. `resize`: bilinear scaling to the
            exact square. `crop`: the shorter side is scaled to `image_size`, then the centre is cut out. `error`: images of
            another size are refused.
        train_fraction: share of the training images of each class to keep, above 0 and at most 1.
        classes: names (or ids) of the classes to keep, in this order.
        test_fraction: share of the training images to set aside as test images, for data without a test split.
        seed: decides which images `train_fraction` and `test_fraction` pick.

    Returns:
        The data as uint8 tensors.

    Raises:
        DstillError: the name is unknown, the hub cannot be reached, a split is missing, there is only one class, an image
            cannot be read (the message has its path), labels are out of range, or images differ in size and `image_size` is
            not given.

    Example:
        >>> images, labels = torch.zeros(6, 1, 4, 4), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> load_real((images, labels), test_fraction=0.34)
        RealSet('in-memory', 4 + 2 images of 1x4x4, 2 classes)
    """
    if image_size is not None and image_size < 1:
        raise DstillError(f"image_size must be at least 1 pixel, got {image_size}")
    if isinstance(source, RealSet):
        real = source if image_size is None else _resized(source, image_size, fit or "resize")
    else:
        real = _assemble(sources.read(source, image_size=image_size, fit=fit), test_fraction, seed)
    if isinstance(classes, str):
        raise DstillError(f"classes must be a list of names, got the text {classes!r}")
    if classes:
        real = _keep_classes(real, classes)
    if not 0 < train_fraction <= 1:
        raise DstillError(f"train_fraction must be above 0 and at most 1, got {train_fraction}")
    if train_fraction < 1:
        kept = stratified(real.train.labels, real.class_names, train_fraction, seeding.generator(seed, "train-fraction"))[1]
        real = replace(real, train=real.train.take(kept), fingerprint="")
    if real.classes < 2:
        raise DstillError(f"{real.name} has {real.classes} class: distillation needs at least two")
    return real


def _assemble(raw: sources.Raw, test_fraction: float | None, seed: int) -> RealSet:
    """Aligns the classes of training and test split by name, and checks the labels."""
    train = Split(raw.train.images, raw.train.labels)
    if len(train) == 0:
        raise DstillError(f"{raw.name} (train) has no images")
    names = raw.train.class_names or tuple(str(c) for c in range(int(train.labels.max()) + 1))
    if raw.test is None:
        if test_fraction is None:
            raise DstillError(
                f"{raw.name} has no test split (found: {', '.join(raw.found)}): name one of its splits test, val or "
                "validation, or pass --test-fraction 0.1 to set some of the training images aside"
            )
        _check_labels(raw.name, train, names)
        rest, part = stratified(train.labels, names, test_fraction, seeding.generator(seed, "test-fraction"))
        return RealSet(raw.name, train.take(rest), train.take(part), names)
    if test_fraction is not None:
        raise DstillError(f"{raw.name} has a test split of its own: leave out test_fraction (--test-fraction)")
    test = Split(raw.test.images, raw.test.labels)
    if raw.test.class_names and raw.test.class_names != names:
        # Checked before the look-up: -1, which usually marks unlabelled images, would index the last class.
        _check_labels(f"{raw.name} (test)", test, raw.test.class_names)
        test = Split(test.images, _by_name(raw.test.class_names, names, raw.name)[test.labels])
    for part_name, split in (("train", train), ("test", test)):
        _check_labels(f"{raw.name} ({part_name})", split, names)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DstillError(
            f"{raw.name}: training images are {tuple(train.images.shape[1:])} and test images "
            f"{tuple(test.images.shape[1:])} (channels, height, width): pass --image-size"
        )
    return RealSet(raw.name, train, test, names)


def _resized(real: RealSet, size: int, fit: str) -> RealSet:
    train, test = (replace(split, images=sources.resize(split.images, size, fit)) for split in (real.train, real.test))
    return replace(real, train=train, test=test, fingerprint="")


def _by_name(theirs: tuple[str, ...], ours: tuple[str, ...], name: str) -> Tensor:
    unknown = sorted(set(theirs) - set(ours))
    if unknown:
        raise DstillError(f"{name}: test class {unknown[0]!r} is not a training class; {suggest(unknown[0], ours)}")
    return torch.tensor([ours.index(c) for c in theirs])


def _check_labels(where: str, split: Split, names: tuple[str, ...]) -> None:
    if len(split) == 0:
        raise DstillError(f"{where} has no images")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= len(names):
        raise DstillError(
            f"{where} has labels from {low} to {high}, but {len(names)} classes: they must be 0 to {len(names) - 1}"
        )


def _keep_classes(real: RealSet, classes: Sequence[str]) -> RealSet:
    ids: list[int] = []
    for wanted in map(str, classes):
        if wanted in real.class_names:
            ids.append(real.class_names.index(wanted))
        elif wanted.isdigit() and int(wanted) < real.classes:
            ids.append(int(wanted))
        else:
            raise DstillError(f"{real.name} has no class {wanted!r}; {suggest(wanted, real.class_names)}")
    if len(set(ids)) != len(ids):
        raise DstillError(f"classes are named twice: {', '.join(map(str, classes))}")
    new_id = torch.full((real.classes,), -1)
    new_id[ids] = torch.arange(len(ids))

    def keep(split: Split) -> Split:
        labels = new_id[split.labels]
        rows = (labels >= 0).nonzero().squeeze(1)
        return Split(split.images[rows], labels[rows])

    return replace(
        real,
        train=keep(real.train),
        test=keep(real.test),
        class_names=tuple(real.class_names[i] for i in ids),
        fingerprint="",
    )


def check_ipc(real: RealSet, ipc: int) -> None:
    """Raises `DstillError` if a class has fewer training images than `ipc`."""
    counts = torch.bincount(real.train.labels, minlength=real.classes)
    smallest = int(counts.argmin())
    if int(counts[smallest]) < ipc:
        raise DstillError(
            f"class {real.class_names[smallest]!r} has {int(counts[smallest])} training images, fewer than the {ipc} "
            "images per class asked for: lower --ipc, or leave the class out with --classes"
        )
