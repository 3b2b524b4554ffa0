"""The data sets that `load_real` knows by name. Adding one takes one line. Nothing here imports torch or `datasets`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Shape(NamedTuple):
    """What settings and plans must know of a real data set.

    Attributes:
        channels: colour channels.
        size: height and width in pixels.
        classes: number of classes.
        train: training images; 0 where that is not known.
        test: test images; 0 where that is not known.
    """

    channels: int
    size: tuple[int, int]
    classes: int
    train: int = 0
    test: int = 0

    @property
    def numbers(self) -> int:
        """How many numbers an image has: channels x height x width."""
        return self.channels * math.prod(self.size)

    @property
    def side(self) -> int:
        """The shorter side, which the depth of a network depends on."""
        return min(self.size)


@dataclass(frozen=True)
class Entry:
    """Where a named data set is found, and how its images are made to fit the networks.

    Attributes:
        hub: id on the Hugging Face hub; empty for data that come with a package.
        test: split that holds the labelled test images.
        config: configuration on the hub, if the data set has several.
        label: label column, if it is not called `label`.
        size: side in pixels that images are brought to; None to keep their size.
        fit: how images are brought to `size` (see `load_real`).
        imagenet_ids: class indices in ILSVRC-1k order, for the ImageNet subsets.
        mirror: whether a mirrored image keeps its class; a mirrored digit does not.
        note: one line for `dstill ls datasets`.
        shape: what is known about the data set before it is loaded.
        content: `content_of` its training images, by which a copy is recognised whatever it is called; empty if copies
            differ.
    """

    hub: str
    test: str = "test"
    config: str | None = None
    label: str | None = None
    size: int | None = None
    fit: str = "error"
    imagenet_ids: tuple[int, ...] = ()
    mirror: bool = True
    note: str = ""
    shape: Shape | None = None
    content: str = ""


def content_of(counts: Mapping[str, int]) -> str:
    """A digest of the names of the classes and of how many training images each has: 16 hex digits.

    Example:
        >>> content_of({"cat": 2, "dog": 1}) == content_of({"dog": 1, "cat": 2}) != content_of({"cat": 1, "dog": 2})
        True
    """
    lines = sorted(f"{name}\t{count}" for name, count in counts.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def named(source: str) -> Entry | None:
    """The data set that a name stands for; None if there is none, or if a file or folder of this name exists."""
    return None if Path(source).exists() else DATASETS.get(source)


def recognised(channels: int, size: tuple[int, int], counts: Mapping[str, int]) -> str:
    """Name of the data set whose training images these are, told by their content and never by a path; empty if none.

    Args:
        channels: colour channels.
        size: height and width in pixels.
        counts: number of training images by name of the class.
    """
    content = content_of(counts)
    for name, entry in DATASETS.items():
        shape = entry.shape
        # Data sets that are brought to a size when they are loaded by name have another one in their files.
        if entry.content == content and shape and shape.channels == channels and (entry.size or shape.size == size):
            return name
    return ""


def _subset(*ids: int) -> Entry:
    return Entry(
        "ILSVRC/imagenet-1k",
        "validation",
        size=128,
        fit="crop",
        imagenet_ids=ids,
        note="ten ImageNet classes at 128x128",
        shape=Shape(3, (128, 128), 10, 13_000, 500),  # about 1,300 images a class
    )


_GREY = Shape(1, (32, 32), 10, 60_000, 10_000)

DATASETS: dict[str, Entry] = {
    "digits": Entry(
        "",
        mirror=False,
        note="1,797 digits of 8x8 grey pixels, embedded in scikit-learn: no network, no file",
        shape=Shape(1, (8, 8), 10, 1_437, 360),
    ),
    "cifar10": Entry(
        "uoft-cs/cifar10",
        note="60,000 images of 32x32, 10 classes",
        shape=Shape(3, (32, 32), 10, 50_000, 10_000),
        content="ceeda43459c20069",
    ),
    "cifar100": Entry(
        "uoft-cs/cifar100",
        label="fine_label",
        note="60,000 images of 32x32, 100 classes",
        shape=Shape(3, (32, 32), 100, 50_000, 10_000),
        content="2c1f2b6abecb592d",
    ),
    "tiny-imagenet": Entry(
        "zh-plus/tiny-imagenet",
        "valid",
        note="110,000 images of 64x64, 200 classes",
        shape=Shape(3, (64, 64), 200, 100_000, 10_000),
        content="2e2ed08ce3faabe6",  # with the WordNet ids as names, as on the hub and in the zip
    ),
    "mnist": Entry(
        "ylecun/mnist",
        mirror=False,
        size=32,
        fit="pad",
        note="70,000 digits, 28x28 padded to 32x32",
        shape=_GREY,
        content="73d127f221d7d0ac",
    ),
    "fashion-mnist": Entry(
        "zalando-datasets/fashion_mnist",
        size=32,
        fit="pad",
        note="70,000 garments, 28x28 padded to 32x32",
        shape=_GREY,
        content="cd699fa9e36b97d5",
    ),
    "svhn": Entry(
        "ufldl-stanford/svhn",
        config="cropped_digits",
        mirror=False,
        note="99,289 house numbers of 32x32",
        shape=Shape(3, (32, 32), 10, 73_257, 26_032),
        content="a9da557c8ae48615",
    ),
    "nette": _subset(0, 217, 482, 491, 497, 566, 569, 571, 574, 701),
    "woof": _subset(193, 182, 258, 162, 155, 167, 159, 273, 207, 229),
    "meow": _subset(281, 282, 283, 284, 285, 291, 292, 290, 289, 287),
    "squawk": _subset(84, 130, 88, 144, 145, 22, 96, 9, 100, 89),
    "fruit": _subset(953, 954, 949, 950, 951, 957, 952, 945, 943, 948),
    "yellow": _subset(309, 986, 954, 951, 987, 779, 599, 291, 72, 11),
}
