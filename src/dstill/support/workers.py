"""Independent pieces of work in several processes: the training of experts and of networks for the evaluation."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection, wait
from typing import Any, Literal, Protocol, TypeVar

import torch

from dstill.errors import DstillError
from dstill.support.crew import Crew, Group
from dstill.support.devices import ask_for_determinism
from dstill.support.stopping import Terminated, raise_on_sigterm

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Team(Protocol):
    """Processes that exist already, on this machine or others."""

    size: int

    def spread(self, function: Callable[..., Any], items: Sequence[Any], tell: Callable[[Any, Any], None]) -> list[Any]:
        """As `spread`, below."""
        ...

    def together(self, follow: Callable[[Any, Group], None], content: Any) -> AbstractContextManager[Crew]:
        """As `dstill.support.mates.together`."""
        ...


Workers = int | Literal["auto"] | Team
# Works on one item: function(item, report). What is passed to `report` reaches the `progress` of `spread`.
Work = Callable[[_Item, Callable[[Any], None]], _Result]

# Starting a process, which imports torch and receives the data, takes a few seconds. Shorter work stays in this process.
_WORTH_SECONDS = 20.0
_DIED = "a process died, perhaps for lack of memory (then try fewer --workers); its own message, if any, is above"


def refuse_import(what: str) -> None:
    """Raises `DstillError` if this process is a worker that is importing the user's script, which must not start workers.

    Args:
        what: what was called, for the error.
    """
    # multiprocessing itself checks this attribute; there is no public one.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DstillError(f'{what} was called while a script was imported: put the call under if __name__ == "__main__":')


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_workers(asked: Workers) -> None:
    """Raises `DstillError` for a number of processes below 1."""
    if isinstance(asked, int) and asked < 1:
        raise DstillError(f"workers must be at least 1, or auto, got {asked}")


def most_workers(asked: Workers, device: torch.device) -> int:
    """Processes that `choose_workers` takes for many items that are worth it."""
    if asked == "auto":
        return cores() if device.type == "cpu" else 1
    return asked if isinstance(asked, int) else asked.size


def choose_workers(asked: Workers, items: int, device: torch.device, seconds: float) -> int | Team:
    """How many processes to use, or which team.

    Args:
        asked: a number of processes; or `auto` for one for each core, but this process alone on an accelerator, for a single
            item or for little work; or a team, which is spared little work, too.
        items: number of items to work on.
        device: where the work is done.
        seconds: how long all items would take in one process, roughly.

    Raises:
        DstillError: fewer than one process is asked for.

    Example:
        >>> choose_workers("auto", 10, torch.device("cpu"), seconds=1.0), choose_workers(4, 2, torch.device("cpu"), 1.0)
        (1, 2)
    """
    check_workers(asked)
    worth = isinstance(asked, int) or seconds >= _WORTH_SECONDS
    if asked != "auto" and not isinstance(asked, int):
        return asked if worth and items > 1 else 1
    return max(1, min(items, most_workers(asked, device))) if worth else 1


def spread(
    function: Work[_Item, _Result],
    items: Sequence[_Item],
    workers: int | Team,
    progress: Callable[[_Item, Any], None] | None = None,
) -> list[_Result]:
    """`[function(item, report) for item in items]`, in `workers` processes with `cores() / workers` threads each.

    With one worker, everything runs in this process. If this process is interrupted, the workers are stopped; a worker that
    distils finishes its step and stores it first.

    Args:
        function: must be picklable, as must the items, the results and whatever is reported.
        items: what to work on, in this order.
        workers: number of processes, or a team.
        progress: called in this process with an item and what was reported for it.

    Returns:
        The results, in the order of the items.

    Raises:
        DstillError: a process died, for example for lack of memory. An exception that `function` raises is raised here, and
            the other workers are stopped.

    Example:
        >>> spread(lambda item, report: item + 1, [1, 2], workers=1)
        [2, 3]
    """
    tell = progress or (lambda item, report: None)
    if not isinstance(workers, int):
        return workers.spread(function, items, tell)
    if workers == 1:
        return [function(item, lambda report, item=item: tell(item, report)) for item in items]  # type: ignore[misc]
    return _in_processes(function, items, workers, threads_each(workers), tell, daemon=True)


def threads_each(workers: int) -> int:
    """Threads of each of `workers` processes. They share the cores; a single one is this process and keeps its threads."""
    return torch.get_num_threads() if workers == 1 else max(1, cores() // workers)


def apart(function: Work[_Item, _Result], item: _Item, progress: Callable[[_Item, Any], None] | None = None) -> _Result:
    """`function(item, report)` in a fresh process with as many threads as this one. It may have workers of its own.

    Nothing of this process's memory counts for it, and if it dies, this process goes on.

    Args:
        function: must be picklable, as must the item, the result and whatever is reported.
        item: what to work on.
        progress: called in this process with the item and what was reported.

    Raises:
        DstillError: the process died. An exception that `function` raises is raised here.
    """
    tell = progress or (lambda item, report: None)
    return _in_processes(function, [item], 1, torch.get_num_threads(), tell, daemon=False)[0]


def _in_processes(
    function: Work[_Item, _Result],
    items: Sequence[_Item],
    workers: int,
    threads: int,
    tell: Callable[[_Item, Any], None],
    *,
    daemon: bool,
) -> list[_Result]:
    refuse_import("a function that starts processes")
    payload = pickle.dumps(function)  # by value: containers often have little shared memory
    context = multiprocessing.get_context("spawn")
    results: dict[int, _Result] = {}
    busy: dict[Connection, int] = {}
    waiting = iter(range(len(items)))
    processes: list[multiprocessing.context.SpawnProcess] = []
    connections: list[Connection] = []
    try:
        for _ in range(workers):  # all of them start before the first is waited for, which reads a large payload only then
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, threads, torch.are_deterministic_algorithms_enabled(), _card()), daemon=daemon
            )
            process.start()
            processes.append(process)
            there.close()
            connections.append(here)
        for here in connections:
            _send(here, payload)
            _next(here, waiting, items, busy)
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                index = busy[ready]
                kind, content = _received(ready)
                if kind == "report":
                    tell(items[index], content)
                elif kind == "failed":
                    raise content
                else:
                    results[index] = content
                    del busy[ready]
                    _next(ready, waiting, items, busy)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
    return [results[index] for index in range(len(items))]


def _next(to: Connection, waiting: Any, items: Sequence[Any], busy: dict[Connection, int]) -> None:
    index = next(waiting, None)
    if index is not None:
        busy[to] = index
        _send(to, pickle.dumps(items[index]))


def _send(to: Connection, content: bytes) -> None:
    try:
        to.send_bytes(content)
    except OSError as error:
        raise DstillError(_DIED) from error


def _received(connection: Connection) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = pickle.loads(connection.recv_bytes())  # noqa: S301 - from our own process
    except (EOFError, OSError) as error:
        raise DstillError(_DIED) from error
    return message


def _card() -> int | None:
    """The number of the card that this process works on; None if it uses none."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _serve(connection: Connection, threads: int, deterministic: bool, card: int | None) -> None:
    """The main function of a worker process.

    It ignores SIGINT: Ctrl-C reaches all processes, and the parent's SIGTERM would then be the second signal.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_on_sigterm()
    torch.set_num_threads(threads)
    if deterministic:
        ask_for_determinism()
    if card is not None:
        torch.cuda.set_device(card)
    with contextlib.suppress(Terminated):
        _work_on(connection)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to clean up


def _work_on(connection: Connection) -> None:
    """Receives the function, then one item after another, and sends back results and reports."""

    def send(kind: str, content: Any) -> None:
        packed = pickle.dumps((kind, content))
        try:
            connection.send_bytes(packed)
        except OSError as error:
            raise Terminated from error  # the parent has ended

    try:
        packed, function = connection.recv_bytes(), None
        while True:
            item = connection.recv_bytes()
            try:
                function = function or pickle.loads(packed)  # noqa: S301 - from our own parent process
                send("done", function(pickle.loads(item), lambda report: send("report", report)))  # noqa: S301 - likewise
            except Exception as error:  # the parent raises it again
                send("failed", portable(error))
    except (EOFError, OSError):
        return  # there are no more items, or the parent has ended


def portable(error: Exception) -> Exception:
    """The error itself if it can be pickled, else a `RuntimeError` with its type and text."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - what was pickled in the same line
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
