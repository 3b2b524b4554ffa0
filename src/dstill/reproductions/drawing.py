"""Draws the figure of a reproduction from the sets that exist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dstill.reporting import figures
from dstill.reproductions.page import Entries
from dstill.reproductions.spec import Case, Reproduction, Row


def draw(reproduction: Reproduction, case: Case, rows: Sequence[Row], entries: Entries, folder: Path) -> list[str]:
    """Draws the figure of one case. Returns the names of the files."""
    there = [(row.title, entries[row.name, case.name]) for row in rows if (row.name, case.name) in entries]
    records = {title: sets.record for title, sets in there}
    stem = f"figure-{case.name}"
    if not there:
        return []
    match reproduction.figure:
        case "images":
            pictures = {title: folder / sets.entries[0].picture for title, sets in there if sets.entries[0].picture}
            if not pictures:
                return []
            figures.sheet(pictures, folder / f"{stem}.png")
        case "bars":
            scores = {name: record.result.accuracy for name, record in records.items() if record.result}
            values = {name: (100 * score.mean, 100 * score.std if score.n > 1 else None) for name, score in scores.items()}
            judged = {record.result.measured_on for record in records.values() if record.result}
            label = "validation accuracy %" if judged == {"validation"} else "accuracy %"
            figures.save(figures.bars(values, label), folder / f"{stem}.png")
        case "looks":
            looks = {title: [entry.looks.curve for entry in sets.entries if entry.looks] for title, sets in there}
            figures.save(figures.looks({title: curves for title, curves in looks.items() if curves}), folder / f"{stem}.png")
        case "experts":
            figures.save(figures.expert_curves(records), folder / f"{stem}.png")
        case "inner_loss":
            figures.save(figures.inner_loss(records), folder / f"{stem}.png")
        case "initialisation":
            figures.save(figures.initialisation(next(iter(records.values()))), folder / f"{stem}.png")
        case str(key):
            figures.save(figures.curves(records, key), folder / f"{stem}.png")
            if key == "validation_accuracy":
                figures.save(figures.curves(records, key, "seconds"), folder / f"{stem}-seconds.png")
                return [f"{stem}.png", f"{stem}-seconds.png"]
    return [f"{stem}.png"]
