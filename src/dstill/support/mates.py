"""Processes of this machine that share the draws of a run with this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING, Any

import torch

from dstill.errors import DstillError
from dstill.support.crew import ALONE, Crew, Group
from dstill.support.devices import ask_for_determinism
from dstill.support.workers import Workers, refuse_import, threads_each

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_HOST = "127.0.0.1"
_LOOK = 0.05  # seconds between two looks at a process that starts
_PARTING = 2.0  # seconds that the processes get to end by themselves

Follow = Callable[[Any, Group], None]


@contextlib.contextmanager
def together(follow: Follow, content: Any, size: int, workers: Workers) -> Iterator[Crew]:
    """Lets other processes run `follow(content, group)` while this one leads. They end with the block.

    Processes on this machine are started for the purpose. All of them, this one as well, then have their share of the cores.

    Args:
        follow: what the others do; picklable, as is the content.
        content: passed by value.
        size: number of processes that are worth it, with this one.
        workers: a team, all of which then takes part; for anything else, processes are started.

    Yields:
        The group, seen from this process. For one process that is `ALONE`, and nothing is started.
    """
    if size == 1:
        yield ALONE
    elif isinstance(workers, int | str):
        with _on_this_machine(follow, content, size) as crew:
            yield crew
    else:
        with workers.together(follow, content) as crew:
            yield crew


@contextlib.contextmanager
def _on_this_machine(follow: Follow, content: Any, size: int) -> Iterator[Crew]:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    refuse_import("a run that starts processes")
    threads, store = torch.get_num_threads(), TCPStore(_HOST, 0, None, True, wait_for_workers=False)
    packed, context = pickle.dumps((follow, content)), multiprocessing.get_context("spawn")
    about = (store.port, size, threads_each(size), torch.are_deterministic_algorithms_enabled())
    mates = [context.Process(target=_follow, args=(packed, number, *about), daemon=True) for number in range(1, size)]
    try:
        for mate in mates:
            mate.start()
        torch.set_num_threads(threads_each(size))
        for number, mate in enumerate(mates, 1):
            _wait_for(store, number, mate)
        group = Group(store, 0, size)
        try:
            yield group
        finally:
            group.end()
    finally:
        torch.set_num_threads(threads)
        _part([mate for mate in mates if mate.pid is not None])


def _part(mates: Sequence[SpawnProcess]) -> None:
    """Waits until processes have ended, and ends those that do not."""
    deadline = time.monotonic() + _PARTING
    for mate in mates:
        mate.join(max(0.0, deadline - time.monotonic()))
    for mate in mates:
        mate.terminate()
    for mate in mates:
        mate.join()


def _wait_for(store: Store, number: int, mate: SpawnProcess) -> None:
    """Waits until a process is there; raises `DstillError` if it has died on the way."""
    while not store.check([f"ready {number}"]):
        if not mate.is_alive():
            raise DstillError("a process died while it started, perhaps for lack of memory: try fewer --workers")
        mate.join(_LOOK)


def _follow(packed: bytes, number: int, port: int, size: int, threads: int, deterministic: bool) -> None:
    """The main function of another process. Signals of the terminal are for the leader, which then ends this one."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if deterministic:
        ask_for_determinism()
    follow, content = pickle.loads(packed)  # noqa: S301 - from our own parent process
    try:
        store = TCPStore(_HOST, port, None, False)
        store.set(f"ready {number}", "yes")
        group = Group(store, number, size)
    except (DstillError, RuntimeError):  # the leader has ended meanwhile
        os._exit(1)
    try:
        follow(content, group)
    except Exception as error:  # the leader says it
        group.fail(error)
        os._exit(1)
