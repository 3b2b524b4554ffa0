"""Signals that ask a process to stop, handled between two steps and not in the middle of one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM was received. Like KeyboardInterrupt, only the command line catches it."""


def raise_on_sigterm() -> None:
    """Makes SIGTERM raise `Terminated`, so that files are closed and workers are stopped before the process ends."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """Delays the first SIGINT or SIGTERM until the end of the block. A second signal acts at once.

    Python handles signals in the main thread only, so in other threads nothing is delayed.

    Yields:
        A function that tells whether a signal is waiting.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: handler for number in _SIGNALS if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        held.append(number)
        for other, handler in before.items():
            signal.signal(other, handler)

    for number in before:
        signal.signal(number, hold)
    try:
        yield lambda: bool(held)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
