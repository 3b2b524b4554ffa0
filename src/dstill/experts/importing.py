"""Expert buffers that the field's scripts publish. Nothing in their files is ever executed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dstill.artifacts.importing import trusted
from dstill.errors import DstillError
from dstill.experts.smooth import step_lengths
from dstill.experts.trajectory import save_expert


def import_experts(paths: Sequence[str | Path], folder: str | Path) -> Path:
    """Expert buffers of MTT (`replay_buffer_*.pt`) as a folder that `distill --experts` takes.

    A buffer is a list of trajectories, a trajectory a list of records, a record the list of a network's parameters.

    Raises:
        DstillError: see `dstill.import_set`; or a trajectory has records of different sizes, or the folder holds experts
            already.
    """
    target, index = Path(folder), 0
    if any(target.glob("expert-*")):
        raise DstillError(f"{target} holds experts already, which would be mixed with these: pass another folder, or remove it")
    for path in map(Path, paths):
        for stacked in _buffer(path):
            lengths = step_lengths(stacked).tolist()
            record = {"accuracy": [], "loss": [], "step_lengths": lengths}  # buffers do not tell
            save_expert(target, index, stacked, {"index": index, "record": record, "imported": path.name})
            index += 1
    return target


def _buffer(path: Path) -> list[Tensor]:
    """The trajectories of one file, each `[epochs + 1, P]`."""
    content = trusted(path)
    if not isinstance(content, list | tuple) or not all(isinstance(one, list | tuple) for one in content):
        raise DstillError(f"{path} is not a buffer of expert trajectories: that is a list of lists of records")
    try:
        trajectories = [
            torch.stack([torch.cat([parameter.reshape(-1).float() for parameter in record]) for record in trajectory])
            for trajectory in content
        ]
    except (TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise DstillError(f"{path} is not a buffer of expert trajectories ({error})") from error
    short = next((len(one) for one in trajectories if len(one) < 2), None)
    if short is not None:
        raise DstillError(f"{path} has a trajectory of {short} record: two are needed for a segment to match")
    return trajectories
