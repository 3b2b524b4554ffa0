"""The result of an evaluation, and its file `result.json`."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, computed_field, model_validator

from dstill.artifacts.files import write_text
from dstill.errors import DamagedFileError, DstillError

_COST = "cost.json"

Family = Literal["raw", "labels", "parts", "parts and labels"]
"""What a set stores besides plain images and class ids. Results are ranked within a family only."""


def family_of(*, soft: bool, parts: int) -> Family:
    """The family of a set.

    Args:
        soft: whether its labels are soft.
        parts: images in a stored one along a side.

    Example:
        >>> family_of(soft=False, parts=1), family_of(soft=True, parts=2)
        ('raw', 'parts and labels')
    """
    if parts > 1:
        return "parts and labels" if soft else "parts"
    return "labels" if soft else "raw"


class _Mean(BaseModel):
    """The mean of `n` accuracies, and their spread."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: float
    std: float
    n: int

    @property
    def percent(self) -> str:
        """Mean ± standard deviation in percent, without the sign %. A single accuracy has no spread, and none is shown."""
        return f"{100 * self.mean:.1f}" + (f" ± {100 * self.std:.1f}" if self.n > 1 else "")


class Score(_Mean):
    """Accuracies of several networks, as fractions in [0, 1].

    Attributes:
        mean: their mean.
        std: their sample standard deviation (ddof 1); 0 for a single accuracy.
        n: their number.
        values: each of them.

    Example:
        >>> score = Score.of([[0.5, 0.7], [0.6, 0.8]])
        >>> print(score)
        65.0 ± 12.9 % (n = 4)
        >>> round(score.between_sets, 3)
        0.071
        >>> print(Score.of([[0.5]]))
        50.0 % (n = 1)
    """

    values: tuple[float, ...]
    lr: float | None = None
    """The learning rate that the networks were trained with, if it is the same for all."""
    between_sets: float | None = None
    """The standard deviation between the means of the sets, if there are several sets."""

    @classmethod
    def of(cls, by_set: Sequence[Sequence[float]], lr: float | None = None) -> Score:
        """The score of several sets, pooled.

        Args:
            by_set: for each set the accuracies of its networks.
            lr: the learning rate that all networks were trained with.
        """
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
        """The score of sets that were measured one by one, with the same number of networks each."""
        rates = {score.lr for score in scores}
        return cls.of([score.values for score in scores], rates.pop() if len(rates) == 1 else None)

    def __str__(self) -> str:
        return f"{self.percent} % (n = {self.n})"


class ProtocolId(BaseModel):
    """The name and the version of the protocol that a number was measured under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name} v{self.version}"


class Cost(BaseModel):
    """What it took to distil one set, without what is trained before and shared, such as experts.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Cost(seconds=12.5, peak_bytes=None).save(Path(folder))
        ...     Cost.load(Path(folder)).seconds
        12.5
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float
    """Time of all steps in seconds, including those before an interruption."""
    peak_bytes: int | None
    """Peak of the memory in bytes, above its level at the start; None if the system does not tell."""

    def save(self, folder: Path) -> None:
        """Stores the cost in the folder of a set."""
        write_text(folder / _COST, self.model_dump_json() + "\n")

    @classmethod
    def load(cls, folder: Path) -> Cost | None:
        """The cost that is stored in the folder of a set; None if there is none.

        Raises:
            DamagedFileError: the file is damaged.
        """
        path = folder / _COST
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError as error:
            raise DamagedFileError(f"{path} is damaged: remove it ({error})") from error


class Result(BaseModel):
    """The evaluation of one method on one data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    data: str
    data_fingerprint: str
    ipc: int
    sets: int
    protocol: ProtocolId
    measured_on: str
    """`test`: measured once on the whole test set. `validation`: on a held-out part of the training set, to make choices."""
    accuracy: Score
    random: Score | None
    """The accuracy of random real images with the same IPC and preprocessing, under the same protocol."""
    whole: Score | None
    """The accuracy of the whole training set, under the protocol `whole`."""
    nets: dict[str, Score]
    """The accuracy of each evaluation network; `accuracy` is that of the first."""
    also: dict[str, Score] = {}
    """The accuracy of the first network under other protocols, by their names and versions."""
    confusion: tuple[tuple[int, ...], ...] = ()
    """How many test images of class i (row) are classified as class j (column), summed over the first network's trainings."""
    alpha: float | None
    labels: Literal["hard", "soft"] = "hard"
    """Whether networks are trained on class ids or on soft labels."""
    parts: int = 1
    """Images in a stored one along a side."""
    cost: Cost | None = None
    """What it took to distil the first set; None for a set that was not distilled here."""
    stored_bytes: int
    """Bytes of the distilled images, as 8-bit pixels, and of their labels."""
    file_bytes: int | None = None
    """Bytes of the file of a set, `distilled.safetensors`; of the first, if there are several."""
    whole_bytes: int | None = None
    """The same for the real training images."""
    seconds: float
    """Wall time of this launch, without earlier, interrupted ones."""
    stages: dict[str, float]
    """Wall time of each stage of this launch."""
    dstill: str

    @model_validator(mode="before")
    @classmethod
    def _without_derived(cls, values: Any) -> Any:
        """Files name the family, which follows from the other fields."""
        return {key: value for key, value in values.items() if key != "family"} if isinstance(values, dict) else values

    @computed_field  # type: ignore[prop-decorator]
    @property
    def family(self) -> Family:
        """What the sets store; results of different families are not ranked together."""
        return family_of(soft=self.labels == "soft", parts=self.parts)

    def rows(self) -> list[tuple[str, Score]]:
        """The accuracies and whose they are: the method's, by network where there are several, then the baselines'."""
        many = len(self.nets) > 1
        rows = [(f"{self.method} ({name})" if many else self.method, score) for name, score in self.nets.items()]
        rows += [(f"{self.method} (protocol {name})", score) for name, score in self.also.items()]
        rows += [("random real images", self.random)] if self.random else []
        return rows + ([("whole training set", self.whole)] if self.whole else [])

    @property
    def title(self) -> str:
        """What was measured, in a line."""
        return f"{self.data}, {self.ipc} image(s) per class, protocol {self.protocol}"

    def _repr_html_(self) -> str:
        cells = [
            f"<tr><td>{html.escape(name)}</td><td>{score.percent}</td><td>{score.n}</td></tr>" for name, score in self.rows()
        ]
        heading = f"<tr><th></th><th>{self.measured_on} accuracy %</th><th>n</th></tr>"
        return f"<table><caption>{html.escape(self.title)}</caption>{heading}{''.join(cells)}</table>"

    @classmethod
    def pooled(cls, results: Sequence[Result]) -> Result:
        """The result of sets that were measured one by one: accuracies and times are pooled, the rest is that of the first.

        If one of them lacks the confusion matrix, their common one is not known.
        """
        first = results[0]
        if len(results) == 1:
            return first
        known = all(result.confusion for result in results)
        rows = zip(*(result.confusion for result in results), strict=True) if known else ()
        return first.model_copy(
            update={
                "sets": sum(result.sets for result in results),
                "accuracy": Score.pooled([result.accuracy for result in results]),
                "nets": {net: Score.pooled([result.nets[net] for result in results]) for net in first.nets},
                "also": {name: Score.pooled([result.also[name] for result in results]) for name in first.also},
                "confusion": tuple(tuple(sum(counts) for counts in zip(*row, strict=True)) for row in rows),
                "seconds": sum(result.seconds for result in results),
                "stages": {name: sum(result.stages.get(name, 0.0) for result in results) for name in first.stages},
            }
        )

    def save(self, path: Path) -> Path:
        """Writes a `result.json` atomically, and returns its path."""
        write_text(path, self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """Reads a `result.json`.

        Raises:
            DstillError: the file does not exist, or is not a result.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DstillError(f"{path} is not a result of dstill: {error}") from error


class Claim(_Mean):
    """The accuracy that a distilled set claims: that of its run, pooled over the sets of the run."""

    net: str
    """The network that was trained on the set. It may differ from the one that the set was distilled with."""
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
        how = f"n = {self.n}, protocol {self.protocol}"
        return f"{self.percent} % ({how}), fresh {self.net} networks on {images}"
