"""The store of expert trajectories: one memory-mapped safetensors file an expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import safetensors
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from dstill.artifacts import files
from dstill.artifacts.record import avg_var
from dstill.config.settings import digest
from dstill.errors import DamagedFileError, DstillError

KIND = "expert trajectory"
# The keys of `dstill.experts.train.expert_identity`, as headers have them.
_IDENTITY = ("data", "preprocess", "net", "experts", "augmentation", "seed")


class _Record(BaseModel):
    """What is read of the record of a training; accuracies are missing where a foreign buffer does not tell them."""

    accuracy: list[float]
    step_lengths: Annotated[list[float], Field(min_length=1)]


def expert_path(folder: Path, index: int) -> Path:
    return folder / f"expert-{index:03d}.safetensors"


def save_expert(folder: Path, index: int, trajectory: Tensor, header: Mapping[str, Any]) -> None:
    """Writes one trajectory `[epochs + 1, P]` atomically, with its settings and per-epoch records as header."""
    files.save(expert_path(folder, index), KIND, {"trajectory": trajectory}, header)


def recorded_epochs(path: Path) -> int:
    """Epochs that an expert's file records; 0 where there is none that can be read."""
    if not path.exists():
        return 0
    try:
        with files.opened(path, KIND) as (_, file):
            return file.get_slice("trajectory").get_shape()[0] - 1
    except (DamagedFileError, safetensors.SafetensorError):
        return 0


def missing_experts(folder: Path, wanted: Iterable[int], epochs: int) -> list[int]:
    """Those of the wanted experts that the folder lacks, or has with fewer epochs."""
    return [index for index in wanted if recorded_epochs(expert_path(folder, index)) < epochs]


@dataclass(frozen=True)
class Segment:
    """Rows of one trajectory in float32: where the student starts, and what it must reach.

    Attributes:
        expert: index of the expert.
        epoch: start epoch t.
        start: θ*_t, `[P]`.
        targets: θ*_{t+1} … θ*_{t+M}, `[M, P]`.
    """

    expert: int
    epoch: int
    start: Tensor
    targets: Tensor


class Trajectories:
    """A folder of experts, read row by row.

    Args:
        folder: where `train_experts` wrote.
        count: use the first `count` experts only.
        epochs: use the first `epochs` epochs only; all that every expert has if left out.

    Raises:
        DstillError: the folder has no experts, or fewer than `count`, or a file is damaged, or they are too short.
    """

    def __init__(self, folder: Path, count: int | None = None, epochs: int | None = None) -> None:
        self.folder = Path(folder)
        found = sorted(self.folder.glob("expert-*.safetensors"), key=lambda path: (len(path.name), path.name))  # beyond 999
        if not found:
            raise DstillError(f"{self.folder} holds no experts: run dstill train-experts first, or check the path")
        if count is not None and len(found) < count:
            raise DstillError(
                f"{self.folder} holds {len(found)} experts, {count} are asked for: train the others or lower the count"
            )
        self.paths = found[:count]
        self.headers = [self._header(path) for path in self.paths]
        recorded = min(header["shape"][0] for header in self.headers) - 1
        if epochs is not None and epochs > recorded:
            raise DstillError(f"{self.folder} has experts of {recorded} epochs, {epochs} are asked for: train longer ones")
        self._epochs = recorded if epochs is None else epochs

    @staticmethod
    def _header(path: Path) -> dict[str, Any]:
        with files.opened(path, KIND) as (header, file):
            try:
                _Record.model_validate(header.get("record"))
                shape = file.get_slice("trajectory").get_shape()
                _epochs, _numel = shape
            except (ValueError, safetensors.SafetensorError) as error:
                raise DamagedFileError(f"{path} is damaged or from another version of dstill: {error}") from error
            return {**header, "shape": shape}

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def identity(self) -> str:
        """What these experts are, wherever they lie: their folder's name in the cache; a digest of the weights of others."""
        parts = [{key: header.get(key) for key in _IDENTITY} for header in self.headers]
        own = parts[0]["data"] is not None and all(part == parts[0] for part in parts)
        return digest(parts[0] if own else {"weights": [header["sha256"] for header in self.headers]})

    @property
    def epochs(self) -> int:
        """Epochs that can be read of every expert; record 0 is the initialisation."""
        return self._epochs

    @property
    def numel(self) -> int:
        """Number of parameters P."""
        return self.headers[0]["shape"][1]

    def rows(self, expert: int, start: int, stop: int) -> Tensor:
        """Records `start … stop-1` of one expert, float32 `[stop - start, P]`, read from disk."""
        with files.opened(self.paths[expert], KIND) as (_, file):
            return file.get_slice("trajectory")[start:stop].to(torch.float32)

    def curves(self) -> dict[str, list[list[float]]]:
        """By epoch, a list an expert: `accuracy`, a diagnostic, and `step_lengths`, |θ_t - θ_{t+1}|²."""
        records = [header["record"] for header in self.headers]
        return {key: [record[key][: self.epochs] for record in records] for key in ("accuracy", "step_lengths")}

    def summary(self) -> str:
        """One line an expert, whole: accuracy and |θ_t - θ_{t+1}|² after its last epoch, and Avg_Var."""
        lines = [f"{self.folder}: {len(self)} expert(s), {self.epochs} epochs, {self.numel:,} parameters"]
        for path, header in zip(self.paths, self.headers, strict=True):
            accuracies, lengths = header["record"]["accuracy"], header["record"]["step_lengths"]
            accuracy = f"accuracy {accuracies[-1]:.1%}, " if accuracies else ""
            numbers = f"{accuracy}last step {lengths[-1]:.3g}, Avg_Var {avg_var(lengths):.3g}"
            lines.append(f"  {path.stem}: {header['shape'][0] - 1} epochs, {numbers}")
        return "\n".join(lines)

    def check_fits(self, numel: int, epochs: int) -> None:
        """Raises `DstillError` for experts of another network than one with `numel` parameters, or of fewer epochs."""
        if self.numel != numel:
            raise DstillError(
                f"the experts of {self.folder} have {self.numel} parameters, the recipe's network {numel}: they were trained "
                "with another network"
            )
        if self.epochs < epochs:
            raise DstillError(
                f"the experts of {self.folder} were trained for {self.epochs} epochs, matching needs {epochs} (T+ + M - 1): "
                "lower distill.max_start_epoch or train longer experts"
            )

    def segment(self, expert: int, epoch: int, span: int) -> Segment:
        """The start at `epoch` and the `span` records after it.

        Raises:
            DstillError: the trajectory is too short.
        """
        if epoch + span > self.epochs:
            raise DstillError(
                f"a segment from epoch {epoch} over {span} epochs needs {epoch + span} recorded epochs, the experts have "
                f"{self.epochs}: lower distill.max_start_epoch or train longer experts"
            )
        rows = self.rows(expert, epoch, epoch + span + 1)
        return Segment(expert, epoch, rows[0], rows[1:])
