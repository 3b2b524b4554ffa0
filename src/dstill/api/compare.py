"""The public function that puts methods side by side: each one run or reused, one protocol, one table."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dstill.api.apart import run_apart
from dstill.api.job import resolve_recipe
from dstill.artifacts.files import write_text
from dstill.artifacts.result import Result
from dstill.config.registry import method_info
from dstill.config.registry import methods as known_methods
from dstill.config.settings import Recipe
from dstill.data.real import RealSet, load_real
from dstill.errors import reason_of
from dstill.evaluation.protocols import load_protocol
from dstill.reporting.page import REPORT_NAME, report
from dstill.support.console import Reporter, Silent
from dstill.support.devices import resolve_device
from dstill.support.tables import latex, markdown
from dstill.support.workers import Workers, refuse_import

_KEYS = (
    *("method", "ipc", "labels", "accuracy", "std", "n", "over_random", "of_whole"),
    *("seconds", "peak_bytes", "stored_bytes", "reason"),
)


class Row(BaseModel):
    """One method at one IPC: its result, or why there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    ipc: int
    result: Result | None
    reason: str = ""

    def cells(self) -> dict[str, Any]:
        """What the table shows of the row, accuracies in percent, sizes in bytes and seconds; None where unknown."""
        cells: dict[str, Any] = dict.fromkeys(_KEYS) | {"method": self.method, "ipc": self.ipc, "reason": self.reason}
        result = self.result
        if result is None:
            return cells
        accuracy, random, whole, cost = result.accuracy, result.random, result.whole, result.cost
        return cells | {
            "labels": result.labels,
            "accuracy": 100 * accuracy.mean,
            "std": 100 * accuracy.std,
            "n": accuracy.n,
            "over_random": 100 * (accuracy.mean - random.mean) if random else None,
            "of_whole": 100 * accuracy.mean / whole.mean if whole else None,
            "seconds": cost.seconds if cost else None,
            "peak_bytes": cost.peak_bytes if cost else None,
            "stored_bytes": result.stored_bytes,
        }


# Of `Row.cells`, what a printed table shows.
COLUMNS = {
    "method": "method",
    "ipc": "IPC",
    "labels": "labels",
    "accuracy": "accuracy %",
    "n": "n",
    "over_random": "over random",
    "of_whole": "% of whole",
    "seconds": "seconds",
    "peak_bytes": "peak MiB",
    "stored_bytes": "stored KiB",
    "reason": "failed because",
}
LEFT = ("method", "labels", "failed because")


class Comparison(BaseModel):
    """The rows of a comparison, in the order they were asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: str
    protocol: str
    rows: tuple[Row, ...]

    def texts(self) -> list[list[str]]:
        """The table as text: the names of the columns, then the cells of each row. Reasons have a column if there are any."""
        keys = [key for key in COLUMNS if key != "reason" or any(row.reason for row in self.rows)]
        rows = [row.cells() for row in self.rows]
        return [[COLUMNS[key] for key in keys], *([_text(key, cells) for key in keys] for cells in rows)]

    def markdown(self) -> str:
        """The table in Markdown."""
        return markdown(self.texts(), LEFT)

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


_SCALES = {"peak_bytes": 2**20, "stored_bytes": 2**10}


def _text(key: str, cells: dict[str, Any]) -> str:
    value = cells[key]
    if value is None:
        return "–"
    match key:
        case "accuracy":
            return f"{value:.1f} ± {cells['std']:.1f}"
        case "over_random":
            return f"{value:+.1f}"
        case "of_whole" | "seconds" | "peak_bytes" | "stored_bytes":
            return f"{value / _SCALES.get(key, 1):.1f}"
    return str(value)


def compare(
    source: Any,
    *,
    methods: Sequence[str] = (),
    ipc: Sequence[int] = (1,),
    recipe: str | None = None,
    changes: Sequence[str] = (),
    out: str | Path | None = None,
    sets: int = 1,
    networks: int | None = None,
    protocol: str = "ast",
    whole: bool = True,
    checkpoint_every: int = 25,
    seed: int = 0,
    device: str = "auto",
    cache: str | Path | None = None,
    workers: Workers = 1,
    reporter: Reporter | None = None,
) -> Comparison:
    """Runs several methods on one data set and tabulates them. Interrupted, the same call continues where it stopped.

    Each row is a run of its own in a process of its own. Experts, trained networks, random images and the whole training
    set are worked out once for all rows that share them. A row that fails keeps its reason, and the others go on.

    Args:
        source: a `RealSet`, or anything `load_real` takes.
        methods: names of `dstill ls methods`; all of them if left out.
        ipc: images per class; one row for each method and each of these.
        recipe: `smoke` for runs of seconds; left out: each method's own recipe.
        changes: `section.key=value` assignments for every row, such as `net.width=32`.
        out: folder; `runs/<data>-compare-seed<s>` if left out. Holds the tables and a run folder for each row.
        sets: synthetic sets a row.
        networks: fresh networks a set; the protocol's number if left out.
        protocol: evaluation protocol of every row, whatever the recipes say.
        whole: also measure the whole training set.
        checkpoint_every: store the state every so many iterations; 0 for never.
        seed: decides everything random.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps what rows share.
        workers: processes that train experts and networks at once; `auto`: one a core where the work is worth it.
        reporter: receives progress.

    Raises:
        DstillError: a method or the protocol is unknown. What goes wrong in a row stays in the row.

    Each row's process imports the script that calls this: keep the call under `if __name__ == "__main__":`.
    """
    refuse_import("compare")
    reporter, where = reporter or Silent(), resolve_device(device)
    real = load_real(source)
    names = list(dict.fromkeys(methods)) or list(known_methods())
    for name in names:
        method_info(name)
    load_protocol(protocol)
    folder = Path(out) if out else Path("runs") / f"{real.name}-compare-seed{seed}"
    assignments = [*changes, f"protocol={protocol}"]
    options = {"sets": sets, "networks": networks, "whole": whole, "seed": seed}
    elsewhere = {"device": device, "cache": cache, "workers": workers, "checkpoint_every": checkpoint_every}
    table = Comparison(data=real.name, protocol=protocol, rows=())
    for images in dict.fromkeys(ipc):
        for name in names:
            resolve = functools.partial(resolve_recipe, real, recipe, name, images, None, assignments, where, reporter)
            row = _row(real, name, images, resolve, folder / f"{name}-ipc{images}", options, elsewhere, reporter)
            table = table.model_copy(update={"rows": (*table.rows, row)})
            table.save(folder)
    finished = [folder / f"{row.method}-ipc{row.ipc}" for row in table.rows if row.result]
    if finished:
        reporter.note(f"report: {report(finished, folder / REPORT_NAME)}")
    return table


def _row(
    real: RealSet,
    method: str,
    ipc: int,
    resolve: Callable[[], Recipe],
    folder: Path,
    options: dict[str, Any],
    elsewhere: dict[str, Any],
    reporter: Reporter,
) -> Row:
    """Runs one method, or reads the result of a finished run with the same request."""
    try:
        recipe = resolve()
        return Row(method=method, ipc=ipc, result=run_apart(real, recipe, folder, options, elsewhere, reporter))
    except Exception as error:  # whatever it is, it concerns this row alone
        reporter.note(f"{method} failed: {reason_of(error)}")
        return Row(method=method, ipc=ipc, result=None, reason=reason_of(error))
