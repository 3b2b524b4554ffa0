"""Invertible preprocessing, fitted on the training images only: channel standardisation or ZCA whitening."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dstill.errors import DstillError, suggest

ZCA_EPSILON = 0.1
_BLOCK = 4096


@runtime_checkable
class Preprocess(Protocol):
    """Maps pixels `[N, C, H, W]` in [0, 1] to the inputs of networks, and back.

    Attributes:
        kind: name of the preprocessing, `standardise` or `zca`.
    """

    kind: str

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed images, in the type of `pixels`."""
        ...

    def invert(self, images: Tensor) -> Tensor:
        """Pixels of preprocessed images. Values outside [0, 1] are not clipped, so that forward(invert(x)) = x."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors from which `from_tensors` rebuilds the preprocessing."""
        ...


def from_bytes(preprocess: Preprocess, images: Tensor, device: torch.device) -> Tensor:
    """Preprocesses real images: uint8 `[N, C, H, W]` becomes preprocessed float32 on the device."""
    return preprocess.forward(images.to(device, torch.float32) / 255)


def _column(vector: Tensor, like: Tensor) -> Tensor:
    return vector.to(like.device, like.dtype).view(1, -1, 1, 1)


class Standardise:
    """(x - mean) / std for each colour channel.

    Args:
        mean: mean of each channel `[C]`, in units of pixels in [0, 1].
        std: standard deviation of each channel `[C]`, in the same units.

    Example:
        >>> half = Standardise(torch.tensor([0.5]), torch.tensor([0.25]))
        >>> half.forward(torch.ones(1, 1, 1, 1)).item(), half.invert(torch.zeros(1, 1, 1, 1)).item()
        (2.0, 0.5)
    """

    kind = "standardise"

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std

    @classmethod
    def fit(cls, images: Tensor) -> Standardise:
        """Fits mean and standard deviation on uint8 images `[N, C, H, W]`.

        Raises:
            DstillError: a channel is constant, so it cannot be standardised.
        """
        flat = images.movedim(1, 0).flatten(1)
        # Integer sums are exact, so the statistics do not depend on the order of summation or the number of threads.
        count = flat.shape[1]
        total = flat.sum(1, dtype=torch.int64).double()
        squares = torch.stack([(channel.to(torch.int32) ** 2).sum(dtype=torch.int64) for channel in flat]).double()
        mean = total / count
        std = (squares / count - mean**2).clamp_min(0).sqrt()
        if bool((std == 0).any()):
            raise DstillError(
                "a colour channel is constant over the training images, so standardisation would divide by zero: pass "
                "--set preprocess=zca, or remove that channel from the images"
            )
        return cls((mean / 255).float(), (std / 255).float())

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - _column(self.mean, pixels)) / _column(self.std, pixels)

    def invert(self, images: Tensor) -> Tensor:
        return images * _column(self.std, images) + _column(self.mean, images)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "std": self.std}


class ZCA:
    """ZCA whitening of flat images in [0, 1], as the field applies it to CIFAR: (x - mean) V diag(1 / sqrt(S + 0.1)) V^T.

    V and S are the eigenvectors and eigenvalues of the covariance of the training images, with divisor n - 1. The inverse
    multiplies by sqrt(S + 0.1). It is exact even for rank-deficient data, since S + 0.1 is never zero.

    Args:
        mean: mean image `[C H W]`.
        basis: eigenvectors V as columns, `[C H W, C H W]`.
        variance: eigenvalues S, `[C H W]`, none negative.

    Attributes:
        fingerprint: fingerprint of the real data that it was fitted on; empty if not known.
    """

    kind = "zca"

    def __init__(self, mean: Tensor, basis: Tensor, variance: Tensor) -> None:
        self.mean, self.basis, self.variance = mean, basis, variance
        self.fingerprint = ""

    def known_as(self, fingerprint: str) -> ZCA:
        """The same whitening, as that of the data with this fingerprint."""
        known = ZCA(self.mean, self.basis, self.variance)
        known.fingerprint = fingerprint
        return known

    @classmethod
    def fit(cls, images: Tensor) -> ZCA:
        """Fits the whitening on uint8 images `[N, C, H, W]`; the time grows as (C H W)^3.

        Raises:
            DstillError: there are fewer than two images.
        """
        if len(images) < 2:
            raise DstillError("ZCA needs at least two training images: use preprocess: standardise")
        flat = images.flatten(1)
        mean = flat.sum(0, dtype=torch.int64).double() / len(flat)
        covariance = torch.zeros(flat.shape[1], flat.shape[1], dtype=torch.float64)
        for block in torch.split(flat, _BLOCK):
            centred = (block.double() - mean) / 255
            covariance += centred.t() @ centred
        variance, basis = torch.linalg.eigh(covariance / (len(flat) - 1))
        return cls((mean / 255).float(), basis.float(), variance.clamp_min(0).float())

    def _apply(self, flat: Tensor, power: float) -> Tensor:
        basis = self.basis.to(flat.device, flat.dtype)
        scale = (self.variance.to(flat.device, flat.dtype) + ZCA_EPSILON) ** power
        return ((flat @ basis) * scale) @ basis.t()

    def forward(self, pixels: Tensor) -> Tensor:
        mean = self.mean.to(pixels.device, pixels.dtype)
        blocks = [self._apply(block - mean, -0.5) for block in torch.split(pixels.flatten(1), _BLOCK)]
        return torch.cat(blocks).view_as(pixels)

    def invert(self, images: Tensor) -> Tensor:
        mean = self.mean.to(images.device, images.dtype)
        return (self._apply(images.flatten(1), 0.5) + mean).view_as(images)

    def tensors(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "basis": self.basis, "variance": self.variance}


_KINDS: dict[str, type[Standardise] | type[ZCA]] = {"standardise": Standardise, "zca": ZCA}


def fit(kind: str, images: Tensor) -> Preprocess:
    """Fits a preprocessing.

    Args:
        kind: `standardise` or `zca`.
        images: uint8 training images `[N, C, H, W]`.

    Raises:
        DstillError: the kind is unknown, or the images cannot be preprocessed in this way.
    """
    if kind not in _KINDS:
        raise DstillError(f"unknown preprocessing {kind!r}; {suggest(kind, _KINDS)}")
    return _KINDS[kind].fit(images)


def from_tensors(kind: str, tensors: dict[str, Tensor]) -> Preprocess:
    """Rebuilds a stored preprocessing; the inverse of `Preprocess.tensors`.

    Args:
        kind: `standardise` or `zca`.
        tensors: what `Preprocess.tensors` returned.

    Raises:
        DstillError: the kind is unknown or a tensor is missing.
    """
    if kind not in _KINDS:
        raise DstillError(f"unknown preprocessing {kind!r} in the file: the file is damaged or was written by a newer dstill")
    try:
        return _KINDS[kind](**tensors)
    except TypeError as error:
        raise DstillError(f"the stored {kind} preprocessing is incomplete or damaged: {error}") from error
