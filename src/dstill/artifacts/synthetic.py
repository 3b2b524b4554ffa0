"""A torch `Dataset` of synthetic images, which augments whole batches as the evaluation does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dstill.data import siamese


class SyntheticDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels as a `Dataset` that augments whole batches.

    One operation is drawn for each batch, and its parameters for each image. The draws differ from pass to pass. A `DataLoader`
    with several workers makes the same draws in each worker.

    Args:
        images: preprocessed images `[S, C, H, W]`.
        labels: class ids `[S]`, or label logits `[S, K]`.
        strategy: DSA strategy, or `none`.
        generator: source of the draws.

    Example:
        >>> data = SyntheticDataset(torch.zeros(4, 1, 8, 8), torch.arange(4), "none", torch.Generator())
        >>> len(data), data[3][1]
        (4, tensor(3))
    """

    def __init__(self, images: Tensor, labels: Tensor, strategy: str, generator: torch.Generator) -> None:
        self.images, self.labels, self.strategy, self.generator = images, labels, strategy, generator

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """A batch; `DataLoader` calls this method if there is one."""
        images = self.images[indices]
        images = siamese.apply(images, siamese.sample(self.strategy, len(indices), self.generator))
        return list(zip(images, self.labels[indices], strict=True))
