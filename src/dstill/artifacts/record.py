"""The record of a finished run, read from its folder; reports and reproductions show it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from dstill.artifacts.files import write_text
from dstill.artifacts.result import Cost, Result
from dstill.config import yamls
from dstill.config.registry import curve_titles
from dstill.errors import CollapseError, DamagedFileError, DstillError, reason_of
from dstill.support.console import from_home

RESULT_NAME = "result.json"
RECIPE_NAME = "recipe.yaml"
METRICS_NAME = "metrics.jsonl"
EXPERTS_NAME = "experts.json"
MAP_NAME = "initialisation.json"
INITIAL_NAME = "initial.safetensors"
FRAMES_NAME = "frames"
KEPT_NAME = "after-{:07d}.safetensors"  # the number of iterations done
SOURCE_NAME = "source.json"
_MOST_POINTS = 200


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def avg_var(step_lengths: Sequence[float]) -> float:
    """Avg_Var = E_t[|θ_t - θ_{t+1}|²], the mean squared step of an expert: small for a smooth trajectory (Tables I and VII).

    Args:
        step_lengths: |θ_t - θ_{t+1}|² of each epoch, see `dstill.experts.smooth.step_lengths`.

    Returns:
        Their mean.

    Example:
        >>> avg_var([4.0, 1.0, 1.0])
        2.0
    """
    return sum(step_lengths) / len(step_lengths)


class ExpertCurves(_Record):
    """Means over the experts of a run, by epoch.

    Attributes:
        count: number of experts.
        accuracy: accuracy on the test images, in [0, 1]; a diagnostic that nothing chooses by.
        step_lengths: |θ_t - θ_{t+1}|².
    """

    count: int
    accuracy: tuple[float, ...]
    step_lengths: tuple[float, ...]

    @property
    def avg_var(self) -> float:
        """Avg_Var, the mean of `step_lengths`."""
        return avg_var(self.step_lengths)

    @classmethod
    def of(cls, curves: dict[str, list[list[float]]]) -> ExpertCurves:
        """From the result of `Trajectories.curves`."""
        return cls(
            count=len(curves["accuracy"]), accuracy=_means(curves["accuracy"]), step_lengths=_means(curves["step_lengths"])
        )


class Curve(_Record):
    """Values over iterations. A long curve is shortened to means over neighbouring iterations."""

    iterations: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, iteration: float) -> float:
        """The value at an iteration, by linear interpolation."""
        return float(np.interp(iteration, self.iterations, self.values))

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]], key: str, most: int = _MOST_POINTS) -> Curve | None:
        """The curve of one column of the metrics; None if no row has a finite value in it.

        Args:
            rows: rows of `metrics.jsonl`.
            key: the column.
            most: most points of the curve.
        """
        points = [(row["iteration"] + 1, row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
        if not points:
            return None
        size = -(-len(points) // most)
        groups = [points[i : i + size] for i in range(0, len(points), size)]
        means = [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]
        return cls(iterations=tuple(mean[0] for mean in means), values=tuple(mean[1] for mean in means))


class DataSource(_Record):
    """How the real data of a run were read: the arguments of `load_real`, and nothing else, since a page writes them into code.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     DataSource.of({"source": "cifar10", "image_size": 16}).save(Path(folder))
        ...     DataSource.load(Path(folder)).arguments()
        {'source': 'cifar10', 'image_size': 16}
    """

    source: str
    image_size: int | None = None
    fit: str | None = None
    train_fraction: float = 1.0
    classes: tuple[str, ...] | None = None
    test_fraction: float | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    class_names: tuple[str, ...] | None = None
    skip_damaged: bool = False
    seed: int = 0

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> DataSource:
        """From arguments of `load_real`. A path stays as it was given, but for the home folder, which names the user.

        Raises:
            ValueError: `load_real` has no such argument, or it does not take this value.
        """
        return cls.model_validate({**arguments, "source": from_home(str(arguments.get("source", "")))})

    @classmethod
    def load(cls, folder: Path) -> DataSource | None:
        """From the folder of a set; None if it does not say.

        Raises:
            DamagedFileError: the file says something else.
        """
        path = folder / SOURCE_NAME
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError as error:
            raise DamagedFileError(f"{path} is damaged: remove it ({error})") from error

    def save(self, folder: Path) -> None:
        """Stores it in the folder of a set."""
        write_text(folder / SOURCE_NAME, json.dumps(self.arguments()) + "\n")

    def arguments(self) -> dict[str, Any]:
        """The arguments that were given."""
        return self.model_dump(exclude_unset=True)


class SetRecord(_Record):
    """How one set was distilled.

    Attributes:
        curves: curves by the name of the metric.
        seconds: time since the start of the distillation, by iteration.
        inner_loss: mean of the student's loss at the start of a segment, by start epoch (Fig. 3).
        iterations: number of logged iterations.
        skipped: number of steps that the guard skipped.
    """

    curves: dict[str, Curve]
    seconds: Curve | None
    inner_loss: dict[int, float]
    iterations: int
    skipped: int

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]], own: Iterable[str] = ()) -> SetRecord:
        """From the rows of `metrics.jsonl`; `own` are the metrics that the method wants to be drawn."""
        keys = dict.fromkeys(("loss", "alpha", "validation_accuracy", "inner_loss_first", *own))
        curves = {key: curve for key in keys if (curve := Curve.of(rows, key))}
        passed, timed = 0.0, list[dict[str, Any]]()
        by_start: dict[int, list[float]] = {}
        for row in rows:
            passed += row["seconds"]
            timed.append({"iteration": row["iteration"], "seconds": passed})
            if "start_epoch" in row and row["inner_loss_first"] is not None:
                by_start.setdefault(int(row["start_epoch"]), []).append(row["inner_loss_first"])
        return cls(
            curves=curves,
            seconds=Curve.of(timed, "seconds"),
            inner_loss={epoch: sum(losses) / len(losses) for epoch, losses in sorted(by_start.items())},
            iterations=len(rows),
            skipped=int(rows[-1].get("skipped", 0)) if rows else 0,
        )


class RunRecord(_Record):
    """The settings of a run, its result, and its curves.

    Attributes:
        recipe: the resolved settings; empty if no set was finished.
        result: the result; None if the run failed.
        reason: why the run failed; empty if it did not.
        collapsed: whether it failed with a `CollapseError`, which another attempt would not change.
        experts: curves of the experts, for methods that have experts.
        sets: one record for each distilled set.
        cost: cost of the first set.
        map: the result of `dstill.methods.initialisation.initialisation_map`; empty for other initialisations.
    """

    recipe: dict[str, Any]
    result: Result | None
    reason: str = ""
    collapsed: bool = False
    experts: ExpertCurves | None = None
    sets: tuple[SetRecord, ...] = ()
    cost: Cost | None = None
    map: tuple[dict[str, Any], ...] = ()

    @classmethod
    def read(cls, folder: Path, most: int | None = None, error: Exception | None = None) -> RunRecord:
        """Reads the record from a folder. Files that are missing are left out.

        Args:
            folder: the folder of a run, or of a single set.
            most: read only the first `most` sets; if left out, as many as the result says.
            error: the error that ended the run. A result in the folder is then that of an earlier run, and is ignored.

        Raises:
            DstillError: a file is damaged.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = Path(folder, METRICS_NAME).write_text('{"iteration": 0, "loss": 2.0, "seconds": 0.5}\\n')
            ...     record = RunRecord.read(Path(folder))
            >>> record.sets[0].curves["loss"].values, record.result
            ((2.0,), None)
        """
        try:
            return cls._read(folder, most, error)
        except DstillError:
            raise
        except (OSError, ValueError, KeyError, TypeError, IndexError) as damage:
            raise DstillError(f"a file of the run {folder} is damaged: {damage}") from damage

    def pooled(self, records: Sequence[RunRecord]) -> RunRecord:
        """This record with the results and sets of all `records`, which are runs that differ only in their seed."""
        results = [record.result for record in records if record.result]
        together = {
            "result": Result.pooled(results) if results else None,
            "reason": "; ".join(record.reason for record in records if record.reason),
            "collapsed": any(record.collapsed for record in records),
            "sets": tuple(one for record in records for one in record.sets),
        }
        return self.model_copy(update=together)

    @classmethod
    def _read(cls, folder: Path, most: int | None, error: Exception | None) -> RunRecord:
        finished = folder / RESULT_NAME
        result = Result.load(finished) if finished.exists() and error is None else None
        if most is None and result is not None:
            most = result.sets  # an earlier run may have left more in the folder
        sets = sorted(folder.glob("set-*"), key=lambda path: int(path.name.split("-")[1]))[:most] or [folder]
        first = sets[0]
        settings, experts, chosen = (first / name for name in (RECIPE_NAME, EXPERTS_NAME, MAP_NAME))
        metrics = [rows for one in sets if (rows := read_metrics(one / METRICS_NAME))]
        recipe = yamls.read_mapping(settings) if settings.exists() else {}
        own = curve_titles(str(recipe.get("method", "")))
        return cls(
            recipe=recipe,
            result=result,
            reason=reason_of(error) if error else "",
            collapsed=isinstance(error, CollapseError),
            experts=ExpertCurves.of(json.loads(experts.read_text(encoding="utf-8"))) if experts.exists() else None,
            sets=tuple(SetRecord.of(rows, own) for rows in metrics),
            cost=Cost.load(first),
            map=tuple(json.loads(chosen.read_text(encoding="utf-8"))) if chosen.exists() else (),
        )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a `metrics.jsonl`; an empty list if there is no such file.

    Raises:
        DamagedFileError: a line is damaged.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [dict(json.loads(line)) for line in lines[:-1] if line]
    except (ValueError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged ({error}): remove the line or the folder") from error


def _means(columns: Sequence[Sequence[float]]) -> tuple[float, ...]:
    return tuple(sum(values) / len(values) for values in zip(*columns, strict=True))
