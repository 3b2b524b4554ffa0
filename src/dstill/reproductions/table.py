"""A reproduction's table, figure and page from what its runs recorded; no private numbers."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dstill.artifacts.run import RunRecord
from dstill.console import duration
from dstill.errors import DstillError
from dstill.reproductions import Case, Measure, Reproduction, Row, ScaleName
from dstill.tables import markdown

HEADINGS: dict[Measure, str] = {
    "accuracy": "accuracy %",
    "difference": "difference to the first row, points",
    "expert_accuracy": "expert accuracy %",
    "avg_var": "Avg_Var",
    "accumulated_error": "accumulated error",
    "alpha": "α, first to last",
    "collapsed": "collapsed",
    "reached": "to the first row's last validation accuracy",
    "seconds": "seconds an iteration",
    "peak": "peak MiB",
}


class Entry(BaseModel):
    """One row of one case: the run it stands on.

    Attributes:
        row: its name.
        case: its case's name.
        request: what decided the numbers, see `dstill.running.request`.
        record: of the run.
        following: see `dstill.evaluation.following.accumulated_error`.
        picture: file name of the distilled images beside this file.
        environment: what it ran on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: str
    case: str
    request: dict[str, Any]
    record: RunRecord
    following: tuple[float, ...] = ()
    picture: str = ""
    environment: dict[str, str] = {}

    @classmethod
    def load(cls, path: Path) -> Entry:
        """Reads what a reproduction wrote.

        Raises:
            DstillError: it is not that, or another version of dstill wrote it.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DstillError(f"{path} is damaged or of another version of dstill: remove it, or pass another -o") from error


Entries = Mapping[tuple[str, str], Entry]


def cell(measure: Measure, entry: Entry, first: Entry | None) -> str:
    """A measure as text, – where the run has none."""
    record = entry.record
    result, experts = record.result, record.experts
    match measure:
        case "accuracy" if result:
            return f"{100 * result.accuracy.mean:.1f} ± {100 * result.accuracy.std:.1f} (n = {result.accuracy.n})"
        case "difference" if result and first is not None and first is not entry:
            return paired_difference(entry, first)
        case "expert_accuracy" if experts:
            return f"{100 * experts.accuracy[-1]:.1f} ({experts.count} experts)"
        case "avg_var" if experts:
            return f"{experts.avg_var:.3g}"
        case "accumulated_error" if entry.following:
            return f"{entry.following[-1]:.3g}"
        case "alpha" if record.sets and "alpha" in record.sets[0].curves:
            values = record.sets[0].curves["alpha"].values
            return f"{values[0]:.3g} → {values[-1]:.3g}"
        case "collapsed" if record.sets:
            return f"after {record.sets[0].iterations} iterations" if record.collapsed else "no"
        case "reached" if first is not None:
            return reached(entry, first)
        case "seconds" if record.cost and record.sets:
            return f"{seconds(entry, first):.2f}"
        case "peak" if record.cost and record.cost.peak_bytes is not None:
            return f"{record.cost.peak_bytes / 2**20:.0f}"
    return "–"


def seconds(entry: Entry, first: Entry | None) -> float:
    """Mean time of an iteration, brought to as many student steps as the first row's where the row takes fewer."""
    cost, steps = entry.record.cost, entry.record.recipe.get("distill", {}).get("student_steps")
    assert cost is not None
    wanted = first.record.recipe.get("distill", {}).get("student_steps") if first else None
    return cost.seconds / entry.record.sets[0].iterations * (wanted / steps if wanted and steps else 1.0)


def reached(entry: Entry, first: Entry) -> str:
    """When the first set's validation accuracy was first as high as the first row's after its last iteration (Fig. 6)."""
    if not entry.record.sets or not first.record.sets:
        return "–"
    one, other = entry.record.sets[0], first.record.sets[0]
    ours, theirs = (each.curves.get("validation_accuracy") for each in (one, other))
    if ours is None or theirs is None or one.seconds is None:
        return "–"
    goal = theirs.values[-1]
    when = next((i for i, value in zip(ours.iterations, ours.values, strict=True) if value >= goal), None)
    return "never" if when is None else f"{when:,.0f} iterations, {one.seconds.at(when):,.0f} s"


def by_set(entry: Entry) -> list[float]:
    """Mean accuracy of each set."""
    result = entry.record.result
    assert result is not None
    size = len(result.accuracy.values) // result.sets
    return [statistics.fmean(result.accuracy.values[i * size : (i + 1) * size]) for i in range(result.sets)]


def paired_difference(entry: Entry, first: Entry) -> str:
    """Mean over sets of the same seed, in points, with its standard error."""
    if first.record.result is None:
        return "–"
    gains = [100 * (a - b) for a, b in zip(by_set(entry), by_set(first), strict=False)]
    error = f" ± {statistics.stdev(gains) / math.sqrt(len(gains)):.1f}" if len(gains) > 1 else ""
    return f"{statistics.fmean(gains):+.1f}{error} (n = {len(gains)})"


def table(
    measures: Sequence[Measure], nets: Sequence[str], rows: Sequence[Row], case: Case, entries: Entries
) -> list[list[str]]:
    """Heading and rows of one case; published figures of other cases where the paper has none for this one."""
    published = {row.name: _published(row, case) for row in rows}
    columns: list[tuple[str, Measure | str, bool]] = []
    for measure in measures:
        columns.append((HEADINGS[measure], measure, False))
        where = next((w for w, values in published.values() if measure in values), None)
        if where is not None:
            columns.append((f"published{'' if where == case.name else f' ({where})'}", measure, True))
    for net in nets:
        columns += [(net, net, False)]
        if any(net in values for _, values in published.values()):
            columns += [(f"{net}, published", net, True)]
    lines = [["", *(heading for heading, _, _ in columns)]]
    first = entries.get((rows[0].name, case.name))
    for row in rows:
        entry, texts = entries.get((row.name, case.name)), []
        for _, key, other in columns:
            if other:
                value = published[row.name][1].get(key)
                texts.append("–" if value is None else f"{value:g}")
            elif entry is None:
                texts.append("pending")
            elif key in nets:
                score = entry.record.result.nets.get(key) if entry.record.result else None
                texts.append(f"{100 * score.mean:.1f} ± {100 * score.std:.1f}" if score else "–")
            else:
                texts.append(cell(key, entry, first))  # type: ignore[arg-type]
        lines.append([row.title, *texts])
    return lines


def _published(row: Row, case: Case) -> tuple[str, Mapping[str, float]]:
    """The paper's figures for a case, else those of the first case that it has."""
    name = case.name if case.name in row.published else next(iter(row.published), case.name)
    return name, row.published.get(name, {})


def verdict(rows: Sequence[Row], case: Case, entries: Entries) -> str:
    """A sentence on how ours and the published accuracies compare; empty where nothing can be compared."""
    pairs = []
    for row in rows:
        entry, (where, values) = entries.get((row.name, case.name)), _published(row, case)
        if entry and entry.record.result and "accuracy" in values:
            pairs.append((100 * entry.record.result.accuracy.mean, values["accuracy"], where == case.name))
    if not pairs:
        return ""
    sentences = []
    gaps = [ours - theirs for ours, theirs, same in pairs if same]
    if gaps:
        sentences.append(f"Ours are {_range(gaps)} points from the published figures, {_about(rows, case, entries)}.")
    orders = [(a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in itertools.combinations(pairs, 2) if a[1] != b[1]]
    if orders:
        sentences.append(f"Of {len(orders)} pairs of rows, {sum(orders)} stand in the published order.")
    return " ".join(sentences)


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:+.1f}" if round(low, 1) == round(high, 1) else f"{low:+.1f} to {high:+.1f}"


def _about(rows: Sequence[Row], case: Case, entries: Entries) -> str:
    """The shares of the published budget, in words."""
    done = [entry.record for row in rows if (entry := entries.get((row.name, case.name))) and entry.record.sets]
    iterations = sorted({record.sets[0].iterations for record in done})
    experts = sorted({record.experts.count for record in done if record.experts})
    parts = [f"{_span(iterations)} iterations"] if iterations else []
    parts += [f"{_span(experts)} experts"] if experts else []
    return "with " + " and ".join(parts) if parts else "at the published settings"


def _span(values: Sequence[int]) -> str:
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"


def page(what: str, reproduction: Reproduction, scale: ScaleName, entries: Entries, figures: Sequence[str]) -> str:
    """The page of one reproduction at one scale, in Markdown."""
    settings, rows = reproduction.scales[scale], reproduction.rows_at(scale)
    parts = [f"# {reproduction.paper}: {reproduction.title}", f"Scale `{scale}`: {settings.says}. {settings.remark}".rstrip()]
    for case in settings.cases:
        parts += [f"## {case}"] if len(settings.cases) > 1 else []
        parts += [markdown(table(reproduction.measures, settings.nets, rows, case, entries))]
        parts += [verdict(rows, case, entries)] if scale != "smoke" else []
    failed = [(entry.row, entry.record.reason) for entry in entries.values() if entry.record.reason]
    parts += ["\n".join(f"- `{row}`: {reason}" for row, reason in failed)]
    parts += [f"![{reproduction.title}]({figure})" for figure in figures]
    parts.append(f"```console\n$ dstill reproduce {what} --scale {scale}\n```")
    costs = [entry.record.cost.seconds for entry in entries.values() if entry.record.cost]
    machines = sorted({f"{entry.environment['processor']}, torch {entry.environment['torch']}" for entry in entries.values()})
    parts += [f"Distilling took {duration(sum(costs))} in all; {'; '.join(machines)}."] if machines else []
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"
