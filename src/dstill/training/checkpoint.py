"""The state of a training on disk, so that an interrupted training resumes after the last epoch that was stored."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstill.artifacts import files
from dstill.errors import DamagedFileError, DstillError

_NET, _OPTIMISER, _GENERATOR, _STATE = "net.", "optimiser.", "generator", "training"
SECONDS = 60.0

Beside = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors, and plain values for the header."""


@dataclass
class Training:
    """Everything that the rest of a training depends on: the network, its optimiser, and the generator of all random draws."""

    net: nn.Module
    optimiser: torch.optim.Optimizer
    generator: torch.Generator


class Bookmark:
    """A file with the state of one training and with what the training has produced so far.

    Args:
        path: the file.
        kind: the kind of file that its header states.
        seconds: least time between two stores.
    """

    def __init__(self, path: Path, kind: str = "training under way", seconds: float = SECONDS) -> None:
        self.path, self.kind, self.seconds = path, kind, seconds
        self._last = time.monotonic()

    def restore(self, training: Training) -> tuple[int, dict[str, Tensor], dict[str, Any]]:
        """Restores the state of a training.

        If there is no file, or a file without a state, the training starts from the beginning. So it does if the file is
        damaged, which is then removed.

        Args:
            training: the training, which is changed in place.

        Returns:
            The number of epochs done, and the tensors and the header that were stored with the state; 0 and nothing for a
            training that starts from the beginning.
        """
        if not self.path.exists():
            return 0, {}, {}
        try:
            header, tensors = files.load(self.path, self.kind)
        except DamagedFileError:
            self.remove()
            return 0, {}, {}
        state = header.get(_STATE)
        if state is None:
            return 0, {}, {}
        training.net.load_state_dict(_below(tensors, _NET))
        training.optimiser.load_state_dict(_with_tensors(state["optimiser"], _below(tensors, _OPTIMISER)))
        training.generator.set_state(tensors[_GENERATOR])
        return int(state["epochs"]), {name: t for name, t in tensors.items() if not _is_state(name)}, header

    def store(self, epochs: int, training: Training, beside: Callable[[], Beside], *, last: bool = False) -> None:
        """Stores the state of a training, if the last store is long enough ago or if this is the last one.

        Nothing is stored if another process has stored more epochs in the file.

        Args:
            epochs: number of epochs done.
            training: the training.
            beside: returns the tensors and the values that are stored with the state; called only if something is stored.
            last: store in any case.
        """
        if not last and time.monotonic() - self._last < self.seconds:
            return
        if self._epochs_stored() > epochs:
            return
        state, (made, header) = training.optimiser.state_dict(), beside()
        tensors = {
            _GENERATOR: training.generator.get_state(),
            **{_NET + name: tensor for name, tensor in training.net.state_dict().items()},
            **{_OPTIMISER + name: tensor for name, tensor in _tensors_of(state).items()},
            **made,
        }
        # Copies, since a network may tie weights and safetensors refuses tensors that share memory.
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        files.save(self.path, self.kind, copies, {**header, _STATE: {"epochs": epochs, "optimiser": state["param_groups"]}})
        self._last = time.monotonic()

    def _epochs_stored(self) -> int:
        try:
            with files.opened(self.path, self.kind) as (header, _):
                return int(header.get(_STATE, {}).get("epochs", 0))
        except DstillError:
            return 0

    def remove(self) -> None:
        """Removes the file, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _is_state(name: str) -> bool:
    return name == _GENERATOR or name.startswith((_NET, _OPTIMISER))


def _tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimiser's state, as `<parameter>.<name>`."""
    return {
        f"{index}.{name}": value
        for index, values in state["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def _with_tensors(groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state of an optimiser from its parameter groups and its tensors; the inverse of `_tensors_of`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": groups}
