"""CUDA graphs: the kernels of a function, recorded once for each shape of its arguments and from then on launched as one.

A small network's derivatives are hundreds of kernels of microseconds each, and launching them one by one takes longer than
running them.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from dstill.nets.unit import TensorUnit

# Recording takes as long as a few dozen calls: it is for those who call often. What is beyond the most shapes runs as ever.
_CALLS_BEFORE, _MOST_SHAPES = 20, 8

_Result = TypeVar("_Result")


class _Recording(NamedTuple):
    """A graph, the tensors it reads, by type, and the structure of tensors it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[list[Tensor]]
    outputs: Any


class Replayed(Generic[_Result]):
    """A function of tensors on an NVIDIA card, the same numbers at the cost of one launch.

    Args:
        function: of tensors, units, and lists and tuples of these, of one device; everything else among the arguments must be
            hashable. It returns floating tensors, in such structures. It must neither wait for the card nor depend on anything
            but its arguments, nor use random numbers.
    """

    def __init__(self, function: Callable[..., _Result]) -> None:
        self.function = function
        self._calls: Counter[Any] = Counter()
        self._recordings: dict[Any, _Recording] = {}
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, *args: Any) -> _Result:
        key = _shape(args)
        if key not in self._recordings:
            self._calls[key] += 1
            if self._calls[key] <= _CALLS_BEFORE or len(self._recordings) == _MOST_SHAPES:
                return self.function(*args)
            self._recordings[key] = self._record(args)
        recording = self._recordings[key]
        for here, given in zip(recording.inputs, _by_type(tensors(args)), strict=True):
            torch._foreach_copy_(here, given)
        recording.graph.replay()
        # The next replay overwrites what this one wrote. A product is one launch for all, where clones are one each.
        fresh = torch._foreach_mul(list(tensors(recording.outputs)), 1)
        return cast("_Result", with_tensors(recording.outputs, iter(fresh)))

    def _record(self, args: tuple[Any, ...]) -> _Recording:
        inputs = [tensor.clone() for tensor in tensors(args)]

        def run() -> Any:
            return self.function(*with_tensors(args, iter(inputs)))

        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # libraries choose their algorithms and workspaces before, not while, recording
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(aside)
        # One pool for all: recordings never run side by side, and what they write is copied at once.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
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
    """The same structure with other tensors, in the order of `tensors`."""
    if isinstance(value, Tensor):
        return next(others)
    if isinstance(value, (list, tuple)):
        items = [with_tensors(item, others) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, TensorUnit):
        unit = copy.copy(value)
        for name in TensorUnit.KEPT:
            setattr(unit, name, with_tensors(getattr(value, name), others))
        return unit
    return value


def _by_type(values: Iterable[Tensor]) -> list[list[Tensor]]:
    """One list for each type, in the order of their first tensors: torch copies lists of one type in one launch."""
    lists: dict[torch.dtype, list[Tensor]] = {}
    for value in values:
        lists.setdefault(value.dtype, []).append(value)
    return list(lists.values())


def _shape(value: Any) -> Any:
    """What a recording is bound to: all but the numbers in the tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_shape(item) for item in value)
    if isinstance(value, TensorUnit):
        return tuple(_shape(getattr(value, name)) for name in TensorUnit.KEPT)
    return value
