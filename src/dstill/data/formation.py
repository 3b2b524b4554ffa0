"""Several images in one (IDC, Kim et al. 2022): a stored image holds parts x parts smaller ones, enlarged before use.

A stored image `[C, H, W]` is cut into parts x parts cells, row by row. `decode` enlarges each to `[C, H, W]` bilinearly, so
that one stored image stands for parts² decoded ones. Where a side is not divisible, its first cells are a pixel longer, as
with `torch.tensor_split`.

Each side is mapped by a matrix, so that decoding is linear, x ↦ E_i x E_jᵀ for the cell (i, j), and a gradient by the decoded
images is pulled back exactly, by the transposed matrices.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from dstill.errors import DstillError


def check_parts(size: tuple[int, int], parts: int) -> None:
    """Refuses parts that do not fit an image.

    Args:
        size: height and width of the images in pixels.
        parts: number of parts along a side.

    Raises:
        DstillError: there are fewer than one part, or more than pixels along a side.
    """
    if not 1 <= parts <= min(size):
        raise DstillError(f"an image of {size[0]}x{size[1]} pixels cannot hold {parts}x{parts} parts: lower distill.parts")


def decode(images: Tensor, parts: int) -> Tensor:
    """The images that stored ones stand for: image by image, and in each row by row.

    Args:
        images: stored images `[S, C, H, W]`.
        parts: number of parts along a side; with 1, the images are returned as they are.

    Returns:
        `[S * parts², C, H, W]`, differentiable in `images`.

    Raises:
        DstillError: the images cannot hold so many parts.

    Example:
        >>> decode(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), 2)[:, 0].flatten(1)
        tensor([[1., 1., 1., 1.],
                [2., 2., 2., 2.],
                [3., 3., 3., 3.],
                [4., 4., 4., 4.]])
    """
    if parts == 1:
        return images
    down, across = _sides(images, parts)
    return torch.einsum("iyh,schw,jxw->sijcyx", down, images, across).flatten(0, 2)


def pull_back(gradient: Tensor, parts: int) -> Tensor:
    """The gradient by the stored images, from that by the decoded ones: the adjoint of `decode`.

    Args:
        gradient: `[S * parts², C, H, W]`.
        parts: number of parts along a side.

    Returns:
        `[S, C, H, W]`.

    Example:
        >>> pull_back(torch.ones(4, 1, 2, 2), 2)
        tensor([[[[4., 4.],
                  [4., 4.]]]])
    """
    if parts == 1:
        return gradient
    down, across = _sides(gradient, parts)
    by_cell = gradient.unflatten(0, (-1, parts, parts))
    return torch.einsum("iyh,sijcyx,jxw->schw", down, by_cell, across)


def decoded_labels(labels: Tensor, parts: int) -> Tensor:
    """The labels of the decoded images, each with that of its stored image: `[S, ...]` becomes `[S * parts², ...]`.

    Example:
        >>> decoded_labels(torch.tensor([0, 7]), 2)
        tensor([0, 0, 0, 0, 7, 7, 7, 7])
    """
    return labels if parts == 1 else labels.repeat_interleave(parts**2, dim=0)


def encode(images: Tensor, parts: int) -> Tensor:
    """Shrinks images into the cells of stored ones, in the order of `decode`; each pixel is the mean of those it covers.

    What it loses is detail: `decode` gives the images back blurred.

    Args:
        images: `[S * parts², C, H, W]`.
        parts: number of parts along a side; with 1, the images are returned as they are.

    Returns:
        `[S, C, H, W]`.

    Raises:
        DstillError: the images cannot hold so many parts, or their number is not divisible by parts².
    """
    if parts == 1:
        return images
    check_parts((images.shape[2], images.shape[3]), parts)
    if len(images) % parts**2:
        raise DstillError(f"{len(images)} images do not fill stored ones that hold {parts**2} each: pass a multiple of it")
    by_cell = images.unflatten(0, (-1, parts**2))
    stored = torch.empty_like(by_cell[:, 0])
    cells = [cell for band in stored.tensor_split(parts, 2) for cell in band.tensor_split(parts, 3)]
    for k, cell in enumerate(cells):
        cell.copy_(F.interpolate(by_cell[:, k], size=cell.shape[2:], mode="area"))
    return stored


def _sides(images: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The matrices of both sides, in the type and on the device of the images."""
    height, width = images.shape[2], images.shape[3]
    check_parts((height, width), parts)
    return _enlarging(height, parts, images.dtype, images.device), _enlarging(width, parts, images.dtype, images.device)


@functools.cache
def _enlarging(side: int, parts: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[parts, side, side]`: for each cell, the matrix that enlarges its pixels along a side to the whole side.

    The weights are those of torch's linear interpolation, without aligned corners.
    """
    cells = torch.eye(side, dtype=torch.float64).tensor_split(parts)
    grown = [F.interpolate(cell.t()[None], size=side, mode="linear", align_corners=False)[0].t() for cell in cells]
    return torch.stack(grown).to(device, dtype)
