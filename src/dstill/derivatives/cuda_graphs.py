"""CUDA graphs: the kernels of a function are recorded once for each shape of its arguments, then launched together.

The derivatives of a small network take hundreds of kernels of a few microseconds each. Launching them one by one takes longer
than running them. Such a kernel also occupies a small part of a card, so that a graph may hold several calls side by side.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dstill.derivatives.abreast import Call, Order, Turn
from dstill.derivatives.unit import TensorUnit

# Recording takes as long as a few dozen calls, so only functions that are called often are recorded.
CALLS_BEFORE, MOST_SHAPES = 20, 16

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Recording(NamedTuple):
    """A graph of some calls, the tensors that it reads, grouped by type, and the results that it writes, one for each call."""

    graph: torch.cuda.CUDAGraph
    inputs: list[list[Tensor]]
    outputs: list[Any]


class Caller(Protocol):
    """Calls a function of tensors: a `Recorder`, or `directly`."""

    def __call__(self, function: Callable[..., _Result], /, *args: Any) -> _Result: ...


def directly(function: Callable[..., _Result], /, *args: Any) -> _Result:
    """`function(*args)`: the caller that records nothing."""
    return function(*args)


class Recorder:
    """Calls functions of tensors and, on an NVIDIA card, records the kernels of those that are called often.

    The first `CALLS_BEFORE` calls of a function with arguments of one shape run as usual. The next call records its kernels,
    and from then on the recording is replayed. Shapes beyond the first `MOST_SHAPES` are not recorded. Several calls side by
    side are recorded as one; each number of calls has shapes of its own.

    The arguments of a function are tensors on one device, units, and lists and tuples of these; all other arguments must be
    hashable. The function returns floating-point tensors in such structures. It must neither wait for the card nor draw random
    numbers, and it must not depend on anything else that changes: a recording keeps the settings for precision and determinism
    that torch had when it was made. Functions called through one recorder must differ in name.
    """

    def __init__(self) -> None:
        self.recordings: dict[Any, _Recording | None] = {}
        self._calls: Counter[Any] = Counter()
        self._pool: Any = None
        self._streams: dict[torch.device, list[torch.cuda.Stream]] = {}
        self._turns: dict[threading.Thread, Turn[Any]] = {}
        self._order = Order()

    def __call__(self, function: Callable[..., _Result], /, *args: Any) -> _Result:
        """`function(*args)`, in tensors that the next call does not overwrite."""
        turn = self._turns.get(threading.current_thread())
        if turn is not None:
            return turn.ask(Call(self._kind(function, args), function, args))
        return self._performed(function, [args])[0]

    def side_by_side(self, works: Sequence[Callable[[], _Result]]) -> list[_Result]:
        """`[work() for work in works]`; calls of one function with arguments of one shape become branches of one graph.

        The works run in turns, each until its next call of this recorder. Once all of them wait or have ended, those that wait
        for calls of one kind get these, see `Order`. If a work or a call fails, all works end. A single work runs as it is.
        """
        if len(works) < 2:
            return [work() for work in works]
        turns = [Turn(work) for work in works]
        self._turns = {turn.thread: turn for turn in turns}
        try:
            for turn in turns:
                turn.begin()
                self._note(None, turn.call)
            while waiting := [turn for turn in turns if turn.call is not None]:
                self._serve(waiting, len(turns))
            return [turn.result for turn in turns]
        finally:
            for turn in turns:
                turn.stop()
            for turn in turns:
                if turn.thread.is_alive():
                    turn.thread.join()
            self._turns = {}

    def _kind(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Calls of one kind can be branches of one graph. Elsewhere they run one by one, whatever their shapes."""
        return (function.__name__, _shape(args) if self._on_a_card([args]) else None)

    def _serve(self, waiting: Sequence[Turn[Any]], most: int) -> None:
        """Performs the calls of one kind, in the order of the turns, and lets these go on."""
        calls = {turn: turn.call for turn in waiting if turn.call is not None}
        kind = self._order.first({call.kind for call in calls.values()})
        chosen = [(turn, call) for turn, call in calls.items() if call.kind == kind]
        for some in _parts(chosen, most):
            answers = self._performed(some[0][1].function, [call.args for _, call in some])
            for (turn, call), answer in zip(some, answers, strict=True):
                turn.go_on(answer)
                self._note(call, turn.call)

    def _note(self, earlier: Call | None, later: Call | None) -> None:
        if later is not None:
            self._order.follows(earlier and earlier.kind, later.kind)

    @torch.no_grad()
    def _performed(self, function: Callable[..., _Result], calls: Sequence[tuple[Any, ...]]) -> list[_Result]:
        """The results of a function for the arguments of some calls, which have one shape."""
        if not self._on_a_card(calls):
            return [function(*args) for args in calls]
        key = (function.__name__, len(calls), _shape(calls[0]))
        if key not in self.recordings:
            self._calls[key] += 1
            if self._calls[key] <= CALLS_BEFORE:
                return [function(*args) for args in calls]
            if sum(one[1] == len(calls) for one in self.recordings) < MOST_SHAPES:
                self.recordings[key] = self._recorded(function, calls)
        recording = self.recordings.get(key)
        if recording is not None:
            return self._replay(recording, calls)
        if len(calls) > 1:  # one by one they may be recorded
            return [self._performed(function, [args])[0] for args in calls]
        return [function(*calls[0])]

    def _replay(self, recording: _Recording, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        for here, given in zip(recording.inputs, _by_type(tensors(calls)), strict=True):
            torch._foreach_copy_(here, given)
        recording.graph.replay()
        # The next replay overwrites these tensors. Multiplying by 1 copies them all in one launch; clones need one each.
        fresh = torch._foreach_mul(list(tensors(recording.outputs)), 1)
        return with_tensors(recording.outputs, iter(fresh))

    def _on_a_card(self, calls: Sequence[tuple[Any, ...]]) -> bool:
        return next(tensors(calls)).device.type == "cuda"

    def _recorded(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> _Recording | None:
        """The recording; None if the card lacks the memory of the steps that a recording keeps to itself."""
        try:
            return self._record(function, calls)
        except torch.OutOfMemoryError:
            return None

    def _record(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> _Recording:
        inputs = [tensor.clone() for tensor in tensors(calls)]
        with torch.cuda.device(inputs[0].device):
            streams = self._streams.setdefault(inputs[0].device, [])
            streams += [torch.cuda.Stream() for _ in range(len(calls) - len(streams))]
            aside, *branches = streams[: len(calls)]  # the same for all: memory of the pool is reused on its own stream alone

            def run() -> list[Any]:
                return _branched(function, with_tensors(calls, iter(inputs)), branches)

            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):  # libraries must choose algorithms and workspaces before recording
                for _ in range(2):
                    run()
            torch.cuda.current_stream().wait_stream(aside)
            # All recordings share one pool: they never run at the same time, and their results are copied at once.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
                outputs = run()
        return _Recording(graph, _by_type(inputs), outputs)


def _branched(
    function: Callable[..., _Result], calls: Sequence[tuple[Any, ...]], branches: Sequence[torch.cuda.Stream]
) -> list[_Result]:
    """The results of a function for the first call on the current stream and for each further one on a branch of it."""
    here, results = torch.cuda.current_stream(), list[_Result]()
    for branch in branches:
        branch.wait_stream(here)
    try:
        for stream, args in zip((here, *branches), calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(function(*args))
        return results
    finally:  # also after an error: a recording with an open branch cannot be ended, which would hide what the error was
        for branch in branches:
            here.wait_stream(branch)


def _parts(items: Sequence[_Item], most: int) -> Iterator[Sequence[_Item]]:
    """All of `most` items at once; of fewer, powers of two, so that few numbers of branches need a recording.

    Example:
        >>> [len(part) for part in _parts(range(7), 7)], [len(part) for part in _parts(range(7), 8)]
        ([7], [4, 2, 1])
    """
    while items:
        size = len(items) if len(items) == most else 1 << (len(items).bit_length() - 1)
        yield items[:size]
        items = items[size:]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors within lists, tuples and units, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, TensorUnit):
        yield from tensors([getattr(value, name) for name in TensorUnit.KEPT])


def with_tensors(value: Any, others: Iterator[Tensor]) -> Any:
    """The same structure with other tensors, in the order of `tensors`. A copied unit has the attributes in `KEPT` alone."""
    if isinstance(value, Tensor):
        return next(others)
    if isinstance(value, (list, tuple)):
        items = [with_tensors(item, others) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, TensorUnit):
        unit = copy.copy(value)
        vars(unit).clear()
        for name in TensorUnit.KEPT:
            setattr(unit, name, with_tensors(getattr(value, name), others))
        return unit
    return value


def _by_type(values: Iterable[Tensor]) -> list[list[Tensor]]:
    """The tensors in one list for each type, since torch copies tensors of one type in one launch."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for value in values:
        lists.setdefault(value.dtype, []).append(value)
    return list(lists.values())


def _shape(value: Any) -> Any:
    """What a recording is valid for: everything about the arguments except the numbers in the tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return tuple(_shape(item) for item in value)
    if isinstance(value, TensorUnit):
        return tuple(_shape(getattr(value, name)) for name in TensorUnit.KEPT)
    return value
