"""The table that a command ends with."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dstill.artifacts.result import Result
from dstill.console import duration


def print_result(result: Result) -> None:
    """The table at the end: the method beside random images and, where measured, the whole set."""
    table = Table(
        title=f"{result.data}, {result.ipc} image(s) per class, protocol {result.protocol.name} v{result.protocol.version}"
    )
    for column in ("", f"{result.measured_on} accuracy %", "± std", "n"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [
        (f"{result.method} ({name})" if len(result.nets) > 1 else result.method, score) for name, score in result.nets.items()
    ]
    rows += [("random real images", result.random)] if result.random else []
    rows += [("whole training set", result.whole)] if result.whole else []
    for name, score in rows:
        table.add_row(name, f"{100 * score.mean:.1f}", f"{100 * score.std:.1f}", str(score.n))
    console = Console()
    console.print(table)
    if result.random:
        gain = 100 * (result.accuracy.mean - result.random.mean)
        console.print(
            f"{result.method} is {gain:+.1f} points from random images (which chose learning rate {result.random.lr:g})."
        )
    console.print(f"{result.stored_bytes / 1024:.1f} KiB stored, {duration(result.seconds)}.")
