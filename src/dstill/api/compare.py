"""`compare` runs several methods, or reuses their runs, under one protocol, and puts them in one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dstill.api import findings
from dstill.api.apart import request, run_apart
from dstill.api.rows import Hands
from dstill.artifacts.files import check_writable, write_text
from dstill.artifacts.result import Result
from dstill.config import recipes
from dstill.config.registry import method_info
from dstill.config.registry import methods as known_methods
from dstill.data.real import RealSet, Source, load_real
from dstill.errors import reason_of
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Budget, Changes, Choice, Evaluation, Executor, Machine, Recording, Seeds
from dstill.reporting.page import REPORT_NAME, report
from dstill.support.console import Progress
from dstill.support.plugins import name_of
from dstill.support.progress import Reporter
from dstill.support.tables import bulleted, latex, markdown
from dstill.support.workers import refuse_import

_KEYS = (
    *("method", "ipc", "labels", "parts", "family", "accuracy", "std", "n", "over_random", "of_whole"),
    *("seconds", "peak_bytes", "stored_bytes", "file_bytes", "reason"),
)


class Row(BaseModel):
    """One method at one IPC: its result, or the reason why there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    ipc: int
    result: Result | None
    reason: str = ""

    def cells(self) -> dict[str, Any]:
        """The cells of the row: accuracies in percent, sizes in bytes, times in seconds; None where there is none."""
        cells: dict[str, Any] = dict.fromkeys(_KEYS) | {"method": self.method, "ipc": self.ipc, "reason": self.reason}
        result = self.result
        if result is None:
            return cells
        accuracy, random, whole, cost = result.accuracy, result.random, result.whole, result.cost
        return cells | {
            "labels": result.labels,
            "parts": result.parts,
            "family": result.family,
            "accuracy": 100 * accuracy.mean,
            "std": 100 * accuracy.std if accuracy.n > 1 else None,
            "n": accuracy.n,
            "over_random": 100 * (accuracy.mean - random.mean) if random else None,
            "of_whole": 100 * accuracy.mean / whole.mean if whole else None,
            "seconds": cost.seconds if cost else None,
            "peak_bytes": cost.peak_bytes if cost else None,
            "stored_bytes": result.stored_bytes,
            "file_bytes": result.file_bytes,
        }


# The part of `Row.cells` that a printed table shows. The family is that of `Result.family`: rows of different families store
# different things, so that their accuracies make no ranking.
COLUMNS = {
    "method": "method",
    "ipc": "IPC",
    "family": "family",
    "accuracy": "accuracy %",
    "n": "n",
    "over_random": "over random",
    "of_whole": "% of whole",
    "seconds": "seconds",
    "peak_bytes": "peak MiB",
    "stored_bytes": "stored KiB",
    "file_bytes": "file KiB",
    "reason": "failed because",
}
LEFT = ("method", "family", "failed because")


class Comparison(BaseModel):
    """The rows of a comparison, in the order they were asked for. They are not ranked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    protocol: str
    rows: tuple[Row, ...]

    def texts(self) -> list[list[str]]:
        """The table as text: the names of the columns, then each row. Reasons have a column if there are any."""
        keys = [key for key in COLUMNS if key != "reason" or any(row.reason for row in self.rows)]
        rows = [row.cells() for row in self.rows]
        return [[COLUMNS[key] for key in keys], *([_text(key, cells) for key in keys] for cells in rows)]

    @property
    def findings(self) -> list[str]:
        """Which row is ahead at equal bytes, and which at equal time, in sentences."""
        return findings.of_comparison(self.rows)

    def markdown(self) -> str:
        """The table in Markdown, and the findings beneath it."""
        return markdown(self.texts(), LEFT) + bulleted(self.findings)

    def latex(self) -> str:
        """The table as a LaTeX `tabular`."""
        return latex(self.texts(), LEFT)

    def csv(self) -> str:
        """The table with full precision, comma-separated, under the names of `Row.cells`."""
        text = io.StringIO()
        writer = csv.DictWriter(text, _KEYS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.cells() for row in self.rows)
        return text.getvalue()

    def save(self, folder: Path) -> None:
        """Writes `compare.json`, `compare.md`, `compare.csv` and `compare.tex`."""
        write_text(folder / "compare.json", self.model_dump_json(indent=2) + "\n")
        write_text(folder / "compare.md", self.markdown())
        write_text(folder / "compare.csv", self.csv())
        write_text(folder / "compare.tex", self.latex())


_SCALES = {"peak_bytes": 2**20, "stored_bytes": 2**10, "file_bytes": 2**10}


def _text(key: str, cells: dict[str, Any]) -> str:
    value = cells[key]
    if value is None:
        return "–"
    match key:
        case "accuracy":
            return f"{value:.1f}" + ("" if cells["std"] is None else f" ± {cells['std']:.1f}")
        case "over_random":
            return f"{value:+.1f}"
        case "of_whole" | "seconds" | "peak_bytes" | "stored_bytes" | "file_bytes":
            return f"{value / _SCALES.get(key, 1):.1f}"
    return str(value)


def compare(
    source: Source,
    *,
    methods: Sequence[str | type[Any]] = (),
    ipc: int | Sequence[int] = 1,
    recipe: str | None = None,
    changes: Changes = (),
    protocol: str = "ast",
    sets: int = 1,
    networks: int | None = None,
    whole: bool | None = None,
    minutes: float | Budget | None = None,
    out: str | Path | None = None,
    seed: int = 0,
    checkpoint_every: int = 25,
    machine: Machine = Machine(),
    executor: str | Executor | None = None,
    progress: Progress = None,
) -> Comparison:
    """Runs several methods on one data set and puts them in one table. After an interruption, the same call resumes.

    Each row is a separate run in its own process. Under torchrun, its processes share the rows. What rows share is made once:
    experts, trained networks, random images, and the whole training set. If a row fails, the table gives the reason, and the
    others continue.

    Each process imports the script that calls this: keep the call under `if __name__ == "__main__":`.

    Args:
        source: the real data, see `load_real`.
        methods: names of `dstill ls methods`, or classes; all registered methods if left out.
        ipc: images per class: one number, or several; one row per method and number.
        recipe: `smoke` for runs of seconds; left out: each method's own recipe.
        changes: changes to the recipe of every row, such as `{"net.width": 32}`; see `run`.
        protocol: evaluation protocol of every row, whatever the recipes say.
        sets: synthetic sets per row.
        networks: fresh networks per set; the protocol's number if left out.
        whole: also measure the whole training set; left out: yes, unless there is a budget.
        minutes: time of the whole table if one row follows another, shared equally by its rows. Each row then chooses what is
            not set to fit, see `run`.
        out: folder of the tables and of a run folder for each row; `runs/<data>-compare-seed<s>` if left out.
        seed: determines everything random.
        checkpoint_every: store the state every so many iterations; 0 for never.
        machine: where the work is done.
        executor: `slurm` or `local` makes each row a job, see `Executor`; left out: one row after another, in this call.
        progress: whether progress is shown.

    Returns:
        The table.

    Raises:
        DstillError: a method or the protocol is unknown. An error within a row is only recorded in the row.

    Example:
        >>> import dstill
        >>> once = {"recipe": "smoke", "protocol": "quick", "networks": 1, "whole": False, "progress": False}
        >>> table = dstill.compare("digits", methods=["random"], **once)
        >>> [(row.method, row.ipc, row.reason) for row in table.rows]
        [('random', 1, '')]
    """
    refuse_import("compare")
    place = Workplace.of(machine, progress)
    real = load_real(source, progress=place.reporter)
    load_protocol(protocol)
    paths = {name: info.path for name, info in known_methods().items()}
    chosen = list(dict.fromkeys(name_of(method, paths, "method") for method in methods)) or list(paths)
    for name in chosen:
        method_info(name)
    folder = Path(out) if out else Path("runs") / f"{real.name}-compare-seed{seed}"
    check_writable(folder)
    budget, asked = Budget.of(minutes), list(dict.fromkeys([ipc] if isinstance(ipc, int) else ipc))
    whole = budget is None if whole is None else whole
    hands = Hands.of(executor, machine, place, folder)
    where = folder.absolute() if hands.away else folder
    options: dict[str, Any] = {"sets": sets, "networks": networks, "whole": whole, "seed": seed}
    share = None if budget is None else budget.minutes / (len(asked) * len(chosen))
    if share is not None:
        options["minutes"] = share
    assignments = [*recipes.assignments(changes), f"protocol={protocol}"]
    task = Task(sets, Evaluation(networks=networks, whole=whole), Recording(checkpoint_every=checkpoint_every))
    work = _Work(real, recipe, tuple(assignments), Seeds.of(seed), where, task, share, options)
    choices = {f"{name}-ipc{images}": (name, images) for images in asked for name in chosen}
    table = _Table(real.name, protocol, choices, folder, place.reporter)
    hands.give(work, choices, table.ended, [folder])
    finished = [folder / _row_name(row.method, row.ipc) for row in table.comparison.rows if row.result]
    if finished:
        place.reporter.note(f"report: {report(finished, folder / REPORT_NAME)}")
    return table.comparison


class _Table:
    """The table, stored anew whenever a row has ended.

    Args:
        data: name of the real data.
        protocol: evaluation protocol of every row.
        choices: method and images per class of each row, by its title, in the order of the table.
        folder: folder of the tables.
        reporter: is told of rows that fail.
    """

    def __init__(
        self, data: str, protocol: str, choices: Mapping[str, tuple[str, int]], folder: Path, reporter: Reporter
    ) -> None:
        self.data, self.protocol, self.choices, self.folder, self.reporter = data, protocol, choices, folder, reporter
        self.rows: dict[str, Row] = {}

    def ended(self, title: str, outcome: Result | Exception) -> None:
        """Adds a row: its result, or the reason why there is none."""
        method, ipc = self.choices[title]
        if isinstance(outcome, Exception):
            self.rows[title] = Row(method=method, ipc=ipc, result=None, reason=reason_of(outcome))
            self.reporter.note(f"{method} failed: {reason_of(outcome)}")
        else:
            self.rows[title] = Row(method=method, ipc=ipc, result=outcome)
        self.comparison.save(self.folder)

    @property
    def comparison(self) -> Comparison:
        """The rows so far."""
        there = tuple(self.rows[title] for title in self.choices if title in self.rows)
        return Comparison(data=self.data, protocol=self.protocol, rows=there)


def _row_name(method: str, ipc: int) -> str:
    return f"{method.rpartition(':')[2]}-ipc{ipc}"


@dataclass(frozen=True)
class _Work:
    """Makes rows: what all of them have in common.

    Attributes:
        real: the real data.
        recipe: as of `compare`.
        changes: changes to the recipe of every row.
        seeds: seeds of images and experts.
        folder: folder of the run folders.
        task: what is done with each job.
        minutes: time of a row; None without a limit.
        options: what a request contains beside the recipe and the data.
    """

    real: RealSet
    recipe: str | None
    changes: tuple[str, ...]
    seeds: Seeds
    folder: Path
    task: Task
    minutes: float | None
    options: dict[str, Any]

    def __call__(self, row: tuple[str, int], place: Workplace) -> Result:
        """Runs one method, or reads the result of a finished run of the same request."""
        method, ipc = row
        job = Job.resolve(self.real, Choice(method, ipc, self.recipe, changes=self.changes), self.seeds, place)
        task = replace(self.task, budget=Budget.of(self.minutes))  # the time of a row begins here, on this machine
        return run_apart(job, self.folder / _row_name(method, ipc), task, request(job, self.options))
