"""What an evaluation says, typed, as `result.json`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dstill.artifacts.header import write_text
from dstill.errors import DstillError


class Score(BaseModel):
    """Accuracies as fractions: mean, sample standard deviation (ddof 1; 0 for a single one), count, and each of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    std: float
    n: int
    values: tuple[float, ...]
    lr: float | None = None
    """Learning rate trained with, where all networks share one."""
    between_sets: float | None = None
    """Standard deviation between the means of the sets, where there are several."""

    @classmethod
    def of(cls, by_set: Sequence[Sequence[float]], lr: float | None = None) -> Score:
        """Pools S sets x K networks."""
        values = tuple(value for scores in by_set for value in scores)
        means = [statistics.fmean(scores) for scores in by_set]
        return cls(
            mean=statistics.fmean(values),
            std=statistics.stdev(values) if len(values) > 1 else 0.0,
            n=len(values),
            values=values,
            lr=lr,
            between_sets=statistics.stdev(means) if len(means) > 1 else None,
        )

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} % (n = {self.n})"


class ProtocolId(BaseModel):
    """Name and version of the protocol a number was measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int


class Result(BaseModel):
    """One evaluated method on one data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    data: str
    data_fingerprint: str
    ipc: int
    sets: int
    protocol: ProtocolId
    measured_on: str
    """`test`: measured once on the whole test set; `validation`: on a held-out part of the training set, for choices."""
    accuracy: Score
    random: Score | None
    """Random real images of the same IPC, in the same preprocessing, under the same protocol."""
    whole: Score | None
    """The whole training set under the protocol `whole`."""
    nets: dict[str, Score]
    """Accuracy by evaluation network; `accuracy` is that of the first."""
    alpha: float | None
    stored_bytes: int
    """Bytes of the distilled images as 8-bit pixels, and of the labels."""
    seconds: float
    """Wall time of this launch; what an earlier, interrupted one did is not in it."""
    stages: dict[str, float]
    """The same by stage."""
    dstill: str

    def save(self, path: Path) -> Path:
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """Reads a `result.json`.

        Raises:
            DstillError: it does not exist or is not one.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DstillError(f"{path} is not a result of dstill: {error}") from error
