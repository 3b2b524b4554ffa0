"""Who runs the rows of a table: this process, the processes of torchrun, or jobs of a cluster."""

from __future__ import annotations

import functools
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dstill.api.apart import Relay, pass_on
from dstill.api.submitting import Jobs
from dstill.errors import DstillError
from dstill.jobs.job import Workplace
from dstill.jobs.options import Executor, Machine
from dstill.support.console import ConsoleReporter
from dstill.support.workers import most_workers, portable, threads_each

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Work = Callable[[_Item, Workplace], _Result]
Ended = Callable[[str, _Result | Exception], None]


@dataclass(frozen=True)
class Hands:
    """Hands rows out.

    Attributes:
        machine: where the command works.
        place: the same, resolved for this process.
        jobs: what submits rows as jobs; None if they are not.
    """

    machine: Machine
    place: Workplace
    jobs: Jobs | None = None

    @classmethod
    def of(cls, executor: str | Executor | None, machine: Machine, place: Workplace, folder: Path) -> Hands:
        """Whoever the user asked for.

        Args:
            executor: what runs rows as jobs; None for the processes of torchrun if it has started this one, else this process.
            machine: where the command works.
            place: the same, resolved for this process.
            folder: folder of the table. The logs of jobs are kept in its folder `jobs`.

        Raises:
            DstillError: both torchrun and an executor would hand out rows; or see `Jobs`.
        """
        if executor is None:
            return cls(machine, place)
        asked = executor if isinstance(executor, Executor) else Executor(executor)
        if not isinstance(place.workers, int | str):
            raise DstillError(f"torchrun hands out the rows already: leave out the executor {asked.name}, or torchrun")
        at_once = most_workers(place.workers, place.device) if asked.name == "local" else None
        if at_once is not None and machine.threads is None:
            machine = replace(machine, threads=threads_each(at_once))
        return cls(machine, place, Jobs(asked.name, folder / "jobs", asked.options, at_once))

    @property
    def away(self) -> bool:
        """Whether rows are worked on by other processes, which may have another working directory."""
        return self.jobs is not None or not isinstance(self.place.workers, int | str)

    def give(
        self, function: Work[_Item, _Result], rows: Mapping[str, _Item], ended: Ended[_Result], folders: Sequence[Path]
    ) -> None:
        """Works on each row: `function(row, place)`, wherever that is done.

        Args:
            function: picklable if rows go to other processes, as are the rows and the results. An error that it raises is an
                outcome like any other.
            rows: the rows by their title.
            ended: called in this process with a title and the outcome, as soon as a row has ended.
            folders: folders of this process that every other one must see.
        """
        titles, reporter = list(rows), self.place.reporter
        if not self.away:
            for title in titles:
                ended(title, _outcome(function, rows[title], self.place))
            return
        # Another process resolves the device for itself, and trains what its row needs alone.
        machine = replace(self.machine, workers=1, cache=self.place.cache.absolute())
        function = functools.partial(_seeing, [folder.absolute() for folder in folders], function)
        count = 0

        def end(title: str, outcome: _Result | Exception) -> None:
            nonlocal count
            count += 1
            ended(title, outcome)
            reporter.progress("rows", count, len(titles), title)

        def tell(title: str, told: tuple[Any, ...]) -> None:
            kind, *values = told
            if kind == "ended":
                end(title, values[0])
            elif kind == "note":  # the progress of several rows at once would be hard to read
                pass_on(("note", f"{title}: {values[0]}"), reporter)

        reporter.progress("rows", 0, len(titles))
        if self.jobs is not None:
            work = functools.partial(_in_job, function, machine)
            self.jobs.run(work, list(rows.values()), lambda index, outcome: end(titles[index], outcome), reporter.note)
        elif not isinstance(self.place.workers, int | str):
            self.place.workers.spread(functools.partial(_in_rank, function, machine, dict(rows)), titles, tell)


def _seeing(folders: Sequence[Path], function: Work[_Item, _Result], row: _Item, place: Workplace) -> _Result:
    """The function of a row, in another process, which must see these folders."""
    for folder in folders:
        if not folder.is_dir():
            raise DstillError(f"{socket.gethostname()} does not see {folder}: pass a folder that all machines share")
    return function(row, place)


def _outcome(function: Work[_Item, _Result], row: _Item, place: Workplace) -> _Result | Exception:
    try:
        return function(row, place)
    except Exception as error:  # whatever went wrong, the other rows continue
        return error


def _in_job(function: Work[_Item, _Result], machine: Machine, row: _Item) -> _Result | Exception:
    """Works on a row in a job, whose log shows the progress. The job is a process for this row alone."""
    place = replace(Workplace.of(machine, ConsoleReporter(sys.stdout)), fresh=True)
    outcome = _outcome(function, row, place)
    return portable(outcome) if isinstance(outcome, Exception) else outcome


def _in_rank(
    function: Work[_Item, _Result], machine: Machine, rows: Mapping[str, _Item], title: str, report: Callable[[Any], None]
) -> None:
    """Works on a row in a process of torchrun, and passes its outcome to the one that leads."""
    outcome = _outcome(function, rows[title], Workplace.of(machine, Relay(report)))
    report(("ended", portable(outcome) if isinstance(outcome, Exception) else outcome))
