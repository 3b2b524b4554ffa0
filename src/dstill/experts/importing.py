"""Imports the expert buffers that scripts of the field publish. Nothing in their files is executed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dstill.artifacts.foreign import trusted
from dstill.errors import DstillError
from dstill.experts.smooth import step_lengths
from dstill.experts.trajectory import expert_path, save_expert


def import_experts(paths: Sequence[str | Path], folder: str | Path) -> Path:
    """Converts MTT's expert buffers (`replay_buffer_*.pt`) to a folder of experts for `distill --experts`.

    A buffer is a list of trajectories. A trajectory is a list of records, and a record is the list of a network's parameters.

    Args:
        paths: the buffers.
        folder: the folder to write; made if missing.

    Returns:
        The folder.

    Raises:
        DstillError: a file is missing, damaged, too large or no buffer, it holds code, or the records of a trajectory differ
            in size; or the folder already holds experts.

    Example:
        >>> import tempfile
        >>> from dstill.experts.trajectory import Trajectories
        >>> record = lambda: [torch.zeros(2, 2), torch.zeros(2)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save([[record(), record(), record()]], f"{folder}/replay_buffer_0.pt")
        ...     experts = Trajectories(import_experts([f"{folder}/replay_buffer_0.pt"], f"{folder}/experts"))
        >>> len(experts), experts.epochs, experts.numel
        (1, 2, 6)
    """
    target, index = Path(folder), 0
    if any(target.glob("expert-*")):
        raise DstillError(f"{target} holds experts already, which would mix with these: pass another folder, or remove it")
    if not paths:
        raise DstillError("no buffers are given: pass one file or more, such as replay_buffer_0.pt")
    first: int | None = None
    for path in map(Path, paths):
        for stacked in _buffer(path):
            first = stacked.shape[1] if first is None else first
            if stacked.shape[1] != first:
                for written in range(index):
                    expert_path(target, written).unlink()
                several = f"{first} and {stacked.shape[1]} parameters"
                raise DstillError(f"the buffers hold experts of different networks ({several}): import each by itself")
            lengths = step_lengths(stacked).tolist()
            record = {"accuracy": [], "loss": [], "step_lengths": lengths}  # buffers do not record losses and accuracies
            save_expert(target, index, stacked, {"index": index, "record": record, "imported": path.name})
            index += 1
    return target


def _buffer(path: Path) -> list[Tensor]:
    """The trajectories of one file, each `[epochs + 1, P]`."""
    content = trusted(path)
    if not isinstance(content, list | tuple) or not all(isinstance(one, list | tuple) for one in content):
        raise DstillError(f"{path} is not a buffer of expert trajectories, which would be a list of lists of records")
    try:
        trajectories = [
            torch.stack([torch.cat([parameter.reshape(-1).float() for parameter in record]) for record in trajectory])
            for trajectory in content
        ]
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise DstillError(f"{path} is not a buffer of expert trajectories ({error})") from error
    short = next((len(one) for one in trajectories if len(one) < 2), None)
    if short is not None:
        raise DstillError(f"{path} has a trajectory of {short} record(s): a segment to match needs at least two")
    return trajectories
