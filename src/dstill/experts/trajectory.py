"""The store of expert trajectories: one memory-mapped safetensors file for each expert."""

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
# The keys of `dstill.experts.train.expert_identity` in the headers of files.
_IDENTITY = ("data", "preprocess", "net", "experts", "augmentation", "seed")


class _Record(BaseModel):
    """The parts of a training's record that are read. An imported buffer has no accuracies."""

    accuracy: list[float]
    step_lengths: Annotated[list[float], Field(min_length=1)]


def expert_path(folder: Path, index: int) -> Path:
    """The file of an expert in a folder."""
    return folder / f"expert-{index:03d}.safetensors"


def save_expert(folder: Path, index: int, trajectory: Tensor, header: Mapping[str, Any]) -> None:
    """Writes one trajectory `[epochs + 1, P]` atomically.

    Args:
        folder: the folder of the experts.
        index: index of the expert.
        trajectory: the weights at initialisation and after each epoch.
        header: the settings and the record of the training.
    """
    files.save(expert_path(folder, index), KIND, {"trajectory": trajectory}, header)


def recorded_epochs(path: Path) -> int:
    """The number of epochs in the file of an expert; 0 if there is no file or it cannot be read."""
    if not path.exists():
        return 0
    try:
        with files.opened(path, KIND) as (_, file):
            return file.get_slice("trajectory").get_shape()[0] - 1
    except (DamagedFileError, safetensors.SafetensorError):
        return 0


def missing_experts(folder: Path, wanted: Iterable[int], epochs: int) -> list[int]:
    """The indices in `wanted` whose experts are missing in the folder or have fewer than `epochs` epochs."""
    return [index for index in wanted if recorded_epochs(expert_path(folder, index)) < epochs]


@dataclass(frozen=True)
class Segment:
    """A segment of one trajectory: where the student starts, and what it is to reach.

    Attributes:
        expert: index of the expert.
        epoch: start epoch t.
        start: θ*_t, float32 `[P]`.
        targets: θ*_{t+1} … θ*_{t+M}, float32 `[M, P]`.
    """

    expert: int
    epoch: int
    start: Tensor
    targets: Tensor


class Trajectories:
    """A folder of experts, of which single rows are read from disk.

    Args:
        folder: the folder that `train_experts` or `import_experts` wrote.
        count: use only the first `count` experts; all if left out.
        epochs: use only the first `epochs` epochs; as many as every expert has if left out.

    Raises:
        DstillError: the folder has no experts or fewer than `count`, an expert has fewer epochs than `epochs`, or a file is
            damaged.

    Example:
        >>> import tempfile
        >>> record = {"accuracy": [0.5, 0.75], "loss": [1.0, 0.5], "step_lengths": [3.0, 3.0]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_expert(Path(folder), 0, torch.arange(3.0).outer(torch.ones(3)), {"record": record})
        ...     experts = Trajectories(Path(folder))
        ...     segment = experts.segment(0, epoch=1, span=1)
        >>> len(experts), experts.epochs, experts.numel
        (1, 2, 3)
        >>> segment.targets
        tensor([[2., 2., 2.]])
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
        numbers = sorted({header["shape"][1] for header in self.headers})
        if len(numbers) > 1:
            several = " and ".join(map(str, numbers))
            raise DstillError(f"{self.folder} holds experts of different networks ({several} parameters): keep them apart")
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
        """A text of 16 hex digits that identifies these experts, whatever their folder is called.

        It is the fingerprint of their `ExpertTask`, which names their folder in the cache, or a digest of the weights for
        imported experts and for folders that mix experts of several tasks.
        """
        parts = [{key: header.get(key) for key in _IDENTITY} for header in self.headers]
        own = parts[0]["data"] is not None and all(part == parts[0] for part in parts)
        return digest(parts[0] if own else {"weights": [header["sha256"] for header in self.headers]})

    @property
    def epochs(self) -> int:
        """The number of epochs E that can be read from every expert; records are numbered from 0, the initialisation, to E."""
        return self._epochs

    @property
    def numel(self) -> int:
        """The number of parameters P."""
        return self.headers[0]["shape"][1]

    def rows(self, expert: int, start: int, stop: int) -> Tensor:
        """Reads the records `start` to `stop - 1` of one expert from disk, float32 `[stop - start, P]`."""
        with files.opened(self.paths[expert], KIND) as (_, file):
            return file.get_slice("trajectory")[start:stop].to(torch.float32)

    def curves(self) -> dict[str, list[list[float]]]:
        """The curves of all experts, one list for each expert, with one number for each epoch.

        Returns:
            `accuracy`, a diagnostic (empty if some experts are imported, which do not have it), and `step_lengths`,
            |θ_t - θ_{t+1}|².
        """
        records = [header["record"] for header in self.headers]
        known = all(record["accuracy"] for record in records)
        lengths = [record["step_lengths"][: self.epochs] for record in records]
        return {"accuracy": [record["accuracy"][: self.epochs if known else 0] for record in records], "step_lengths": lengths}

    def summary(self) -> str:
        """A text with one line for each expert: the accuracy and |θ_t - θ_{t+1}|² of its last epoch, and its Avg_Var.

        All epochs in the files count, also those beyond `epochs`.
        """
        lines = [f"{self.folder}: {len(self)} expert(s), {self.epochs} epochs, {self.numel:,} parameters"]
        for path, header in zip(self.paths, self.headers, strict=True):
            accuracies, lengths = header["record"]["accuracy"], header["record"]["step_lengths"]
            accuracy = f"accuracy {accuracies[-1]:.1%}, " if accuracies else ""
            numbers = f"{accuracy}last step {lengths[-1]:.3g}, Avg_Var {avg_var(lengths):.3g}"
            lines.append(f"  {path.stem}: {header['shape'][0] - 1} epochs, {numbers}")
        return "\n".join(lines)

    def check_fits(self, numel: int, epochs: int) -> None:
        """Raises `DstillError` if the experts do not have `numel` parameters or have fewer than `epochs` epochs."""
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
        """The record at a start epoch and the records after it.

        Args:
            expert: index of the expert.
            epoch: start epoch t.
            span: number M of records after it.

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
