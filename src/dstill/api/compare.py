"""`compare` runs several methods, or reuses their runs, under one protocol, and puts them in one table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dstill.api import findings
from dstill.api.apart import request, run_apart
from dstill.artifacts.files import check_writable, write_text
from dstill.artifacts.result import Result
from dstill.config import recipes
from dstill.config.registry import method_info
from dstill.config.registry import methods as known_methods
from dstill.data.real import RealSet, Source, load_real
from dstill.errors import reason_of
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Budget, Changes, Choice, Evaluation, Machine, Recording, Seeds
from dstill.reporting.page import REPORT_NAME, report
from dstill.support.console import Progress
from dstill.support.plugins import name_of
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
    progress: Progress = None,
) -> Comparison:
    """Runs several methods on one data set and puts them in one table. After an interruption, the same call resumes.

    Each row is a separate run in its own process. What rows share is made once: experts, trained networks, random images,
    and the whole training set. If a row fails, the table gives the reason, and the others continue.

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
        minutes: time of the whole table, shared equally by its rows. Each row then chooses what is not set to fit, see `run`.
        out: folder of the tables and of a run folder for each row; `runs/<data>-compare-seed<s>` if left out.
        seed: determines everything random.
        checkpoint_every: store the state every so many iterations; 0 for never.
        machine: where the work is done.
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
    task = Task(sets, Evaluation(networks=networks, whole=whole), Recording(checkpoint_every=checkpoint_every))
    options: dict[str, Any] = {"sets": sets, "networks": networks, "whole": whole, "seed": seed}
    if budget is not None:
        options["minutes"] = share = budget.minutes / (len(asked) * len(chosen))
    assignments = [*recipes.assignments(changes), f"protocol={protocol}"]
    table = Comparison(data=real.name, protocol=protocol, rows=())
    for images in asked:
        for name in chosen:
            if budget is not None:
                task = replace(task, budget=Budget.of(share))
            choice = Choice(name, images, recipe, changes=assignments)
            row = _row(real, choice, Seeds.of(seed), place, folder, task, options)
            table = table.model_copy(update={"rows": (*table.rows, row)})
            table.save(folder)
    finished = [_row_folder(folder, row.method, row.ipc) for row in table.rows if row.result]
    if finished:
        place.reporter.note(f"report: {report(finished, folder / REPORT_NAME)}")
    return table


def _row_folder(folder: Path, method: str, ipc: int) -> Path:
    return folder / f"{method.rpartition(':')[2]}-ipc{ipc}"


def _row(
    real: RealSet, choice: Choice, seeds: Seeds, place: Workplace, folder: Path, task: Task, options: dict[str, Any]
) -> Row:
    """Runs one method, or reads the result of a finished run of the same request."""
    method, ipc = str(choice.method), choice.ipc or 1
    try:
        job = Job.resolve(real, choice, seeds, place)
        result = run_apart(job, _row_folder(folder, method, ipc), task, request(job, options))
        return Row(method=method, ipc=ipc, result=result)
    except Exception as error:  # whatever went wrong, the other rows continue
        place.reporter.note(f"{method} failed: {reason_of(error)}")
        return Row(method=method, ipc=ipc, result=None, reason=reason_of(error))
