"""What an evaluation says, typed, as `result.json`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from dstill.artifacts.files import write_text
from dstill.errors import DamagedFileError, DstillError

_COST = "cost.json"


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

    @classmethod
    def pooled(cls, scores: Sequence[Score]) -> Score:
        """Of sets that were measured one by one, as many networks each."""
        rates = {score.lr for score in scores}
        return cls.of([score.values for score in scores], rates.pop() if len(rates) == 1 else None)

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} % (n = {self.n})"


class ProtocolId(BaseModel):
    """Name and version of the protocol a number was measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int


class Cost(BaseModel):
    """What distilling one set took; what is trained first and shared, such as experts, is not in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    """Time of all steps, also of those before an interruption."""
    peak_bytes: int | None
    """Growth of the memory over its level at the start, at its peak; None where the system does not say."""

    def save(self, folder: Path) -> None:
        write_text(folder / _COST, self.model_dump_json() + "\n")

    @classmethod
    def load(cls, folder: Path) -> Cost | None:
        """The cost stored in the folder of a set; None if there is none.

        Raises:
            DamagedFileError: it is not what was written.
        """
        path = folder / _COST
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError as error:
            raise DamagedFileError(f"{path} is damaged: remove it ({error})") from error


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
    confusion: tuple[tuple[int, ...], ...] = ()
    """How many test images of class i (row) the first network's trainings take for class j (column), all together."""
    alpha: float | None
    labels: Literal["hard", "soft"] = "hard"
    """Class ids, or soft labels that networks are trained on."""
    cost: Cost | None = None
    """What distilling took, of the first set; None for a set that was not distilled here."""
    stored_bytes: int
    """Bytes of the distilled images as 8-bit pixels, and of the labels."""
    whole_bytes: int | None = None
    """The same of the real training images."""
    seconds: float
    """Wall time of this launch; what an earlier, interrupted one did is not in it."""
    stages: dict[str, float]
    """The same by stage."""
    dstill: str

    @classmethod
    def pooled(cls, results: Sequence[Result]) -> Result:
        """Of sets that were measured one by one: accuracies and times together, everything else the first one's."""
        first = results[0]
        if len(results) == 1:
            return first
        rows = zip(*(result.confusion for result in results), strict=True)
        return first.model_copy(
            update={
                "sets": sum(result.sets for result in results),
                "accuracy": Score.pooled([result.accuracy for result in results]),
                "nets": {net: Score.pooled([result.nets[net] for result in results]) for net in first.nets},
                "confusion": tuple(tuple(sum(counts) for counts in zip(*row, strict=True)) for row in rows),
                "seconds": sum(result.seconds for result in results),
                "stages": {name: sum(result.stages.get(name, 0.0) for result in results) for name in first.stages},
            }
        )

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


class Claim(BaseModel):
    """What a distilled set says of itself: the accuracy of the run it belongs to, pooled over the run's sets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    std: float
    n: int
    net: str
    """The network that was trained on it, which need not be the one it was distilled with."""
    protocol: ProtocolId
    measured_on: str
    """See `Result.measured_on`."""

    @classmethod
    def of(cls, result: Result) -> Claim:
        """The claim that a result supports."""
        score, net = result.accuracy, next(iter(result.nets))
        return cls(mean=score.mean, std=score.std, n=score.n, net=net, protocol=result.protocol, measured_on=result.measured_on)

    def __str__(self) -> str:
        images = "real test images" if self.measured_on == "test" else "real images held out of the training set"
        how = f"n = {self.n}, protocol {self.protocol.name} v{self.protocol.version}"
        return f"{100 * self.mean:.1f} ± {100 * self.std:.1f} % ({how}), fresh {self.net} networks on {images}"
