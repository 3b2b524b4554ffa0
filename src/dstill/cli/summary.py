"""The tables that commands print at the end."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dstill.api.compare import LEFT, Comparison
from dstill.api.judge import Judgement
from dstill.api.leaderboard import Leaderboard
from dstill.artifacts.result import Result
from dstill.planning.stages import Plan
from dstill.support.console import duration, printable, set_sizes, size

_PIPED = 140  # piped output has no width, and a truncated number would be wrong


def print_comparison(comparison: Comparison) -> None:
    """The rows of a comparison."""
    _print(comparison.texts(), LEFT, f"{comparison.data}, protocol {comparison.protocol}")
    _print_lines(comparison.findings)


def print_judgement(judgement: Judgement) -> None:
    """The rows of a judgement."""
    first = judgement.rows[0].result
    _print(judgement.texts(), ("network", "labels", "augmentation"), set_sizes(first.stored_bytes, first.file_bytes))
    _print_lines(judgement.findings)


def print_leaderboard(found: Leaderboard) -> None:
    """The scores of a set, and the accuracies behind them."""
    _print(found.texts(), ("",), found.title)
    _print_lines(found.notes)


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        Console(soft_wrap=True, highlight=False).print(printable(line), markup=False)


def _print(lines: Sequence[Sequence[str]], left: Sequence[str], title: str) -> None:
    header, *rows = lines
    table = Table(title=_plain(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in header:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=column != left[-1])
    for row in rows:
        table.add_row(*map(_plain, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED)
    console.print(table)


def _plain(text: str) -> str:
    """Text without markup for rich or control characters for the terminal, since it may come from any file."""
    return escape(printable(text))


def print_plan(plan: Plan) -> None:
    """The stages of a plan, their sum, and warnings."""
    table = Table(title=_plain(plan.title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("stage", "time", "memory", "disk", ""):
        table.add_column(column, justify="right" if column in ("time", "memory", "disk") else "left")
    for stage in plan.stages:
        texts = (stage.name, duration(stage.seconds), size(stage.peak_bytes), size(stage.disk_bytes), stage.note)
        table.add_row(*map(_plain, texts))
    table.add_section()
    table.add_row("together", duration(plan.seconds), size(plan.peak_bytes), size(plan.disk_bytes), "")
    console = Console()
    console.print(table)
    for warning in plan.warnings:
        console.print(printable(f"warning: {warning}"), markup=False)


def print_result(result: Result) -> None:
    """The table of a result: the method beside random images and, if measured, the whole training set."""
    table = Table(title=_plain(result.title))
    for column in ("", f"{result.measured_on} accuracy %", "± std", "n"):
        table.add_column(column, justify="left" if not column else "right")
    for name, score in result.rows():
        spread = f"{100 * score.std:.1f}" if score.n > 1 else "–"
        table.add_row(_plain(name), f"{100 * score.mean:.1f}", spread, str(score.n))
    console = Console()
    console.print(table)
    if result.random:
        gain = 100 * (result.accuracy.mean - result.random.mean)
        rate = f"(trained at learning rate {result.random.lr:g})"
        console.print(f"{_plain(result.method)} is {gain:+.1f} points from random images {rate}.")
    console.print(f"{set_sizes(result.stored_bytes, result.file_bytes)}, {duration(result.seconds)}.")
