"""Real data: a labelled image set, decoded once into uint8 tensors."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dstill.data.aligning import aligned
from dstill.data.catalog import recognised
from dstill.data.pictures import resize
from dstill.data.sources import read
from dstill.data.splits import Raw, Reading
from dstill.errors import DstillError, suggest
from dstill.support import seeding
from dstill.support.console import Progress, reporter_of

VALIDATION_FRACTION = 0.1
_NAMED = 10  # classes that a summary names


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
        known: the data set of `dstill ls datasets` that this is: loaded by its name, or recognised by its content. Empty for
            all others, whatever they are called.
        read_as: the arguments of `load_real` that read it again, without those that have their defaults. Empty if it did not
            come from a name or a path, or was changed since.

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
    known: str = ""
    read_as: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self))

    def __repr__(self) -> str:
        shape = "x".join(map(str, (self.channels, *self.size)))
        return f"RealSet({self.name!r}, {len(self.train)} + {len(self.test)} images of {shape}, {self.classes} classes)"

    def summary(self) -> str:
        """What this is, in a line; of more than ten classes, the first and the last are named.

        Example:
            >>> split = Split(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]))
            >>> RealSet("pets", split, split, ("cat", "dog")).summary()
            'pets has 2 classes: cat, dog; 2 train, 2 test images of 3x8x8'
        """
        names = list(self.class_names)
        if len(names) > _NAMED:
            names = [*names[:3], "…", names[-1]]
        shape = "x".join(map(str, (self.channels, *self.size)))
        counts = f"{len(self.train):,} train, {len(self.test):,} {self.judged_on} images of {shape}"
        return f"{self.name} has {self.classes} classes: {', '.join(names)}; {counts}"

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
            read_as={},
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
        DstillError: a class has a single image, or `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise DstillError(f"the fraction to set aside must be above 0 and below 1, got {fraction}")
    rest: list[Tensor] = []
    part: list[Tensor] = []
    for c, name in enumerate(names):
        rows = (labels == c).nonzero().squeeze(1)
        if len(rows) == 1:
            raise DstillError(f"class {name!r} has {len(rows)} image(s): at least two are needed to set a part aside")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        count = min(max(1, round(fraction * len(rows))), len(rows) - 1) if len(rows) else 0
        part.append(rows[:count])
        rest.append(rows[count:])
    return torch.cat(rest).sort().values, torch.cat(part).sort().values


class Items(Protocol):
    """A map-style data set: `torch.utils.data.Dataset` and `datasets.Dataset` are such."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


# What `load_real` takes.
Source = str | Path | RealSet | Mapping[str, Any] | Items


def load_real(
    source: Source,
    *,
    image_size: int | None = None,
    fit: str | None = None,
    train_fraction: float = 1.0,
    classes: Sequence[str] | None = None,
    test_fraction: float | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    skip_damaged: bool = False,
    seed: int = 0,
    progress: Progress = None,
) -> RealSet:
    """Loads a labelled image set, and says what was read.

    A folder or file always comes before a data set of the same name. What a path is called changes nothing: the settings of
    a known data set apply to local files only if these hold its classes and its training images.

    Args:
        source: one of:

            - a name listed by `dstill ls datasets`, or another id on the Hugging Face hub (`owner/name`);
            - a folder of images: `train/<class>/*.png`, `<class>/*.png` with `test_fraction`, or images beside a list of files
              and labels (`metadata.csv`, `.jsonl`, another CSV or TSV file, `val_annotations.txt`); or the list itself;
            - a Parquet file, a folder of Parquet files, or a pattern such as `data/cifar10-*.parquet`;
            - an .npz file with `train_images`, `train_labels` and so on, or `x_train`, `y_train`;
            - an ImageNet subset drawn from your own copy (`nette@/path`);
            - in memory: a pair `(images, labels)`, a pair of such pairs for training and test, a list of `(image, label)`, a
              map-style data set of PyTorch, a `datasets.Dataset` or `DatasetDict`, or a mapping of split names to these.

            Arrays are `[N, C, H, W]`, `[N, H, W, C]` or, if grey, `[N, H, W]`; uint8, or float in [0, 1]. Labels are whole
            numbers from 0, or words.
        image_size: side in pixels that every image is brought to. Needed if images differ in size.
        fit: how images are brought to `image_size`. `pad`: zeros around the centred image. `resize`: bilinear scaling to the
            exact square. `crop`: the shorter side is scaled to `image_size`, then the centre is cut out. `error`: images of
            another size are refused.
        train_fraction: share of the training images of each class to keep, above 0 and at most 1.
        classes: names (or ids) of the classes to keep, in this order.
        test_fraction: share of the training images to set aside as test images, for data without a test split.
        test_split: name of the split to test on; `test` if there is one, else the one for validation.
        image_column: column of a table or list that holds the images or names their files.
        label_column: column of a table or list that holds the classes.
        class_names: names of the classes in the order of their ids, for labels that are numbers; for labels that are words,
            the same words in the order that their ids shall have.
        skip_damaged: leave images out that cannot be read. Otherwise they are an error that names them all.
        seed: decides which images `train_fraction` and `test_fraction` pick.
        progress: whether progress and what was read are shown; None shows them on a terminal and in a notebook.

    Returns:
        The data as uint8 tensors.

    Raises:
        DstillError: the name is unknown, the hub cannot be reached, a split or a column is missing or may be several, images
            have several labels or none, there is only one class, images cannot be read, labels are out of range, the layout
            of an array cannot be told, or images differ in size and `image_size` is not given. The message has the option or
            the line of code that helps.

    Example:
        >>> images, labels = torch.zeros(6, 1, 4, 4), torch.tensor([0, 0, 0, 1, 1, 1])
        >>> real = load_real((images, labels), test_fraction=0.34, class_names=["cat", "dog"])
        >>> real
        RealSet('in-memory', 4 + 2 images of 1x4x4, 2 classes)
        >>> print(real.summary())
        in-memory has 2 classes: cat, dog; 4 train, 2 test images of 1x4x4
    """
    if isinstance(classes, str):
        raise DstillError(f"classes must be a list of names, got the text {classes!r}")
    if isinstance(class_names, str):
        raise DstillError(f"class_names must be a list of names, got the text {class_names!r}")
    twice = [name for name, count in Counter(map(str, class_names or ())).items() if count > 1]
    if twice:
        raise DstillError(f"class_names has {', '.join(map(repr, twice))} more than once: give each class a name of its own")
    if image_size is not None and image_size < 1:
        raise DstillError(f"image_size must be at least 1 pixel, got {image_size}")
    reporter = reporter_of(progress)
    say = functools.cache(reporter.note)  # what holds for both splits is said once
    tell = functools.partial(reporter.progress, "reading")
    how = Reading(image_size, fit, image_column, label_column, test_split, class_names, skip_damaged, say, tell)
    if isinstance(source, RealSet):
        if test_fraction is not None or how.asks_for_more_than_a_size:
            raise DstillError(f"{source.name} is loaded already: pass the options of reading and splitting where it is loaded")
        real = source if image_size is None else _resized(source, image_size, fit or "resize")
        real = _reduced(real, classes, train_fraction, seed)
        return source if real is source else replace(real, read_as={})
    real = _assemble(read(source, how), test_fraction, seed, renumbered=bool(classes))
    if real.known and real.known != real.name:
        say(f"{real.name} holds the classes and training images of {real.known}, so it has the recipes of {real.known}")
    real = _reduced(real, classes, train_fraction, seed)
    say(real.summary())
    if not isinstance(source, str | Path):
        return real
    chosen = {"classes": classes, "test_fraction": test_fraction, "seed": seed or None}
    chosen |= {"train_fraction": train_fraction if train_fraction < 1 else None}
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(real, read_as={"source": str(source), **how.arguments(), **given})


def _reduced(real: RealSet, classes: Sequence[str] | None, train_fraction: float, seed: int) -> RealSet:
    """The classes to keep, and the share of their training images."""
    if classes:
        real = _keep_classes(real, classes)
    if not 0 < train_fraction <= 1:
        raise DstillError(f"train_fraction must be above 0 and at most 1, got {train_fraction}")
    if train_fraction < 1:
        kept = stratified(real.train.labels, real.class_names, train_fraction, seeding.generator(seed, "train-fraction"))[1]
        real = replace(real, train=real.train.take(kept), fingerprint="")
    if real.classes < 2:
        raise DstillError(f"{real.name} has {real.classes} class: distillation needs at least two")
    if classes:
        counts = torch.bincount(real.train.labels, minlength=real.classes)
        if not bool(counts.all()):
            raise DstillError(f"{real.name} has no training image of the class {real.class_names[int(counts.argmin())]!r}")
    if not len(real.test):
        raise DstillError(f"{real.name} has no test images of the classes {', '.join(real.class_names)}: keep others")
    return real


def _assemble(raw: Raw, test_fraction: float | None, seed: int, *, renumbered: bool) -> RealSet:
    """The aligned splits of a source, or a part of its training images in place of a missing test split."""
    train, test, names = aligned(raw, renumbered=renumbered)
    counts = dict(zip(names, torch.bincount(train.labels, minlength=len(names)).tolist(), strict=True))
    known = raw.known or recognised(train.images.shape[1], (train.images.shape[2], train.images.shape[3]), counts)
    fitting, testing = Split(train.images, train.labels), None if test is None else Split(test.images, test.labels)
    if testing is None and test_fraction is None:
        raise DstillError(_without_test(raw))
    if testing is None:
        generator = seeding.generator(seed, "test-fraction")
        rest, part = stratified(train.labels, names, test_fraction or 0.0, generator)
        return RealSet(raw.name, fitting.take(rest), fitting.take(part), names, known=known)
    if test_fraction is not None:
        raise DstillError(f"{raw.name} has a test split of its own: leave out test_fraction (--test-fraction)")
    return RealSet(raw.name, fitting, testing, names, known=known)


def _without_test(raw: Raw) -> str:
    found = f"(found: {', '.join(raw.found)})"
    aside = "pass --test-fraction 0.1 (test_fraction=0.1) to set some of the training images aside"
    if raw.hidden:
        return f"{raw.name}: the labels of {' and '.join(raw.hidden)} are hidden, so nothing can be measured there: {aside}"
    return f"{raw.name} has no test split {found}: name one of its splits test, val or validation, or {aside}"


def _resized(real: RealSet, size: int, fit: str) -> RealSet:
    train, test = (replace(split, images=resize(split.images, size, fit)) for split in (real.train, real.test))
    return replace(real, train=train, test=test, fingerprint="")


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
