"""A run in a process of its own, or the result of a finished one that was asked for the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstill.api.run import run
from dstill.artifacts.files import write_text
from dstill.artifacts.record import RESULT_NAME
from dstill.artifacts.result import Result
from dstill.config.settings import Recipe, canonical
from dstill.data.real import RealSet
from dstill.evaluation.protocols import load_protocol
from dstill.support.console import Reporter
from dstill.support.workers import apart

_REQUEST = "request.json"


def request(real: RealSet, recipe: Recipe, options: dict[str, Any]) -> dict[str, Any]:
    """What decides the numbers of a run, as plain JSON values; of the protocol all, since a file of that name can change."""
    protocol = canonical(load_protocol(recipe.protocol))
    return {"recipe": canonical(recipe, exclude={"note"}), "data": real.fingerprint, "protocol": protocol, **options}


def run_apart(
    real: RealSet,
    recipe: Recipe,
    folder: Path,
    options: dict[str, Any],
    elsewhere: dict[str, Any],
    reporter: Reporter,
) -> Result:
    """`commands.run` in a fresh process; a finished run of the same request in `folder` is read instead.

    Args:
        real: the real data.
        recipe: the resolved settings.
        folder: the run folder.
        options: further arguments of `run` that decide its numbers, plain JSON values.
        elsewhere: those that do not.
        reporter: receives progress.

    Raises:
        DstillError: whatever `run` raises, and that its process died.
    """
    asked = json.dumps(request(real, recipe, options), indent=1) + "\n"
    stamp, finished = folder / _REQUEST, folder / RESULT_NAME
    if finished.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == asked:
        reporter.note(f"{finished} is finished: reused")
        return Result.load(finished)
    stamp.unlink(missing_ok=True)  # from here on the result there may be another's
    work = functools.partial(_work, real, {"recipe": recipe, "out": folder, **options, **elsewhere})
    result: Result = apart(work, None, lambda _, told: getattr(reporter, told[0])(*told[1:]))
    write_text(stamp, asked)
    return result


class _Relay:
    """Hands what a run reports to the process that started it."""

    def __init__(self, report: Callable[[Any], None]) -> None:
        self.report = report

    def note(self, text: str) -> None:
        self.report(("note", text))

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        self.report(("progress", stage, done, total, detail))


def _work(real: RealSet, arguments: dict[str, Any], _: None, report: Callable[[Any], None]) -> Result:
    return run(real, reporter=_Relay(report), **arguments)
