"""Sinks for metrics besides `metrics.jsonl`: TensorBoard and Weights & Biases. They change no numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dstill.errors import DstillError, suggest


class Sink(Protocol):
    """Receives the metrics and pictures of a run."""

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        """The metrics of one iteration."""
        ...

    def picture(self, iteration: int, image: Image.Image) -> None:
        """The images after an iteration, as a picture."""
        ...

    def close(self) -> None:
        """Ends the log."""
        ...


def check_sinks(names: Sequence[str]) -> None:
    """Raises `DstillError` for an unknown name, or if a package is missing, with the extra that installs it."""
    for name in names:
        if name not in SINKS:
            raise DstillError(f"unknown log {name!r}; {suggest(name, SINKS)}")
        _needed(name)


def open_sinks(names: Sequence[str], folder: Path, title: str, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks of these names.

    Args:
        names: keys of `SINKS`.
        folder: the run folder, below which they write.
        title: title of the run.
        config: settings of the run, as plain values.

    Raises:
        DstillError: see `check_sinks`.
    """
    check_sinks(names)
    return [SINKS[name](folder, title, config) for name in names]


class TensorBoard:
    """Event files below `tensorboard/` in the run folder."""

    def __init__(self, folder: Path, title: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            self.writer.add_scalar(key, value, iteration)

    def picture(self, iteration: int, image: Image.Image) -> None:
        self.writer.add_image("images", np.asarray(image), iteration, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; `WANDB_MODE=offline` keeps it on this machine."""

    def __init__(self, folder: Path, title: str, config: Mapping[str, Any]) -> None:
        self.wandb = _needed("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        quiet = self.wandb.Settings(silent=True)
        self.run = self.wandb.init(project="dstill", name=title, config=dict(config), dir=str(folder), settings=quiet)

    def log(self, iteration: int, row: Mapping[str, float]) -> None:
        self.run.log(dict(row), step=iteration)

    def picture(self, iteration: int, image: Image.Image) -> None:
        self.run.log({"images": self.wandb.Image(image)}, step=iteration)

    def close(self) -> None:
        self.run.finish()


def _needed(module: str) -> ModuleType:
    """The package of a sink, which the extra of the same name installs."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DstillError(f"{module} is not installed: pip install 'dstill[{module}]'") from error


SINKS: dict[str, Callable[[Path, str, Mapping[str, Any]], Sink]] = {"tensorboard": TensorBoard, "wandb": WandB}
