"""A run in its own process, or the result of a finished run of the same request."""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dstill.api.run import run_job
from dstill.artifacts.distilled import FILE_NAME
from dstill.artifacts.files import write_text
from dstill.artifacts.record import RESULT_NAME
from dstill.artifacts.result import Result
from dstill.config.settings import canonical
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.job import Job, Task
from dstill.support.devices import processor
from dstill.support.progress import Expectation, Reporter, Silent, expect
from dstill.support.workers import apart, cores
from dstill.version import __version__

_REQUEST, _ENVIRONMENT = "request.json", "environment.json"


def request(job: Job, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers of a run depend on, as plain JSON values.

    The protocol is included in full, since a protocol file can change and keep its name.
    """
    recipe, protocol = canonical(job.recipe, exclude={"note"}), canonical(load_protocol(job.recipe.protocol))
    return {"recipe": recipe, "data": job.real.fingerprint, "protocol": protocol, **options}


def run_apart(job: Job, folder: Path, task: Task, asked: Mapping[str, Any]) -> Result:
    """Runs a job in a fresh process, or in this one if it is there for nothing else.

    If `folder` holds a finished run of the same request, its result is read instead.

    Args:
        job: the job to run.
        folder: the run folder.
        task: what is done with the job.
        asked: the request, which identifies a finished run.

    Raises:
        DstillError: whatever the run raises; or its process died.
    """
    text = json.dumps(asked, indent=1) + "\n"
    stamp, finished, reporter = folder / _REQUEST, folder / RESULT_NAME, job.place.reporter
    if finished.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == text:
        reporter.note(f"{finished} is finished: reused")
        return Result.load(finished)
    made_on, evaluated_anew = folder / _ENVIRONMENT, (folder / "set-0" / FILE_NAME).exists()
    stamp.unlink(missing_ok=True)  # from now on, a result in the folder may belong to another run
    if job.place.fresh:
        result = run_job(job, folder, task)
    else:
        quiet = replace(job, place=replace(job.place, reporter=Silent()))  # reporters stay in the process that displays them
        work = functools.partial(_work, quiet, folder, task)
        result = apart(work, None, lambda _, told: pass_on(told, reporter))
    if not (evaluated_anew and made_on.exists()):
        write_text(made_on, json.dumps(_here(job.place.device), indent=1) + "\n")
    write_text(stamp, text)
    return result


def environment(folder: Path, device: torch.device) -> dict[str, str]:
    """The machine that distilled the set of a folder; this one if the folder holds none."""
    try:
        return dict(json.loads((folder / _ENVIRONMENT).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return _here(device)


def _here(device: torch.device) -> dict[str, str]:
    return {
        "dstill": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()}, {cores()} core(s)",
        "device": device.type,
        "threads": str(torch.get_num_threads()),
    }


def pass_on(told: tuple[Any, ...], reporter: Reporter) -> None:
    """Calls the function of the reporter that a relay was called by in the other process."""
    name, *values = told
    if name == "expect":
        expect(reporter, *values)
    else:
        getattr(reporter, name)(*values)


class Relay:
    """Passes what a run reports to the process that started it."""

    def __init__(self, report: Callable[[Any], None]) -> None:
        self.report = report

    def note(self, text: str) -> None:
        self.report(("note", text))

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        self.report(("progress", stage, done, total, detail))

    def expect(self, stages: Sequence[Expectation]) -> None:
        self.report(("expect", stages))


def _work(job: Job, folder: Path, task: Task, _: None, report: Callable[[Any], None]) -> Result:
    return run_job(replace(job, place=replace(job.place, reporter=Relay(report))), folder, task)
