"""Functions that take turns: each runs in a thread of its own until it asks for something, and only one runs at a time.

Threads serve as coroutines here, so that a function can ask from within any depth of calls. They run in an order that does not
depend on the system. So the functions need no locks, and they compute what they would compute one after another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from dstill.support.devices import precision_restored

_Result = TypeVar("_Result")


class Call(NamedTuple):
    """What a function asks for: the result of `function(*args)`. Calls of one kind can be performed together."""

    kind: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]


class _Stopped(BaseException):
    """Ends a thread whose result nobody waits for."""


class Turn(Generic[_Result]):
    """A function in a thread of its own. It runs while `begin` or `go_on` waits for it, and at no other time.

    It has the grad mode, the card and the stream of the thread that made it. Whether cuDNN may use TF32 is a setting of the
    whole process; while the function waits, what it has set does not hold for others.

    Attributes:
        call: what the function waits for; None before it begins and once it has ended.
        result: its result, once it has ended.
    """

    result: _Result

    def __init__(self, function: Callable[[], _Result]) -> None:
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        given = (function, torch.is_grad_enabled(), stream)
        self.call: Call | None = None
        self.thread = threading.Thread(target=self._run, args=given, daemon=True)
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._stopped = False

    def begin(self) -> None:
        """Runs the function until its first call or its end; raises what it raises."""
        self.thread.start()
        self.go_on(None)

    def go_on(self, answer: Any) -> None:
        """Answers the function's call, and runs it until its next one or its end; raises what it raises."""
        with precision_restored():
            self._answers.put(answer)
            self.call = self._calls.get()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # else the two would keep each other, and tensors of the card with them

    def ask(self, call: Call) -> Any:
        """The answer to a call. The function itself asks, in its own thread."""
        if not self._stopped:
            with precision_restored():
                self._calls.put(call)
                answer = self._answers.get()
        if self._stopped:
            raise _Stopped
        return answer

    def stop(self) -> None:
        """Ends the function at the call that it waits for, or at its next one."""
        self._stopped = True
        self._answers.put(None)

    def _run(self, function: Callable[[], _Result], grad: bool, stream: torch.cuda.Stream | None) -> None:
        try:
            self._answers.get()
            if not self._stopped:
                with torch.set_grad_enabled(grad), torch.cuda.stream(stream):
                    self.result = function()
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        self._calls.put(None)


class Order:
    """The order in which kinds of calls are performed, so that many calls of one kind come together.

    Only one kind is performed at a time, and the functions that wait for others stay behind. A kind that was seen to follow
    another one comes after it: whoever is ahead waits for those that have more to do before. So trainings of different
    lengths reach their last steps at the same time.

    Example:
        >>> order = Order()
        >>> order.follows(None, "last"), order.follows(None, "first"), order.first({"first", "last"})
        (None, None, 'last')
        >>> order.follows("first", "last"), order.first({"first", "last"})
        (None, 'first')
    """

    def __init__(self) -> None:
        self._kinds: list[Any] = []

    def follows(self, earlier: Any, later: Any) -> None:
        """Notes that a function has asked for a kind after another one; None where it had asked for none."""
        if later not in self._kinds:
            self._kinds.append(later)
        elif earlier is not None and self._kinds.index(later) < self._kinds.index(earlier):
            self._kinds.remove(later)
            self._kinds.insert(self._kinds.index(earlier) + 1, later)

    def first(self, kinds: set[Any]) -> Any:
        """Which of some kinds is performed next."""
        return next(kind for kind in self._kinds if kind in kinds)
