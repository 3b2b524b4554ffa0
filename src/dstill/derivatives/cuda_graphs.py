"""CUDA graphs: the kernels of a function are recorded once for each shape of its arguments, then launched together.

The derivatives of a small network take hundreds of kernels of a few microseconds each. Launching them one by one takes longer
than running them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from dstill.derivatives.unit import TensorUnit

# Recording takes as long as a few dozen calls, so only functions that are called often are recorded.
CALLS_BEFORE, MOST_SHAPES = 20, 16

_Result = TypeVar("_Result")


class _Recording(NamedTuple):
    """A graph, the tensors that it reads, grouped by type, and the structure of tensors that it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[list[Tensor]]
    outputs: Any


class Caller(Protocol):
    """Calls a function of tensors: a `Recorder`, or `directly`."""

    def __call__(self, function: Callable[..., _Result], /, *args: Any) -> _Result: ...


def directly(function: Callable[..., _Result], /, *args: Any) -> _Result:
    """`function(*args)`: the caller that records nothing."""
    return function(*args)


class Recorder:
    """Calls functions of tensors and, on an NVIDIA card, records the kernels of those that are called often.

    The first `CALLS_BEFORE` calls of a function with arguments of one shape run as usual. The next call records its kernels,
    and from then on the recording is replayed. Shapes beyond the first `MOST_SHAPES` are not recorded.

    The arguments of a function are tensors on one device, units, and lists and tuples of these; all other arguments must be
    hashable. The function returns floating-point tensors in such structures. It must neither wait for the card nor draw random
    numbers, and it must not depend on anything else that changes: a recording keeps the settings for precision and determinism
    that torch had when it was made. Functions called through one recorder must differ in name.
    """

    def __init__(self) -> None:
        self.recordings: dict[Any, _Recording | None] = {}
        self._calls: Counter[Any] = Counter()
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, function: Callable[..., _Result], /, *args: Any) -> _Result:
        """`function(*args)`, in tensors that the next call does not overwrite."""
        if not self._on_a_card(args):
            return function(*args)
        key = (function.__name__, _shape(args))
        if key not in self.recordings:
            self._calls[key] += 1
            if self._calls[key] <= CALLS_BEFORE or len(self.recordings) == MOST_SHAPES:
                return function(*args)
            self.recordings[key] = self._recorded(function, args)
        recording = self.recordings[key]
        return function(*args) if recording is None else self._replay(recording, args)

    def _replay(self, recording: _Recording, args: tuple[Any, ...]) -> Any:
        for here, given in zip(recording.inputs, _by_type(tensors(args)), strict=True):
            torch._foreach_copy_(here, given)
        recording.graph.replay()
        # The next replay overwrites these tensors. Multiplying by 1 copies them all in one launch; clones need one each.
        fresh = torch._foreach_mul(list(tensors(recording.outputs)), 1)
        return with_tensors(recording.outputs, iter(fresh))

    def _on_a_card(self, args: tuple[Any, ...]) -> bool:
        return next(tensors(args)).device.type == "cuda"

    def _recorded(self, function: Callable[..., Any], args: tuple[Any, ...]) -> _Recording | None:
        """The recording; None if the card lacks the memory of one step that a recording keeps to itself."""
        try:
            return self._record(function, args)
        except torch.OutOfMemoryError:
            return None

    def _record(self, function: Callable[..., Any], args: tuple[Any, ...]) -> _Recording:
        inputs = [tensor.clone() for tensor in tensors(args)]

        def run() -> Any:
            return function(*with_tensors(args, iter(inputs)))

        with torch.cuda.device(inputs[0].device):
            aside = torch.cuda.Stream()
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
