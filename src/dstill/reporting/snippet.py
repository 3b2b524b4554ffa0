"""Code to copy from a page: it loads a set, trains a network on it and tests it, as it stands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.record import DataSource
from dstill.data.catalog import DATASETS
from dstill.nets.networks import NETWORKS
from dstill.support.console import from_home

_PYTHON_ONLY = ("class_names", "seed")  # arguments of `load_real` that are no options


def python(distilled: DistilledSet, folder: Path, source: DataSource | None) -> str:
    """A Python script that trains a network on a set and, if it is known where the real data are, tests it on them.

    Whatever comes from a file is written as a literal, so that no name in it can become code.

    Args:
        distilled: the set.
        folder: its folder.
        source: how its real data are read; None if that is not known.
    """
    soft, own = distilled.labels.is_floating_point(), distilled.net.name in NETWORKS
    decoded = f"  # each stored image as the {distilled.parts**2} that it holds" if distilled.parts > 1 else ""
    place = from_home(str(folder))
    path = f"Path({place!r}).expanduser()" if place.startswith("~") else repr(place)
    lines = [
        *(["from pathlib import Path", ""] if place.startswith("~") else []),
        "import torch",
        "from torch.utils.data import DataLoader",
        "",
        "import dstill",
        *([] if own else ["from dstill.config.settings import NetConfig"]),
        "from dstill.nets.networks import build",
        "",
        "torch.manual_seed(0)",
        f"syn = dstill.DistilledSet.load({path})",
        *([] if own else [f"# The set was distilled with {distilled.net.name!r}, which is not a network of dstill."]),
        "channels, *size = syn.images.shape[1:]",
        f"net = build({'syn.net' if own else 'NetConfig()'}, channels, syn.classes, tuple(size), torch.default_generator)",
        "optimiser = torch.optim.SGD(net.parameters(), **syn.train_kwargs())",
        "schedule = torch.optim.lr_scheduler.StepLR(optimiser, 500, 0.5)",
        f"loader = DataLoader(syn.as_dataset(), batch_size=256, shuffle=True){decoded}",
        "for _ in range(1000):",
        "    for images, labels in loader:",
        "        optimiser.zero_grad()",
        f"        torch.nn.functional.cross_entropy(net(images), labels{'.softmax(1)' if soft else ''}).backward()",
        "        optimiser.step()",
        "    schedule.step()",
        "",
    ]
    return "\n".join(lines + (_untested() if source is None else _tested(source))) + "\n"


def _tested(source: DataSource) -> list[str]:
    options = "".join(f", {key}={value!r}" for key, value in _options(source))
    return [
        f"real = dstill.load_real({source.source!r}{options})",
        "net.eval()",
        "with torch.no_grad():",
        "    batches = (syn.preprocess.forward(images / 255) for images in real.test.images.split(500))",
        "    predicted = torch.cat([net(images).argmax(1) for images in batches])",
        'print(f"test accuracy {(predicted == real.test.labels).float().mean():.1%}")',
    ]


def _untested() -> list[str]:
    return [
        "net.eval()",
        "# Real images [N, C, H, W] with values in [0, 1] go through the preprocessing of the set:",
        "# predicted = net(syn.preprocess.forward(images)).argmax(1)",
    ]


def command(folder: Path, source: DataSource) -> str:
    """The command that evaluates a set; empty if the command line cannot say how the real data are read.

    Args:
        folder: the folder of the set.
        source: how its real data are read.
    """
    words = ["dstill", "evaluate", from_home(str(folder)), source.source]
    for key, value in _options(source):
        if key in _PYTHON_ONLY:
            return ""
        words.append(f"--{key.replace('_', '-')}")
        if value is not True:
            words.append(",".join(value) if isinstance(value, tuple) else str(value))
    return " ".join(map(_quoted, words)) + "\n"


def _quoted(word: str) -> str:
    """A word for the shell, which replaces `~` only where it is not quoted."""
    return "~/" + shlex.quote(word[2:]) if word.startswith("~/") else shlex.quote(word)


def _options(source: DataSource) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in source.arguments().items() if key != "source"]


def source_by_name(distilled: DistilledSet) -> DataSource | None:
    """The real data of a set whose folder does not say how they were read: those of a known name and of all its classes.

    None if there is no such name, or if the set has other classes or channels.
    """
    entry = DATASETS.get(distilled.data)
    shape = None if entry is None else entry.shape
    channels, height, width = distilled.images.shape[1:]
    if shape is None or (shape.classes, shape.channels) != (distilled.classes, channels) or height != width:
        return None
    return DataSource.of({"source": distilled.data} | ({} if shape.size == (height, width) else {"image_size": height}))
