"""The distilled set: images, labels, a learning rate, and everything needed to train on them and to show them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.utils.data import Dataset

from dstill.artifacts import files
from dstill.artifacts.result import Claim
from dstill.config.registry import methods
from dstill.config.settings import NetConfig, Recipe, canonical
from dstill.data import preprocess as preprocessing
from dstill.data import siamese
from dstill.data.preprocess import Preprocess
from dstill.data.real import RealSet
from dstill.errors import DstillError

KIND = "distilled set"
FILE_NAME = "distilled.safetensors"
_PREPROCESS = "preprocess."


class _Header(BaseModel):
    """What a file must say of a set; what it says besides, such as the format, is another's business."""

    model_config = ConfigDict(strict=True)

    method: str
    ipc: Annotated[int, Field(ge=1)]
    class_names: Annotated[list[str], Field(min_length=1)]
    preprocess: str
    augmentation: str
    net: NetConfig
    data: str
    data_fingerprint: str
    recipe: Recipe | None
    seed: int
    accuracy: Claim | None


@dataclass(frozen=True)
class DistilledSet:
    """A synthetic image set and its claim.

    Attributes:
        images: `[S, C, H, W]` float32, preprocessed: what a network is trained on.
        labels: class ids `[S]` int64, or label logits `[S, K]` float32.
        alpha: learned learning rate, or None where the method learns none.
        preprocess: maps pixels to what networks see, and back; real test images must go through it.
        method: name of the method.
        ipc: images per class.
        class_names: name of each class id.
        augmentation: DSA strategy to train with.
        net: network it was distilled with.
        data: name of the real set.
        data_fingerprint: fingerprint of the real set.
        recipe: the resolved settings, or None for a foreign set.
        seed: master seed.
        accuracy: what the run that it comes from measured, once it has.

    Raises:
        DstillError: images and labels have not these types and shapes, or a class id is out of range.
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

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or not images.is_floating_point():
            raise DstillError(f"images of a set must be floats [S, C, H, W], got {images.dtype} {tuple(images.shape)}")
        hard, soft = labels.dtype == torch.int64 and labels.ndim == 1, labels.is_floating_point() and labels.ndim == 2
        if len(labels) != len(images) or not (hard or (soft and labels.shape[1] == self.classes)):
            raise DstillError(
                f"labels of {len(images)} images and {self.classes} classes must be class ids or logits for each, "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        if hard and not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise DstillError(f"class ids reach from {int(labels.min())} to {int(labels.max())} for {self.classes} classes")

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        return f"DistilledSet({self.method!r} of {self.data!r}, {len(self.images)} images of {shape}, {self.classes} classes)"

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def class_ids(self) -> Tensor:
        """Class of each image `[S]`; of soft labels the most likely one."""
        return self.labels.argmax(1) if self.labels.is_floating_point() else self.labels

    def pixels(self) -> Tensor:
        """Images in natural colours, `[S, C, H, W]` in [0, 1]; values beyond the displayable range are clipped."""
        return self.preprocess.invert(self.images).clamp(0, 1)

    def as_dataset(self, *, augment: bool = True, seed: int = 0) -> SyntheticDataset:
        """A torch `Dataset` of (preprocessed image, label) for any `DataLoader`.

        Args:
            augment: draw the set's augmentation anew for each batch, as the evaluation does.
            seed: of these draws.
        """
        return SyntheticDataset(self, augment, seed)

    def train_kwargs(self) -> dict[str, float]:
        """What to give `torch.optim.SGD`: the learned rate (0.01 where there is none), momentum and decay of protocol `ast`."""
        return {"lr": self.alpha or 0.01, "momentum": 0.9, "weight_decay": 5e-4}

    def check_fits(self, real: RealSet) -> None:
        """Raises `DstillError` where real data have other classes or another image size."""
        if self.class_names != real.class_names:
            raise DstillError(
                f"the distilled set has the classes {', '.join(self.class_names[:4])}…, {real.name} has "
                f"{', '.join(real.class_names[:4])}…: evaluate it on the data it was distilled from"
            )
        ours, theirs = tuple(self.images.shape[1:]), (real.channels, *real.size)
        if ours != theirs:
            raise DstillError(f"distilled images are {ours}, real ones {theirs} (channels, height, width): pass --image-size")

    def export(self, kind: str, folder: str | Path) -> Path:
        """Writes the set for programs that do not know dstill; see `dstill.artifacts.exporting.export`."""
        from dstill.artifacts.exporting import export

        return export(self, kind, folder)

    def with_accuracy(self, accuracy: Claim) -> DistilledSet:
        return replace(self, accuracy=accuracy)

    def with_hard_labels(self) -> DistilledSet:
        """The same images with the most likely class of each soft label as class id."""
        return replace(self, labels=self.class_ids, accuracy=None)

    def with_augmentation(self, strategy: str) -> DistilledSet:
        """The same set, to be trained with another augmentation."""
        siamese.parse(strategy)
        return replace(self, augmentation=strategy, accuracy=None)

    def with_net(self, net: NetConfig) -> DistilledSet:
        """The same set, to be evaluated with another network."""
        return replace(self, net=net, accuracy=None)

    def save(self, path: str | Path) -> Path:
        """Writes `distilled.safetensors` into a folder, or a file whose name ends in .safetensors.

        Raises:
            DstillError: images, labels or α are not finite.
        """
        target = Path(path)
        if target.suffix != ".safetensors":
            target = target / FILE_NAME
        wrong = self._not_finite()
        if wrong:
            raise DstillError(f"the distilled set has non-finite {', '.join(wrong)} and is not saved: the run has diverged")
        files.save(target, KIND, self.tensors(), self.header())
        return target

    def _not_finite(self) -> list[str]:
        return [name for name, tensor in self.tensors().items() if not bool(torch.isfinite(tensor).all())]

    def tensors(self) -> dict[str, Tensor]:
        """What `header` leaves out, by the names that files have for it."""
        tensors = {"images": self.images, "labels": self.labels}
        if self.alpha is not None:
            tensors["alpha"] = torch.tensor(self.alpha, dtype=torch.float64)
        return tensors | {_PREPROCESS + name: tensor for name, tensor in self.preprocess.tensors().items()}

    def header(self) -> dict[str, Any]:
        """Everything but the tensors, as plain JSON values."""
        return {
            "method": self.method,
            "ipc": self.ipc,
            "class_names": list(self.class_names),
            "preprocess": self.preprocess.kind,
            "augmentation": self.augmentation,
            "net": canonical(self.net, exclude_none=True),
            "data": self.data,
            "data_fingerprint": self.data_fingerprint,
            "recipe": canonical(self.recipe) if self.recipe else None,
            "seed": self.seed,
            "accuracy": self.accuracy.model_dump() if self.accuracy else None,
        }

    @classmethod
    def load(cls, path: str | Path) -> DistilledSet:
        """Reads a file, or `distilled.safetensors` in a folder.

        Raises:
            DstillError: no such file, not a distilled set, damaged, or from a newer format.
        """
        source = Path(path)
        if source.is_dir():
            if not (source / FILE_NAME).exists() and (source / "set-0").is_dir():
                raise DstillError(f"{source} is the folder of a run: pass one of its sets, {source / 'set-0'}")
            source = source / FILE_NAME
        header, tensors = files.load(source, KIND)
        return cls.from_parts(header, tensors, source)

    @classmethod
    def from_parts(cls, header: dict[str, Any], tensors: dict[str, Tensor], source: Path) -> DistilledSet:
        """The inverse of `header` and `save`; `source` is named where something is wrong.

        Raises:
            DstillError: a part is missing or malformed.
        """
        if header.get("method") not in [*methods()]:  # of a package that is not installed here: its settings mean nothing
            header = {**header, "recipe": None}
        stored = {name.removeprefix(_PREPROCESS): tensor for name, tensor in tensors.items() if name.startswith(_PREPROCESS)}
        try:
            said = _Header.model_validate(header)
            one = cls(
                images=tensors["images"],
                labels=tensors["labels"],
                alpha=float(tensors["alpha"]) if "alpha" in tensors else None,
                preprocess=preprocessing.from_tensors(said.preprocess, stored),
                method=said.method,
                ipc=said.ipc,
                class_names=tuple(said.class_names),
                augmentation=said.augmentation,
                net=said.net,
                data=said.data,
                data_fingerprint=said.data_fingerprint,
                recipe=said.recipe,
                seed=said.seed,
                accuracy=said.accuracy,
            )
            siamese.parse(one.augmentation)
            fits = one.preprocess.invert(one.images[:1]).shape == one.images[:1].shape
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DstillError(f"{source} is damaged or from another version of dstill: {error}") from error
        if not fits or one._not_finite():
            raise DstillError(f"{source} is damaged: preprocessing does not fit the images, or a number is not finite")
        return one


class SyntheticDataset(Dataset[tuple[Tensor, Tensor]]):
    """The images of a distilled set as a `DataLoader` wants them: whole batches at once, augmented together.

    One operation is drawn for a batch, its parameters for each image. The draws go on from pass to pass; a loader with several
    workers repeats them in each.
    """

    def __init__(self, distilled: DistilledSet, augment: bool, seed: int) -> None:
        self.distilled = distilled
        self.strategy = distilled.augmentation if augment else "none"
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.distilled.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """A batch, which `DataLoader` asks for by this name."""
        images = self.distilled.images[indices]
        images = siamese.apply(images, siamese.sample(self.strategy, len(indices), self.generator))
        return list(zip(images, self.distilled.labels[indices], strict=True))
