"""Signals that ask a process to end, answered between two steps and not in the middle of one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM; like KeyboardInterrupt, nothing but the command line catches it."""


def raise_on_sigterm() -> None:
    """From now on SIGTERM raises `Terminated`, so that files are closed and workers stopped on the way out."""

    def handler(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """Holds back the first SIGINT or SIGTERM; the yielded function says whether one has come. A second one acts at once.

    On leaving, what was held back is delivered. Outside the main thread, where Python handles no signals, nothing is held back.
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
