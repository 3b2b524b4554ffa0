"""Files of ZCA whitening: one for each real set, in the cache or beside a distilled set, found by the set's fingerprint.

The whitening of 32x32 colour images has 38 MB, a set of ten such images 0.1 MB. A set therefore names its whitening.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from dstill.artifacts import files
from dstill.data import preprocess as preprocessing
from dstill.data.preprocess import ZCA, Preprocess
from dstill.data.real import RealSet
from dstill.errors import DamagedFileError, DstillError
from dstill.support.progress import Reporter, Silent

if TYPE_CHECKING:
    from dstill.artifacts.distilled import DistilledSet

KIND = "preprocessing"


def file_name(fingerprint: str) -> str:
    """The name of the file with the whitening of the data with this fingerprint."""
    return f"zca-{fingerprint}.safetensors"


def cached_in(cache: Path) -> Path:
    """The folder of whitenings in a cache."""
    return cache / "preprocess"


def fitted(kind: str, real: RealSet, cache: Path, reporter: Reporter | None = None) -> Preprocess:
    """The preprocessing of a kind, fitted on the training images. A whitening is fitted once, and then read from the cache.

    Args:
        kind: `standardise` or `zca`.
        real: the real data.
        cache: folder of what runs share.
        reporter: is told that a whitening is fitted, which takes a minute for large images.

    Raises:
        DstillError: the kind is unknown, or the images cannot be preprocessed in this way.
    """
    if kind != ZCA.kind:
        return preprocessing.fit(kind, real.train.images)
    path = cached_in(cache) / file_name(real.fingerprint)

    def make() -> None:
        tell = (reporter or Silent()).progress
        tell("fitting the whitening", 0, 1)
        found = preprocessing.fit(kind, real.train.images)
        tell("fitting the whitening", 1, 1)
        files.save(path, KIND, found.tensors(), {"data": real.fingerprint})

    # A fresh fit is read back as well: with another memory layout, small batches would be rounded differently.
    return _whitening(files.load_or_make(path, KIND, make)[1], real.fingerprint)


def fingerprint_of(whitening: ZCA) -> str:
    """The fingerprint of the data that a whitening was fitted on; a checksum of its numbers if that is not known."""
    return whitening.fingerprint or files.checksum(whitening.tensors())[:16]


def keep(whitening: ZCA, home: Path, folders: Iterable[Path]) -> None:
    """Writes a whitening to `home`, unless one of the folders has it already."""
    fingerprint = fingerprint_of(whitening)
    found = next((path for folder in folders if (path := folder / file_name(fingerprint)).is_file()), None)
    if found is None or not _holds(found, whitening):
        files.save(home / file_name(fingerprint), KIND, whitening.tensors(), {"data": fingerprint})


def _holds(path: Path, whitening: ZCA) -> bool:
    """Whether a file holds this whitening, up to the rounding of another fit on the same data. Reads two rows of it."""
    with contextlib.suppress(DstillError), files.opened(path, KIND) as (_, file):
        names = set(file.keys())
        return all(
            name in names
            and (stored := file.get_tensor(name)).shape == ours.shape
            and torch.allclose(stored, ours.cpu().to(stored.dtype), rtol=1e-2, atol=1e-4)
            for name, ours in (("mean", whitening.mean), ("variance", whitening.variance))
        )
    return False


def find(fingerprint: str, folders: Iterable[Path]) -> ZCA | None:
    """The whitening of the data with this fingerprint, from the first of these folders that has it undamaged."""
    for folder in folders:
        path = folder / file_name(fingerprint)
        if path.is_file():
            with contextlib.suppress(DamagedFileError):
                header, tensors = files.load(path, KIND)
                if header.get("data") == fingerprint:
                    return _whitening(tensors, fingerprint)
    return None


def _whitening(tensors: dict[str, Tensor], fingerprint: str) -> ZCA:
    found = preprocessing.from_tensors(ZCA.kind, tensors)
    assert isinstance(found, ZCA)
    return found.known_as(fingerprint)


class MissingWhitening:
    """Stands for a whitening that is named by a set and was not found. Whatever needs its numbers says what to do.

    Args:
        fingerprint: fingerprint of the data that it was fitted on.
        data: their name.
    """

    kind = ZCA.kind

    def __init__(self, fingerprint: str, data: str) -> None:
        self.fingerprint, self.data = fingerprint, data

    def __str__(self) -> str:
        return (
            f"the whitening of {self.data} ({file_name(self.fingerprint)}) is neither beside the set nor in the cache, so its "
            "images cannot be shown in natural colours, nor real images be whitened as they were: give the real data once "
            "(--source DATA, or DistilledSet.load(path, real=…)), or pack the set where it was made "
            "(dstill export SET dstill -o FOLDER)"
        )

    def _refuse(self) -> NoReturn:
        raise DstillError(str(self))

    def forward(self, pixels: Tensor) -> Tensor:
        self._refuse()

    def invert(self, images: Tensor) -> Tensor:
        self._refuse()

    def tensors(self) -> dict[str, Tensor]:
        self._refuse()


def completed(distilled: DistilledSet, real: RealSet, cache: Path) -> DistilledSet:
    """The set with its whitening, if that was missing: from the cache, or fitted again on the data and kept there.

    Raises:
        DstillError: the whitening is that of other data.
    """
    missing = distilled.preprocess
    if not isinstance(missing, MissingWhitening):
        return distilled
    found: Preprocess | None = find(missing.fingerprint, [cached_in(cache)])
    if found is None:
        seen = [part for part in _parts(real, distilled.seed) if part.fingerprint == missing.fingerprint]
        if not seen:
            raise DstillError(
                f"{real.name} as it is read here (fingerprint {real.fingerprint}) is not what the set was distilled from; "
                f"{missing}"
            )
        found = fitted(ZCA.kind, seen[0], cache)
    return replace(distilled, preprocess=found)


def _parts(real: RealSet, seed: int) -> Iterator[RealSet]:
    """All of the data; and what remains of them for a run within a budget that competes with coresets."""
    yield real
    with contextlib.suppress(DstillError):  # a class of a single image
        yield real.holdout(seed)
