"""Arrays in memory: their layout, their range, and the names of arrays in an .npz file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dstill.data.splits import usual
from dstill.errors import DstillError

_CHANNELS = (1, 2, 3, 4)
_SPLIT_KEY = re.compile(
    r"(?P<what>x|y|images|labels|data|targets)_(?P<split>\w+)|(?P<split2>\w+)_(?P<what2>x|y|images|labels|data|targets)", re.I
)
_PLAIN_KEYS = {"images": "x", "x": "x", "data": "x", "labels": "y", "y": "y", "targets": "y"}


def pixels(values: Any, count: int | None = None) -> Tensor:
    """Images of any usual layout and range as uint8 `[N, C, H, W]`.

    Args:
        values: `[N, C, H, W]`, `[N, H, W, C]` or, if they are grey, `[N, H, W]`, with C up to 4; uint8, or float in [0, 1].
        count: number of labels, to recognise images that lie along another axis.

    Raises:
        DstillError: the layout or the range is another one, or cannot be told; the message has the line of code that helps.

    Example:
        >>> pixels(torch.ones(5, 32, 28, 3)).shape
        torch.Size([5, 3, 32, 28])
    """
    return _bytes(_channels_first(tensor(values, "images"), count)).contiguous()


def tensor(values: Any, what: str) -> Tensor:
    """Numbers as a tensor on the CPU."""
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DstillError(f"in-memory {what} must be numbers in a tensor or an array ({error})") from error


def _channels_first(images: Tensor, count: int | None) -> Tensor:
    shape = tuple(images.shape)
    if count is not None and images.ndim in (3, 4) and shape[0] != count and shape[-1] == count:
        raise DstillError(
            f"images have the shape {shape}, with the {count} images along the last axis: pass np.moveaxis(images, -1, 0)"
        )
    if images.ndim == 3:
        return images.unsqueeze(1)
    if images.ndim == 2:
        raise DstillError(f"images have the shape {shape}, one row of numbers for each: {_unflattened(shape[1])}")
    if images.ndim != 4:
        raise DstillError(f"in-memory images must have the shape [N, C, H, W], [N, H, W, C] or [N, H, W], got {shape}")
    first, last = shape[1] in _CHANNELS, shape[3] in _CHANNELS
    if first and last:
        # Both can be true of images of a few pixels only: then the square tells, and else the documented order counts.
        first_square, last_square = shape[2] == shape[3], shape[1] == shape[2]
        if not first_square and not last_square:
            raise DstillError(
                f"images have the shape {shape}: the channels may be axis 1 or axis 3. Pass np.moveaxis(images, 1, -1) if they "
                "are axis 1, or np.moveaxis(images, -1, 1) if they are axis 3"
            )
        last = not first_square
    if last:
        return images.permute(0, 3, 1, 2)
    if first:
        return images
    raise DstillError(
        f"in-memory images must have the shape [N, C, H, W] with C up to 4, got {shape}: move the channels there, for example "
        "by images.transpose(0, 3, 1, 2), and take up to 4 of them, for example images[:, :3]"
    )


def _unflattened(numbers: int) -> str:
    for channels in (1, 3):
        side = math.isqrt(numbers // channels)
        if channels * side * side == numbers:
            last = "" if channels == 1 else f", or (-1, {side}, {side}, {channels}) if channels come last"
            return f"pass images.reshape(-1, {channels}, {side}, {side}){last}"
    return "pass images.reshape(-1, channels, height, width)"


def _bytes(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        remedy = "images.astype('uint8') if they are 0 to 255"
        if images.numel() and int(images.to(torch.int64).max()) > 255:
            remedy = "(images >> 8).astype('uint8') if they are 0 to 65535"
        raise DstillError(f"in-memory images must be uint8, or floats in [0, 1], got {images.dtype}: pass {remedy}")
    if bool(((images >= 0) & (images <= 1)).all()):
        return (images * 255).round().to(torch.uint8)
    if not bool(images.isfinite().all()):
        raise DstillError("in-memory images must be uint8, or floats in [0, 1], but some numbers are not finite")
    low, high = float(images.min()), float(images.max())
    if low >= -1 and high <= 1:
        remedy = "(images + 1) / 2 if they are in [-1, 1]"
    elif low >= 0 and high <= 255:
        remedy = "images / 255 if they are in [0, 255]"
    else:
        remedy = "them as they were before they were normalised (images * std + mean)"
    raise DstillError(
        f"in-memory images must be uint8, or floats in [0, 1]: they reach from {low:.3g} to {high:.3g}. Pass {remedy}"
    )


def is_archive(names: Iterable[str]) -> bool:
    """Whether these are names of arrays, such as `x_train`, and not of splits."""
    return any(_place(name) for name in names)


def _place(name: str) -> tuple[str, str] | None:
    """The split and the kind, images `x` or labels `y`, that the name of an array tells."""
    match = _SPLIT_KEY.fullmatch(name)
    if match is None:
        kind = _PLAIN_KEYS.get(name.lower())
        return None if kind is None else ("train", kind)
    what = match["what"] or match["what2"]
    return usual(match["split"] or match["split2"]).lower(), _PLAIN_KEYS[what.lower()]


def pairs_of(names: Sequence[str], where: str) -> dict[str, tuple[str, str]]:
    """The names of images and labels for each split, as MedMNIST (`train_images`) and Keras (`x_train`) write them.

    Raises:
        DstillError: there are no such names.

    Example:
        >>> pairs_of(["x_train", "y_train", "x_test", "y_test"], "mnist.npz")
        {'train': ('x_train', 'y_train'), 'test': ('x_test', 'y_test')}
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if (place := _place(name)) is not None:
            found.setdefault(place[0], {}).setdefault(place[1], name)
    pairs = {split: (kinds["x"], kinds["y"]) for split, kinds in found.items() if len(kinds) == 2}
    if "train" not in pairs:
        raise DstillError(
            f"{where} holds {', '.join(names) or 'nothing'}: expected train_images and train_labels, with test_images and "
            "test_labels, or x_train, y_train, x_test and y_test"
        )
    return pairs
