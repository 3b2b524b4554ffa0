"""A recorder that needs no card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dstill.derivatives.cuda_graphs import Recorder, _by_type, _Recording, tensors, with_tensors


class Graph:
    """Imitates a CUDA graph by running the function again."""

    def __init__(self, run: Callable[[], list[Any]]) -> None:
        self.run, self.outputs, self.replays = run, run(), 0

    def replay(self) -> None:
        self.replays += 1
        for old, new in zip(tensors(self.outputs), tensors(self.run()), strict=True):
            old.copy_(new)


class OnTheProcessor(Recorder):
    """Records on the CPU, without a card."""

    def _on_a_card(self, calls: Sequence[tuple[Any, ...]]) -> bool:
        return True

    def _record(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> _Recording:
        inputs: list[Tensor] = [tensor.clone() for tensor in tensors(calls)]
        graph = Graph(lambda: [function(*args) for args in with_tensors(calls, iter(inputs))])
        return _Recording(graph, _by_type(inputs), graph.outputs)  # type: ignore[arg-type]


class Watched(Recorder):
    """Notes the name of every function and the number of calls that it is performed for at once."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[tuple[str, int]] = []

    def _performed(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        self.groups.append((function.__name__, len(calls)))
        return super()._performed(function, calls)
