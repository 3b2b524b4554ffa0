"""The table, figure and page of a reproduction, made only from what its runs recorded."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dstill.artifacts.record import RunRecord
from dstill.artifacts.result import Score
from dstill.config.recipes import DERIVED
from dstill.errors import DstillError
from dstill.reproductions.looking import Looks
from dstill.reproductions.spec import Case, Measure, Reproduction, Row, ScaleName
from dstill.support.console import duration
from dstill.support.tables import markdown

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
    "chosen": "chosen on validation %",
    "averaged": "averaged images %",
    "best_look": "best look of the second half at the test images % (a diagnostic, no result)",
    "predicted": "the same as predicted %",
    "spread": "spread of networks, of images, points",
    "inflation": "best of 50 looks above the mean (above its own set), points: one network each, five",
}


class Entry(BaseModel):
    """One set of a row and case, with the run that made it.

    Attributes:
        row: name of the row.
        case: name of the case.
        set: number of the set, from 0; its seed is the reproduction's plus this number.
        request: what the numbers depend on, see `dstill.api.apart.request`.
        record: record of the run.
        following: see `dstill.reproductions.following.accumulated_error`.
        looks: what the sets on the way reach, if they were kept.
        picture: file name of the picture of the distilled images, beside this file.
        environment: the machine and software of the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    row: str
    case: str
    set: int = 0
    request: dict[str, Any]
    record: RunRecord
    following: tuple[float, ...] = ()
    looks: Looks | None = None
    picture: str = ""
    environment: dict[str, str] = {}

    @classmethod
    def load(cls, path: Path) -> Entry:
        """Reads an entry that a reproduction wrote.

        Raises:
            DstillError: the file is not such an entry, or another version of dstill wrote it.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DstillError(f"{path} is damaged or from another version of dstill: remove it, or pass another -o") from error


class Sets:
    """The sets of one row of one case, at least one.

    Attributes:
        entries: one per set.
        first: the first set that was measured; if none was, the first.
        record: record of all sets together.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self.first = next((entry for entry in entries if entry.record.result), entries[0])
        self.record = self.first.record.pooled([entry.record for entry in entries])

    def accuracies(self) -> dict[int, float]:
        """Mean accuracy of each set that was measured, by its number."""
        return {e.set: e.record.result.accuracy.mean for e in self.entries if e.record.result}


Entries = Mapping[tuple[str, str], Sets]


def cell(measure: Measure, sets: Sets, first: Sets | None) -> str:
    """A measure as text; – if the row has none. Measures other than accuracies are those of one set."""
    record, result, experts = sets.first.record, sets.record.result, sets.record.experts
    match measure:
        case "accuracy" if result:
            return _accuracy(result.accuracy)
        case "difference" if result and first is not None and first is not sets:
            return paired_difference(sets, first)
        case "expert_accuracy" if experts:
            return f"{100 * experts.accuracy[-1]:.1f} ({_counted(experts.count, 'expert')})"
        case "avg_var" if experts:
            return f"{experts.avg_var:.3g}"
        case "accumulated_error" if sets.first.following:
            return f"{sets.first.following[-1]:.3g}"
        case "alpha" if record.sets and "alpha" in record.sets[0].curves:
            values = record.sets[0].curves["alpha"].values
            return f"{values[0]:.3g} → {values[-1]:.3g}"
        case "collapsed" if record.sets:
            return collapsed(sets)
        case "reached" if first is not None:
            return reached(record, first.first.record)
        case "seconds" if record.cost and record.sets:
            return f"{seconds(record, first.first.record if first else None):.2f}"
        case "peak" if record.cost and record.cost.peak_bytes is not None:
            return f"{record.cost.peak_bytes / 2**20:.0f}"
        case "chosen" | "averaged" | "best_look" | "predicted" | "spread" | "inflation":
            return looked(measure, [entry.looks for entry in sets.entries if entry.looks])
    return "–"


def looked(measure: Measure, looks: Sequence[Looks]) -> str:
    """What the looks of the sets of a row say; – if nobody looked."""
    if not looks:
        return "–"
    spreads = [one.spread for one in looks]
    match measure:
        case "chosen":
            return _accuracy(Score.pooled([one.chosen for one in looks]))
        case "averaged":
            return _accuracy(Score.pooled([one.averaged for one in looks]))
        case "best_look":
            return _percent([one.best for one in looks])
        case "predicted":
            return _percent([one.predicted for one in looks])
        case _ if len(looks[0].each[0].test) == 1:
            return "–"  # a look of one network does not tell the two kinds of scatter apart
        case "spread":
            return f"{_points(s.networks for s in spreads)}, {_points(s.images for s in spreads)}"
        case _:
            return ", ".join(
                f"+{_points(s.best_of(50, networks) - s.mean for s in spreads)} "
                f"({_points(s.illusion_of(50, networks) for s in spreads)})"
                for networks in (1, 5)
            )


def _points(deviations: Iterable[float]) -> str:
    """One deviation for several sets, the root of the mean of their squares, in points."""
    return f"{100 * math.sqrt(statistics.fmean(value * value for value in deviations)):.1f}"


def _percent(values: Sequence[float]) -> str:
    """The mean over the sets; with several sets, also the spread between them."""
    spread = f" ± {100 * statistics.stdev(values):.1f} between sets" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _accuracy(score: Score) -> str:
    """The mean over all networks of all sets; with several sets, also the spread between their means."""
    between = "" if score.between_sets is None else f"; ± {100 * score.between_sets:.1f} between sets"
    return f"{score.percent} (n = {score.n}{between})"


def collapsed(sets: Sets) -> str:
    """After how many iterations sets collapsed; with several sets, also how many did."""
    lost = [entry.record.sets[0].iterations for entry in sets.entries if entry.record.collapsed]
    if not lost:
        return "no"
    share = f"{len(lost)} of {len(sets.entries)} sets, " if len(sets.entries) > 1 else ""
    return f"{share}after {', '.join(map(str, lost))} iterations"


def seconds(record: RunRecord, first: RunRecord | None) -> float:
    """Mean time per iteration, scaled to the first row's number of student steps if this row takes fewer."""
    cost, steps = record.cost, record.recipe.get("distill", {}).get("student_steps")
    assert cost is not None
    wanted = first.recipe.get("distill", {}).get("student_steps") if first else None
    return cost.seconds / record.sets[0].iterations * (wanted / steps if wanted and steps else 1.0)


def reached(record: RunRecord, first: RunRecord) -> str:
    """When the row's first set reached the first row's last validation accuracy (Fig. 6)."""
    if not record.sets or not first.sets:
        return "–"
    one, other = record.sets[0], first.sets[0]
    ours, theirs = (each.curves.get("validation_accuracy") for each in (one, other))
    if ours is None or theirs is None or one.seconds is None:
        return "–"
    goal = theirs.values[-1]
    when = next((i for i, value in zip(ours.iterations, ours.values, strict=True) if value >= goal), None)
    return "never" if when is None else f"{when:,.0f} iterations, {one.seconds.at(when):,.0f} s"


def paired_difference(sets: Sets, first: Sets) -> str:
    """Mean difference over the sets that both rows have, in points, with its standard error. Pairs share their seed."""
    ours, theirs = sets.accuracies(), first.accuracies()
    gains = [100 * (ours[k] - theirs[k]) for k in sorted(ours.keys() & theirs.keys())]
    if not gains:
        return "–"
    error = f" ± {statistics.stdev(gains) / math.sqrt(len(gains)):.1f}" if len(gains) > 1 else ""
    return f"{statistics.fmean(gains):+.1f}{error} (n = {len(gains)})"


def table(
    measures: Sequence[Measure], nets: Sequence[str], rows: Sequence[Row], case: Case, entries: Entries, judged_on: str = "test"
) -> list[list[str]]:
    """Heading and rows of one case, with the published figures of another case if the paper has none for this one."""
    headings = HEADINGS | ({"accuracy": "validation accuracy %"} if judged_on == "validation" else {})
    where = published_case(rows, case)
    suffix = "" if where == case.name else f" ({where})"
    published = {row.name: row.published.get(where, {}) for row in rows}
    columns: list[tuple[str, Measure | str, bool]] = []
    for key in (*measures, *nets):
        columns.append((headings.get(key, key), key, False))  # type: ignore[call-overload]
        if any(key in values for values in published.values()):
            columns.append((f"{key}, published{suffix}" if key in nets else f"published{suffix}", key, True))
    lines = [["", *(heading for heading, _, _ in columns)]]
    first = entries.get((rows[0].name, case.name))
    for row in rows:
        sets, texts = entries.get((row.name, case.name)), []
        for _, key, other in columns:
            if other:
                value = published[row.name].get(key)
                texts.append("–" if value is None else f"{value:g}")
            elif sets is None:
                texts.append("pending")
            elif key in nets:
                score = sets.record.result.nets.get(key) if sets.record.result else None
                texts.append(_accuracy(score) if score else "–")
            else:
                texts.append(cell(key, sets, first))  # type: ignore[arg-type]
        lines.append([row.title, *texts])
    return lines


def published_case(rows: Sequence[Row], case: Case) -> str:
    """The case whose published figures are shown beside ours: this one, or the paper's first if the paper lacks it."""
    named = [name for row in rows for name in row.published]
    return next(iter(named), case.name) if case.name not in named else case.name


def verdict(rows: Sequence[Row], case: Case, entries: Entries) -> str:
    """A sentence that compares our accuracies with the published ones; empty if nothing can be compared.

    The order of two rows is looked at only within a family, see `Result.family`: the others store different things.
    """
    where = published_case(rows, case)
    pairs, lost = [], 0
    for row in rows:
        sets, theirs = entries.get((row.name, case.name)), row.published.get(where, {}).get("accuracy")
        if sets is None or theirs is None:
            continue
        if sets.record.result:
            pairs.append((100 * sets.record.result.accuracy.mean, theirs, sets.record.result.family))
        else:
            lost += 1
    sentences = []
    if where == case.name and pairs:
        gaps = [ours - theirs for ours, theirs, _ in pairs]
        sentences.append(f"Ours are {_range(gaps)} points from the published figures, {_about(rows, case, entries)}.")
    alike = [(a, b) for a, b in itertools.combinations(pairs, 2) if a[2] == b[2] and a[1] != b[1]]
    orders = [(a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in alike]
    if orders:
        of_one = " of one family" if len({family for *_, family in pairs}) > 1 else ""
        sentences.append(f"Of {_counted(len(orders), 'pair')} of rows{of_one}, {sum(orders)} in the published order.")
    if lost:
        sentences.append(f"{_counted(lost, 'row')} failed and cannot be compared.")
    return " ".join(sentences)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:+.1f}" if round(low, 1) == round(high, 1) else f"{low:+.1f} to {high:+.1f}"


def _about(rows: Sequence[Row], case: Case, entries: Entries) -> str:
    """The budget of our runs, as text."""
    there = [sets.first.record for row in rows if (sets := entries.get((row.name, case.name)))]
    done = [record for record in there if record.result and record.sets]
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
    asker = "The paper" if reproduction.paper else "The question"
    parts = [f"# {reproduction.heading}", f"{asker}: {reproduction.claim}"]
    parts += [f"Scale `{scale}`: {settings.says}. {settings.remark}".rstrip()]
    for case in settings.cases:
        parts += [f"## {case}"] if len(settings.cases) > 1 else []
        parts += [markdown(table(reproduction.measures, settings.nets, rows, case, entries, settings.judged_on))]
        parts += [verdict(rows, case, entries)] if scale != "smoke" and "accuracy" in reproduction.measures else []
    every = [entry for sets in entries.values() for entry in sets.entries]
    parts += ["\n".join(_failure(entry) for entry in every if entry.record.reason)]
    parts += ["\n".join(_derived(entry) for entry in every if not entry.set and _note(entry).startswith(DERIVED))]
    parts += [f"![{reproduction.title}]({figure})" for figure in figures]
    parts.append(f"```console\n$ dstill reproduce {what} --scale {scale}\n```")
    spent = sum(_spent(entry.record) for entry in every)
    machines = sorted({f"{entry.environment['processor']}, torch {entry.environment['torch']}" for entry in every})
    parts += [f"Distilling took {duration(spent)} in all; {'; '.join(machines)}."] if machines else []
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def _spent(record: RunRecord) -> float:
    """Seconds of distilling, including those of a set that collapsed."""
    if record.cost:
        return record.cost.seconds
    return sum(one.seconds.values[-1] for one in record.sets if one.seconds)


def _note(entry: Entry) -> str:
    return str(entry.record.recipe.get("note", ""))


def _derived(entry: Entry) -> str:
    return f"- `{entry.row}`, {entry.case}: no recipe was written for this case; its settings are {_note(entry)}"


def _failure(entry: Entry) -> str:
    return f"- `{entry.row}`{f', set {entry.set}' if entry.set else ''}: {entry.record.reason}"
