"""Pieces of work as jobs of a cluster, submitted by submitit. This process waits for them."""

from __future__ import annotations

import contextlib
import pickle
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dstill.artifacts import files
from dstill.errors import DstillError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

KINDS = ("slurm", "local")
_POLL = 0.5  # seconds between two looks at the jobs
_WEEK = 7 * 24 * 60  # minutes; submitit's own limit of local jobs is two
_LIMITS = ("timeout_min", "slurm_time", "slurm_timeout_min")


class Jobs:
    """The jobs of one kind.

    Args:
        kind: `slurm`; or `local`, which starts each job as a process of this machine.
        folder: folder of their logs, which all machines see.
        options: what submitit's `AutoExecutor.update_parameters` takes, such as `timeout_min` and `slurm_partition`.
        at_once: number of jobs that are submitted before one of them has ended; None for all.

    Raises:
        DstillError: submitit is not installed, this machine cannot submit such jobs, or an option is unknown.
    """

    def __init__(self, kind: str, folder: Path, options: Mapping[str, Any], at_once: int | None = None) -> None:
        if kind not in KINDS:
            raise DstillError(f"unknown executor {kind!r}: take one of {', '.join(KINDS)}")
        if kind == "slurm" and not set(_LIMITS) & set(options):
            raise DstillError(
                "jobs of Slurm need a limit: say how many minutes a row may take, by --executor-option timeout_min=120"
            )
        self.folder, self.at_once = folder.absolute(), at_once
        given = {"name": "dstill", **({"timeout_min": _WEEK} if kind == "local" else {}), **options}
        self.executor = _executor(kind, self.folder, given)

    def run(
        self,
        function: Callable[[_Item], _Result],
        items: Sequence[_Item],
        ended: Callable[[int, _Result | DstillError], None],
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Runs `function(item)` for each item in a job of its own. If this process is interrupted, the jobs are cancelled.

        Args:
            function: must be picklable and importable by the jobs, as must the items and the results.
            items: what to work on.
            ended: called when a job has ended, with the index of its item, and its result or why there is none.
            note: called with a message when jobs are submitted.
        """
        path = self.folder / f"rows-{uuid.uuid4().hex}.pkl"  # once, since every item may hold the same data
        files.write_bytes(path, pickle.dumps((function, list(items))))
        running: dict[int, Any] = {}
        try:
            self._wait(path, len(items), running, ended, note)
        except BaseException:
            for job in running.values():
                job.cancel(check=False)
            raise
        finally:
            path.unlink(missing_ok=True)

    def _wait(
        self,
        path: Path,
        count: int,
        running: dict[int, Any],
        ended: Callable[[int, Any], None],
        note: Callable[[str], None],
    ) -> None:
        """Submits jobs and waits for them; those under way are in `running`."""
        submitted = 0
        while running or submitted < count:
            free = count if self.at_once is None else self.at_once
            new = range(submitted, min(count, submitted + free - len(running)))
            if new:
                running |= zip(new, self.executor.map_array(Piece(path), new), strict=True)
                note(f"submitted: {', '.join(running[index].job_id for index in new)}; logs in {self.folder}")
                submitted = new.stop
            for index in [index for index, job in running.items() if job.done()]:
                ended(index, _outcome(running.pop(index)))
            if running:
                time.sleep(_POLL)


class Piece:
    """What a job does: the work on one item of a file.

    A job that Slurm ends for lack of time, or for a more important one, is queued again, and its run goes on from its last
    checkpoint.

    Args:
        path: the file, with the function and the items.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, index: int) -> Any:
        function, items = pickle.loads(self.path.read_bytes())  # noqa: S301 - from our own process
        return function(items[index])

    def checkpoint(self, index: int) -> Any:
        """What submitit queues again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, index)


def _executor(kind: str, folder: Path, options: Mapping[str, Any]) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise DstillError("submitit is not installed: pip install 'dstill[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(folder, cluster=kind)
    except RuntimeError as error:
        raise DstillError(
            "this machine cannot submit jobs to Slurm, since srun is not found here: take a login node, or --executor local"
        ) from error
    try:
        executor.update_parameters(**options)
    except (NameError, AssertionError, ValueError, TypeError) as error:
        raise DstillError(f"submitit refuses the options of the executor: {str(error).splitlines()[0]}") from error
    return executor


def _outcome(job: Any) -> Any:
    """The result of a job, or why there is none. The files that passed it are removed, and the logs stay."""
    try:
        return job.result()
    except Exception as error:  # submitit's own, or what its files cause
        state = str(job.state).lower()
        failure = DstillError(f"job {job.job_id} has ended without a result ({state}): see {job.paths.stderr}")
        failure.__cause__ = error
        return failure
    finally:
        with contextlib.suppress(OSError):
            job.paths.submitted_pickle.unlink(missing_ok=True)
            job.paths.result_pickle.unlink(missing_ok=True)
