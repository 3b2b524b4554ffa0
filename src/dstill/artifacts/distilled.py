"""The distilled set: images, labels, a learning rate, and everything else needed to train on the images and to show them."""

from __future__ import annotations

import html
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstill.artifacts.result import Claim, Family, family_of
from dstill.artifacts.synthetic import SyntheticDataset
from dstill.config.settings import NetConfig, Recipe
from dstill.data import formation, siamese
from dstill.data import preprocess as preprocessing
from dstill.data.preprocess import Preprocess
from dstill.data.real import RealSet
from dstill.errors import DstillError, DstillWarning
from dstill.support.cache import cache_folder
from dstill.support.console import in_notebook

FILE_NAME = "distilled.safetensors"


@dataclass(frozen=True)
class DistilledSet:
    """A synthetic image set, how it was made, and the accuracy that it claims.

    Attributes:
        images: the stored images: float32 `[S, C, H, W]`, preprocessed. With `parts` above 1, networks are trained on what they
            hold, see `decoded`.
        labels: class ids `[S]` (int64), or label logits `[S, K]` (float32); or one for each part, `[S * parts²]` or
            `[S * parts², K]`, image by image.
        alpha: the learned learning rate; None if the method learns none.
        preprocess: maps pixels to the inputs of networks, and back. Real test images must be preprocessed with it.
        method: name of the method.
        ipc: stored images per class.
        class_names: name of each class id.
        augmentation: DSA strategy to train with.
        net: the network that it was distilled with.
        data: name of the real set.
        data_fingerprint: fingerprint of the real set.
        recipe: the resolved settings; None for an imported set.
        seed: master seed.
        accuracy: the accuracy that its run measured; None before that.
        parts: images in a stored one along each side: with 2, a stored image holds four.

    Raises:
        DstillError: images or labels do not have these types and shapes, or a class id is out of range.

    Example:
        >>> distilled = DistilledSet(
        ...     images=torch.zeros(4, 1, 8, 8), labels=torch.tensor([0, 0, 1, 1]), alpha=0.02,
        ...     preprocess=preprocessing.Standardise(torch.tensor([0.5]), torch.tensor([0.25])), method="dm", ipc=2,
        ...     class_names=("cat", "dog"), augmentation="flip", net=NetConfig(), data="pets", data_fingerprint="",
        ...     recipe=None, seed=0,
        ... )
        >>> distilled
        DistilledSet('dm' of 'pets', 4 images of 1x8x8, 2 classes)
        >>> distilled.pixels().unique()
        tensor([0.5000])
        >>> distilled.train_kwargs()["lr"], len(distilled.as_dataset())
        (0.02, 4)
    """

    images: Tensor
    labels: Tensor
    alpha: float | None
    preprocess: Preprocess
    method: str
    ipc: int
    class_names: tuple[str, ...]
    augmentation: str
    net: NetConfig
    data: str
    data_fingerprint: str
    recipe: Recipe | None
    seed: int
    accuracy: Claim | None = None
    parts: int = 1

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or not images.is_floating_point():
            raise DstillError(f"images of a set must be floats [S, C, H, W], got {images.dtype} {tuple(images.shape)}")
        formation.check_parts((images.shape[2], images.shape[3]), self.parts)
        hard, soft = labels.dtype == torch.int64 and labels.ndim == 1, labels.is_floating_point() and labels.ndim == 2
        counts = (len(images), len(images) * self.parts**2)
        if len(labels) not in counts or not (hard or (soft and labels.shape[1] == self.classes)):
            raise DstillError(
                f"labels of {len(images)} images and {self.classes} classes must be class ids or logits for each, "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        if hard and not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise DstillError(f"class ids reach from {int(labels.min())} to {int(labels.max())} for {self.classes} classes")

    @classmethod
    def from_tensors(
        cls,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int],
        *,
        real: RealSet | None = None,
        class_names: Sequence[str] | None = None,
        preprocess: Preprocess | None = None,
        alpha: float | None = None,
        method: str = "own",
        net: str = "convnet",
        augmentation: str = "colour_crop_cutout_flip_scale_rotate",
        seed: int = 0,
        parts: int = 1,
    ) -> DistilledSet:
        """A set of images that you made yourself, to be evaluated, judged, shown, exported, or distilled further.

        Args:
            images: pixels `[S, C, H, W]`, uint8 or floats in [0, 1]; with `preprocess`, images that have been through it.
            labels: class ids `[S]`, or label logits `[S, K]`.
            real: the data that the set stands for. They name the classes, and pixels are standardised by their statistics.
            class_names: names of the classes, without `real`; numbers if left out.
            preprocess: what the images have been through.
            alpha: learning rate to train with; the protocol's if left out.
            method: name for tables.
            net: the network that it is evaluated with.
            augmentation: DSA strategy to train with, or `none`.
            seed: recorded with the set.
            parts: images in each of these along a side.

        Raises:
            DstillError: images or labels do not have these types and shapes, or a class id is out of range.

        Example:
            >>> mine = DistilledSet.from_tensors(torch.rand(4, 3, 8, 8), [0, 0, 1, 1], class_names=["cat", "dog"])
            >>> mine
            DistilledSet('own' of 'unknown data', 4 images of 3x8x8, 2 classes)
        """
        given, ids = torch.as_tensor(images), torch.as_tensor(labels)
        ids = ids.float() if ids.is_floating_point() else ids.long()
        if preprocess is None:
            given = given.float() / 255 if given.dtype == torch.uint8 else given.float()
            neutral = preprocessing.Standardise(torch.zeros(given.shape[1]), torch.ones(given.shape[1]))
            preprocess = preprocessing.fit("standardise", real.train.images) if real is not None else neutral
            given = preprocess.forward(given)
        soft = ids.ndim == 2
        classes = ids.shape[1] if soft else int(ids.max()) + 1
        names = real.class_names if real is not None else class_names or [str(c) for c in range(classes)]
        siamese.parse(augmentation)
        each = max(1, len(ids) // max(1, len(given)))  # labels of a stored image
        return cls(
            images=given.float(),
            labels=ids,
            alpha=alpha,
            preprocess=preprocess,
            method=method,
            ipc=max(1, len(given) // len(names) if soft else int(torch.bincount(ids).max()) // each),
            class_names=tuple(names),
            augmentation=augmentation,
            net=NetConfig(name=net),
            data="unknown data" if real is None else real.name,
            data_fingerprint="" if real is None else real.fingerprint,
            recipe=None,
            seed=seed,
            parts=parts,
        )

    def show(self, columns: int | None = None, *, stored: bool = False) -> None:
        """Draws the images: below the cell of a notebook, elsewhere in the system's image viewer.

        Args:
            columns: most images in a row; 10 if left out.
            stored: the stored images, instead of what they hold.
        """
        from dstill.artifacts.pictures import grid

        picture = grid(self, columns, stored=stored)
        if in_notebook():
            sys.modules["IPython"].display.display(picture)
        else:
            picture.show(str(self))

    def _repr_html_(self) -> str:
        from dstill.artifacts.pictures import grid, uri_of
        from dstill.artifacts.whitening import MissingWhitening

        said = html.escape(repr(self) + (f", {self.accuracy}" if self.accuracy else ""))
        if isinstance(self.preprocess, MissingWhitening):
            return f"<p>{said}; {html.escape(str(self.preprocess))}</p>"
        return f'<figure><img src="{uri_of(grid(self))}" alt=""><figcaption>{said}</figcaption></figure>'

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        holding = f" with {self.parts}x{self.parts} parts" if self.parts > 1 else ""
        count = f"{len(self.images)} images of {shape}{holding}"
        return f"DistilledSet({self.method!r} of {self.data!r}, {count}, {self.classes} classes)"

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return len(self.class_names)

    @property
    def class_ids(self) -> Tensor:
        """The class of each stored image, int64 `[S]`; for soft labels the most likely class, over all its parts."""
        ids = self._most_likely()
        if len(ids) == len(self.images):
            return ids
        soft = self.labels.is_floating_point()
        shares = self.labels.softmax(1) if soft else torch.nn.functional.one_hot(ids, self.classes).float()
        return shares.unflatten(0, (len(self.images), -1)).mean(1).argmax(1)

    def _most_likely(self) -> Tensor:
        """The class of each label."""
        return self.labels.argmax(1) if self.labels.is_floating_point() else self.labels

    @property
    def decoded(self) -> DistilledSet:
        """What networks are trained on, as a set whose images each hold one: `ipc * parts²` of each class.

        The set itself, if its images hold one each.
        """
        if self.parts == 1:
            return self
        images, labels = formation.decode(self.images, self.parts), self.labels
        if len(labels) < len(images):
            labels = formation.decoded_labels(labels, self.parts)
        return replace(self, images=images, labels=labels, ipc=self.ipc * self.parts**2, parts=1)

    @property
    def family(self) -> Family:
        """What the set stores, see `Result.family`."""
        return family_of(soft=self.labels.is_floating_point(), parts=self.parts)

    @property
    def stored_bytes(self) -> int:
        """Size of the set: the stored images as 8-bit pixels, and labels at one byte per class id or four per logit."""
        return self.images.numel() + self.labels.numel() * (4 if self.labels.is_floating_point() else 1)

    def pixels(self, *, clip: bool = True) -> Tensor:
        """The stored images in natural colours, `[S, C, H, W]`; values outside the displayable range [0, 1] are clipped.

        `decoded.pixels()` are those of what they hold. Whitening mixes the pixels of a whole image, so it cannot be undone in a
        stored image of several parts; such an image is put together from what it holds.

        Args:
            clip: clip values outside [0, 1], which distilled images have.
        """
        if self.parts > 1 and self.preprocess.kind == "zca":
            return formation.encode(self.decoded.pixels(clip=clip), self.parts)
        natural = self.preprocess.invert(self.images)
        return natural.clamp(0, 1) if clip else natural

    def as_dataset(self, *, augment: bool = True, seed: int = 0) -> SyntheticDataset:
        """A torch `Dataset` of (preprocessed image, label) for a `DataLoader`; of stored images, what they hold.

        Args:
            augment: augment each batch with a new draw of the set's augmentation, as the evaluation does.
            seed: seed of the draws.
        """
        strategy, decoded = self.augmentation if augment else "none", self.decoded
        return SyntheticDataset(decoded.images, decoded.labels, strategy, torch.Generator().manual_seed(seed))

    def train_kwargs(self) -> dict[str, float]:
        """Arguments for `torch.optim.SGD`: the learned rate, or 0.01 without one; momentum and decay of protocol `ast`."""
        return {"lr": self.alpha or 0.01, "momentum": 0.9, "weight_decay": 5e-4}

    def check_fits(self, real: RealSet) -> None:
        """Raises `DstillError` if real data have other classes or another image size than this set."""
        if self.class_names != real.class_names:
            raise DstillError(
                f"the distilled set has the classes {', '.join(self.class_names[:4])}…, {real.name} has "
                f"{', '.join(real.class_names[:4])}…: evaluate it on the data it was distilled from"
            )
        ours, theirs = tuple(self.images.shape[1:]), (real.channels, *real.size)
        if ours != theirs:
            raise DstillError(f"distilled images are {ours}, real ones {theirs} (channels, height, width): pass --image-size")

    def export(self, kind: str, folder: str | Path, *, stored: bool = False) -> Path:
        """Writes the set for other programs, see `dstill.export`.

        Args:
            kind: `dstill`, `compact`, `hf`, `png`, `pictures`, `npz` or `pt`.
            folder: the folder to write; made if missing.
            stored: the stored images, instead of what they hold.
        """
        from dstill.artifacts.exporting import export

        return export(self, kind, folder, stored=stored)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        endpoint: str | None = None,
    ) -> str:
        """Uploads the set to the Hugging Face hub, see `dstill.push_to_hub`, and returns the address."""
        from dstill.artifacts.hub import push_to_hub

        return push_to_hub(self, repo_id, private=private, token=token, revision=revision, endpoint=endpoint)

    def with_accuracy(self, accuracy: Claim) -> DistilledSet:
        """The same set with the accuracy that it claims."""
        return replace(self, accuracy=accuracy)

    def with_hard_labels(self) -> DistilledSet:
        """The same images, with the most likely class of each soft label as their class id."""
        return replace(self, labels=self._most_likely(), accuracy=None)

    def with_augmentation(self, strategy: str) -> DistilledSet:
        """The same set, to be trained with another DSA strategy.

        Raises:
            DstillError: an operation of the strategy is unknown.
        """
        siamese.parse(strategy)
        return replace(self, augmentation=strategy, accuracy=None)

    def with_net(self, net: NetConfig) -> DistilledSet:
        """The same set, to be evaluated with another network."""
        return replace(self, net=net, accuracy=None)

    def save(self, path: str | Path, *, whole: bool = False) -> Path:
        """Writes the set to a file.

        A whitening is large and the same for all sets of the same data. It is written into the file only with `whole`;
        otherwise the file names it, and it is written beside the file unless it lies in the cache.

        Args:
            path: a file whose name ends in .safetensors, or a folder for `distilled.safetensors`.
            whole: write everything into this one file, to be moved to another machine.

        Returns:
            The file.

        Raises:
            DstillError: images, labels or α are not finite; or, with `whole`, the whitening was not found.
        """
        from dstill.artifacts import set_file

        return set_file.save(self, path, whole=whole)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file that `save` writes."""
        from dstill.artifacts import set_file

        return set_file.size(self)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the set, those of its preprocessing included, by their names in files."""
        from dstill.artifacts import set_file

        return set_file.tensors(self)

    def header(self) -> dict[str, Any]:
        """Everything except the tensors, as plain JSON values."""
        from dstill.artifacts import set_file

        return set_file.header(self)

    @classmethod
    def load(cls, path: str | Path, *, real: RealSet | None = None) -> DistilledSet:
        """Reads a set.

        The whitening of a set is looked for beside the file, in the folder of its run and in the cache. If it is not found, a
        warning says what to do. Networks can be trained on such a set; its images cannot be shown in natural colours.

        Args:
            path: a file, a folder with `distilled.safetensors`, or the folder of a run that holds one set.
            real: the data that the set was distilled from. A whitening that is not found is fitted on them, and kept in the
                cache.

        Raises:
            DstillError: the file does not exist, is no distilled set, is damaged, or has a newer format; the folder holds
                several sets; or the whitening is not that of `real`.
        """
        from dstill.artifacts import set_file, whitening

        one = set_file.read(path)
        if real is not None:
            return whitening.completed(one, real, cache_folder())
        if isinstance(one.preprocess, whitening.MissingWhitening):
            warnings.warn(str(one.preprocess), DstillWarning, stacklevel=2)
        return one
