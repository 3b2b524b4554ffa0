"""Works side by side compute what they compute one after another, and what they call at the same time is performed together."""

from __future__ import annotations

import contextlib
import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.recording import Graph, OnTheProcessor, Watched
from torch import Tensor

from dstill.data import siamese
from dstill.derivatives import cuda_graphs
from dstill.derivatives.cuda_graphs import CALLS_BEFORE, MOST_SHAPES, Recorder, _branched
from dstill.nets.convnet import ConvNet
from dstill.support.devices import full_precision
from dstill.unrolling.student import Student
from dstill.unrolling.types import Step, Unrolled
from dstill.unrolling.unroll import unroll

on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA card")
Work = Callable[[], Any]


class WatchedOnACard(Watched, OnTheProcessor):
    """Kinds of calls differ in their shapes on a card alone."""


def double(x: Tensor) -> Tensor:
    return 2 * x


def triple(x: Tensor) -> Tensor:
    return 3 * x


def fails(x: Tensor) -> Tensor:
    raise ValueError(f"cannot take {x.tolist()}")


def chain(call: Recorder, start: float, names: str, size: int = 1) -> Work:
    """A work that passes a vector through functions: d doubles it, t triples it."""

    def work() -> Tensor:
        value = torch.full((size,), start)
        for name in names:
            value = call({"d": double, "t": triple, "f": fails}[name], value) + 1
        return value

    return work


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def test_calls_of_one_kind_are_performed_together_and_answered_each_by_its_own() -> None:
    recorder = Watched()
    found = recorder.side_by_side([chain(recorder, start, "dt") for start in (1.0, 2.0, 3.0)])
    assert [value.tolist() for value in found] == [[10.0], [16.0], [22.0]]
    assert recorder.groups == [("double", 3), ("triple", 3)]


def test_a_single_work_and_calls_outside_of_works_are_performed_as_ever() -> None:
    recorder = Watched()
    assert recorder.side_by_side([]) == [] and recorder.side_by_side([threading.current_thread]) == [threading.current_thread()]
    assert recorder(double, torch.ones(1)).item() == 2 and recorder.groups == [("double", 1)]


def test_one_work_runs_at_a_time_and_in_the_order_of_the_works() -> None:
    recorder, log, running = Watched(), list[tuple[int, int]](), threading.Lock()

    def numbered(number: int) -> Work:
        def work() -> int:
            for turn in range(3):
                assert running.acquire(blocking=False)
                log.append((turn, number))
                running.release()
                recorder(double, torch.ones(1))
            return number

        return work

    assert recorder.side_by_side([numbered(number) for number in range(4)]) == [0, 1, 2, 3]
    assert log == [(turn, number) for turn in range(3) for number in range(4)]


def test_arguments_of_other_shapes_form_a_group_of_their_own() -> None:
    recorder = WatchedOnACard()
    works = [chain(recorder, 1.0, "dd", size) for size in (1, 2, 1, 2, 2)]
    found = recorder.side_by_side(works)
    assert [value.tolist() for value in found] == [[7.0] * size for size in (1, 2, 1, 2, 2)]
    sizes = [size for _, size in recorder.groups]
    assert sum(sizes) == 10 and sizes.count(3) == 0, "three of five are a pair and a single one, so that few need recording"
    assert sizes == [2, 2, 2, 1, 2, 1]


def test_a_work_that_ends_early_holds_nobody_up() -> None:
    recorder = Watched()
    found = recorder.side_by_side([chain(recorder, 0.0, names) for names in ("ddd", "", "d", "ddd")])
    assert [value.item() for value in found] == [7, 0, 1, 7]
    assert [size for _, size in recorder.groups] == [2, 1, 2, 2]


def test_whoever_is_ahead_waits_so_that_last_steps_are_taken_together() -> None:
    """Also if a work that has no first steps is the first to be seen, once the order is known."""
    recorder = Watched()
    for _ in range(2):
        recorder.groups.clear()
        names = ["ttt", "dttt", "dddttt"]
        found = recorder.side_by_side([chain(recorder, 0.0, some) for some in names])
        assert [value.item() for value in found] == [chain(Recorder(), 0.0, some)().item() for some in names]
    assert recorder.groups == [("double", 2), ("double", 1), ("double", 1), ("triple", 3), ("triple", 3), ("triple", 3)]


def test_an_error_of_a_work_reaches_the_caller_and_ends_the_others() -> None:
    recorder, ended = Watched(), list[int]()

    def endless(number: int) -> Work:
        def work() -> None:
            try:
                while True:
                    recorder(double, torch.ones(1))
            except Exception:
                ended.append(-1)  # no such error
            finally:
                with contextlib.suppress(Exception):
                    recorder(double, torch.ones(1))  # must not wait any more
                ended.append(number)

        return work

    def broken() -> None:
        recorder(double, torch.ones(1))
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        recorder.side_by_side([endless(0), broken, endless(2)])
    assert recorder.groups == [("double", 3)]
    assert ended == [], "the call in `finally` was refused"
    assert recorder.side_by_side([chain(recorder, 1.0, "d")] * 2) == [torch.tensor([3.0])] * 2, "and it works again"


def test_an_error_of_a_call_reaches_the_caller() -> None:
    recorder = Watched()
    with pytest.raises(ValueError, match=r"cannot take \[2.0\]"):
        recorder.side_by_side([chain(recorder, start, "f") for start in (2.0, 3.0)])
    with pytest.raises(ValueError, match=r"cannot take \[3.0, 3.0\]"):
        recorder.side_by_side([chain(recorder, 1.0, "df", 2), chain(recorder, 1.0, "ddd")])


def test_an_interrupt_ends_all_works() -> None:
    recorder, main, ended = Watched(), threading.main_thread().ident, list[int]()
    assert main is not None and threading.current_thread() is threading.main_thread()

    def endless(number: int) -> Work:
        def work() -> None:
            try:
                while True:
                    recorder(double, torch.ones(1))
                    if number == 1:
                        signal.pthread_kill(main, signal.SIGINT)
            finally:
                ended.append(number)

        return work

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            recorder.side_by_side([endless(number) for number in range(3)])
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(ended) == [0, 1, 2]


def test_works_have_the_grad_mode_of_their_caller_and_calls_record_no_gradient() -> None:
    recorder = Watched()

    def modes() -> tuple[bool, bool]:
        return torch.is_grad_enabled(), recorder(square, torch.ones(1, requires_grad=True)).requires_grad

    def square(x: Tensor) -> Tensor:
        return x * x

    assert recorder.side_by_side([modes] * 2) == [(True, False)] * 2
    with torch.no_grad():
        assert recorder.side_by_side([modes] * 2) == [(False, False)] * 2


def test_a_precision_that_a_work_has_set_is_not_that_of_others() -> None:
    recorder, seen = Watched(), dict[str, list[bool]]()

    def look(name: str) -> None:
        seen.setdefault(name, []).append(torch.backends.cudnn.allow_tf32)
        recorder(double, torch.ones(1))
        seen[name].append(torch.backends.cudnn.allow_tf32)

    def exact() -> None:
        with full_precision():
            look("exact")

    def broken() -> None:
        torch.backends.cudnn.allow_tf32 = False
        raise ValueError

    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = True
        recorder.side_by_side([exact, lambda: look("plain"), exact])
        assert seen == {"exact": [False] * 4, "plain": [True] * 2}
        with pytest.raises(ValueError):
            recorder.side_by_side([exact, broken])
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_calls_of_another_recorder_are_performed_where_they_come_from() -> None:
    recorder, other = Watched(), Watched()
    recorder.side_by_side([chain(other, 1.0, "dd"), chain(recorder, 1.0, "d"), chain(other, 1.0, "t")])
    assert recorder.groups == [("double", 1)] and [size for _, size in other.groups] == [1, 1, 1]


def test_groups_are_recorded_and_replayed() -> None:
    recorder = OnTheProcessor()
    names = "dt" * (CALLS_BEFORE + 5)
    found = recorder.side_by_side([chain(recorder, start, names) for start in (1e-9, 2e-9, 3e-9)])
    assert all(
        torch.equal(value, chain(Recorder(), start, names)()) for value, start in zip(found, (1e-9, 2e-9, 3e-9), strict=True)
    )
    assert sorted(key[:2] for key in recorder.recordings) == [("double", 3), ("triple", 3)]
    for recording in recorder.recordings.values():
        assert recording is not None and isinstance(recording.graph, Graph) and recording.graph.replays == 5


def test_a_group_that_the_card_has_no_memory_for_is_performed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    record = OnTheProcessor._record

    def full(self: Any, function: Any, calls: Sequence[Any]) -> Any:
        if len(calls) > 1:
            raise torch.OutOfMemoryError("full")
        return record(self, function, calls)

    monkeypatch.setattr(OnTheProcessor, "_record", full)
    recorder = OnTheProcessor()
    names = "d" * (2 * CALLS_BEFORE + 3)
    found = recorder.side_by_side([chain(recorder, start, names) for start in (1e-9, 2e-9)])
    assert all(torch.equal(value, chain(Recorder(), start, names)()) for value, start in zip(found, (1e-9, 2e-9), strict=True))
    (of_two, none), (of_one, recording) = recorder.recordings.items()
    assert (of_two[1], none, of_one[1]) == (2, None, 1)
    assert recording is not None and isinstance(recording.graph, Graph) and recording.graph.replays > CALLS_BEFORE


def test_each_number_of_calls_has_shapes_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "CALLS_BEFORE", 0)
    recorder = OnTheProcessor()
    for size in range(1, MOST_SHAPES + 3):
        found = recorder.side_by_side([chain(recorder, 1.0, "d", size)] * 2)
        assert all(torch.equal(value, torch.full((size,), 3.0)) for value in found)
    recorded = [calls for _, calls, _ in recorder.recordings]
    assert recorded == [2] * MOST_SHAPES + [1] * 2, "those beyond are performed one by one"


def test_the_order_keeps_no_tensor() -> None:
    """On a CPU, arguments may hold what a recorder cannot take apart."""

    class Holder:
        tensor = torch.ones(1)

    recorder, watched = Recorder(), list[weakref.ref[Holder]]()

    def work() -> None:
        watched.append(weakref.ref(holder := Holder()))
        recorder(lambda x, held: x, torch.ones(1), holder)

    recorder.side_by_side([work] * 2)
    assert [reference() for reference in watched] == [None, None]


@pytest.mark.parametrize("error", [False, True])
def test_nothing_of_a_work_outlives_it(error: bool) -> None:
    """At once and not at the next garbage collection, since works hold memory of the card."""
    recorder, watched = Recorder(), list[weakref.ref[Tensor]]()

    def work() -> None:
        held = torch.ones(1)
        watched.append(weakref.ref(held))
        recorder(double, held)
        if error and len(watched) == 2:
            raise ValueError

    gc.disable()
    try:
        with pytest.raises(ValueError) if error else contextlib.nullcontext():
            recorder.side_by_side([work] * 2)
        assert [reference() for reference in watched] == [None, None]
    finally:
        gc.enable()


class _Card:
    """Imitates torch's streams and graphs, and notes what is done in which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.made = 0
        self.current = _Stream(self, "current")
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", self.stream)
        monkeypatch.setattr(torch.cuda, "stream", self.within)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
        monkeypatch.setattr(torch.cuda, "graph", self.recording)

    def stream(self) -> _Stream:
        self.made += 1
        return _Stream(self, f"stream {self.made}")

    @contextlib.contextmanager
    def within(self, stream: _Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def recording(self, graph: str, pool: str, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
        assert (graph, pool, capture_error_mode) == ("graph", "pool", "thread_local")
        self.log.append("record")
        with self.within(stream):
            yield
        self.log.append("recorded")

    def triple(self, x: Tensor) -> Tensor:
        self.log.append(f"{x.item():g} in {self.current.name}")
        return 3 * x


class _Stream:
    def __init__(self, card: _Card, name: str) -> None:
        self.card, self.name = card, name

    def wait_stream(self, other: _Stream) -> None:
        self.card.log.append(f"{self.name} waits for {other.name}")


BRANCHED = [
    "stream 2 waits for stream 1",
    "stream 3 waits for stream 1",
    *("1 in stream 1", "2 in stream 2", "3 in stream 3"),
    "stream 1 waits for stream 2",
    "stream 1 waits for stream 3",
]


def test_a_recording_forks_after_its_beginning_and_joins_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    card, recorder = _Card(monkeypatch), Recorder()
    recording = recorder._record(card.triple, [(torch.tensor([value]),) for value in (1.0, 2.0, 3.0)])
    around = ["stream 1 waits for current", *BRANCHED, *BRANCHED, "current waits for stream 1"]
    assert card.log == [*around, "record", *BRANCHED, "recorded"]
    assert [value.item() for value in recording.outputs] == [3, 6, 9] and [len(some) for some in recording.inputs] == [3]
    card.log.clear()
    recorder._record(card.triple, [(torch.tensor([1.0]),)])
    assert card.made == 3, "memory is reused on its own stream alone, so that all recordings have the same streams"
    one = ["1 in stream 1"]
    assert card.log == ["stream 1 waits for current", *one, *one, "current waits for stream 1", "record", *one, "recorded"]


def test_branches_join_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    card = _Card(monkeypatch)

    def full(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        _branched(full, [(torch.ones(1),)] * 2, [card.stream()])  # type: ignore[list-item]
    assert card.log == ["stream 1 waits for current", "current waits for stream 1"]


def test_works_run_in_the_stream_of_their_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []

    @contextlib.contextmanager
    def within(stream: Any) -> Iterator[None]:
        entered.append(f"{stream} {threading.current_thread() is threading.main_thread()}")
        yield

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "mine")
    monkeypatch.setattr(torch.cuda, "stream", within)
    Recorder().side_by_side([lambda: None] * 2)
    assert entered == ["mine False"] * 2


def _works(student: Student, count: int, steps: int = 40) -> list[Callable[[], Unrolled]]:
    """Unrolled gradients of different starts, batches and augmentations, in float64 so that rounding hides no fault."""
    generator, like = torch.Generator().manual_seed(1), next(student.net.parameters())
    images, labels = torch.randn(12, 3, 16, 16, generator=generator).to(like), (torch.arange(12) % 10).to(like.device)
    alpha = torch.tensor(0.02).to(like)

    def work(number: int) -> Callable[[], Unrolled]:
        own = torch.Generator().manual_seed(number)
        theta = (0.1 * torch.randn(student.numel, generator=own)).to(like)
        rows = [torch.randperm(12, generator=own)[:6].to(like.device) for _ in range(steps)]
        taken = [Step(some, siamese.sample("flip_scale", 6, own)) for some in rows]
        return lambda: unroll(student, theta, images, labels, taken, alpha, {steps: (theta + 0.02, 1.0)}, memory="keep")

    return [work(number) for number in range(count)]


def _network() -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(3, 10, (16, 16), width=8, depth=2).double()


def _check_branches(student: Student, plain: Student, branches: int, steps: int = 40) -> None:
    for _ in range(2):  # the second time with recordings from the beginning
        beside = student.side_by_side(_works(student, branches, steps))
    after = plain.side_by_side(_works(plain, branches, steps))
    assert isinstance(student._call, Recorder)
    recorded = [key[1] for key, recording in student._call.recordings.items() if recording is not None]
    assert recorded == [branches, branches], "gradients and tangents"
    for one, other in zip(beside, after, strict=True):
        torch.testing.assert_close(one.loss, other.loss)
        torch.testing.assert_close(one.grads.images, other.grads.images, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(one.grads.alpha, other.grads.alpha, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(beside[0].grads.images, beside[1].grads.images), "each has its own"


def test_students_in_groups_compute_what_they_compute_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "CALLS_BEFORE", 2)
    student, plain = (Student(_network(), native=False) for _ in range(2))
    student._call = OnTheProcessor()
    for one in (student, plain):
        written = one.derivatives(torch.zeros(1, dtype=torch.float64))
        assert written is not None
        written.piece = None  # a card processes a batch in one piece
    _check_branches(student, plain, 3, steps=6)


@on_a_card
@pytest.mark.parametrize("branches", [2, 3, 8])
@pytest.mark.parametrize("native", [True, False])
def test_branches_of_a_graph_compute_what_students_compute_one_after_another(branches: int, native: bool) -> None:
    student, plain = (Student(_network().cuda(), native=native, replayed=some) for some in (True, False))
    _check_branches(student, plain, branches)


@on_a_card
def test_what_branches_hold_is_released_with_the_student() -> None:
    net = _network().cuda()

    def held() -> int:
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream, which torch keeps
        return torch.cuda.memory_allocated()

    before, student = held(), Student(net)
    student.side_by_side(_works(student, 4))
    assert held() > before + 2**20
    del student
    assert held() < before + 2**12, "apart from a few numbers of torch's own"
