"""Networks of the package timm, `timm:NAME`: an optional package with more than a thousand image classifiers."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dstill.errors import DstillError

if TYPE_CHECKING:
    from torch import nn

PREFIX = "timm:"
_LONGEST = 160  # characters of a reason that are repeated


def factory(name: str) -> Callable[[int, int, tuple[int, int]], nn.Module]:
    """What makes a network of timm, as the class of a network does: from channels, classes and size.

    Args:
        name: `timm:` and a name of `timm.list_models()`.

    Raises:
        DstillError: timm is not installed or cannot be imported, or has no such network. What timm would fetch from elsewhere,
            such as `hf-hub:owner/name`, is none.
    """
    timm, model = _timm(), name.removeprefix(PREFIX)
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=2)
        hint = f"did you mean {' or '.join(PREFIX + one for one in close)}?" if close else "timm.list_models() lists the names"
        raise DstillError(f"unknown network {name!r}; {hint}")
    return functools.partial(_make, model)


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name == "timm":
            raise DstillError("timm is not installed: pip install 'dstill[timm]'") from error
        raise DstillError(f"timm cannot be imported: {error}") from error
    except (ImportError, RuntimeError) as error:  # torch says the latter of a torchvision that was built for another release
        raise DstillError(f"timm cannot be imported: {error}. Does torchvision fit the installed torch?") from error


def _make(model: str, channels: int, classes: int, size: tuple[int, int]) -> nn.Module:
    """A network with untrained weights, whose initial values come from torch's global generator.

    Transformers have positions of a fixed number of patches, so they are told the size. Others take no such argument.
    """
    shape: dict[str, Any] = {"pretrained": False, "in_chans": channels, "num_classes": classes}
    create = _timm().create_model
    try:
        try:
            net: nn.Module = create(model, img_size=size, **shape)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            net = create(model, **shape)
        given = _answer_shape(net, channels, size)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:_LONGEST].rstrip(".")
        raise DstillError(
            f"{PREFIX}{model} takes no images of {channels}x{size[0]}x{size[1]}: {reason}. Take another network, or larger "
            "images with --image-size"
        ) from error
    if given != (1, classes):
        raise DstillError(f"{PREFIX}{model} is no classifier: it gives {given} for an image, not one row of {classes} logits")
    return net


def _answer_shape(net: nn.Module, channels: int, size: tuple[int, int]) -> tuple[int, ...] | None:
    """The shape of the answer to one image; None if it is no tensor. Running statistics are left as they are."""
    import torch

    training = net.training
    try:
        with torch.no_grad():
            answer = net.eval()(torch.zeros(1, channels, *size))
    finally:
        net.train(training)
    return tuple(answer.shape) if isinstance(answer, torch.Tensor) else None
