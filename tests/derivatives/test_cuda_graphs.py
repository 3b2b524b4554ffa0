"""Replayed kernels give the same numbers as kernels launched one by one. Recording needs an NVIDIA card."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.recording import OnTheProcessor
from torch import Tensor

from dstill.data import siamese
from dstill.derivatives.cuda_graphs import (
    CALLS_BEFORE,
    MOST_SHAPES,
    Caller,
    Recorder,
    directly,
    tensors,
    with_tensors,
)
from dstill.derivatives.engine import Derivatives, Gradient
from dstill.derivatives.unit import TensorUnit
from dstill.nets.convnet import ConvNet
from dstill.training.fit import fit
from dstill.unrolling.student import Student
from dstill.unrolling.types import Step
from dstill.unrolling.unroll import unroll

on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need an NVIDIA card")


def test_a_structure_is_taken_apart_and_put_together_again() -> None:
    unit = TensorUnit(torch.ones(2), torch.zeros(2))
    unit.backward(torch.ones_like(unit.forward(torch.randn(1, 2, 4, 4))))
    value = Gradient(torch.tensor(1.0), [torch.ones(2), torch.zeros(3)], [[unit]], torch.ones(1, 2))
    parts = list(tensors(value))
    doubled = with_tensors(value, iter([2 * part for part in parts]))
    assert isinstance(doubled, Gradient) and doubled.kept is not None
    assert [part.shape for part in tensors(doubled)] == [part.shape for part in parts]
    assert float(doubled.loss) == 2 and float(value.loss) == 1
    other = doubled.kept[0][0]
    assert isinstance(other, TensorUnit) and other is not unit
    assert other.z is not None and unit.z is not None and torch.equal(other.z, 2 * unit.z)


def test_what_is_put_together_shares_nothing_with_what_it_came_from() -> None:
    """The next replay overwrites the tensors of a recording."""
    unit = TensorUnit(torch.ones(2), torch.zeros(2))
    unit.backward(torch.ones_like(unit.forward(torch.randn(1, 2, 4, 4))))
    copied = with_tensors(unit, iter([part.clone() for part in tensors(unit)]))
    assert vars(copied).keys() == set(TensorUnit.KEPT)
    assert not {part.data_ptr() for part in vars(copied).values()} & {part.data_ptr() for part in tensors(unit)}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_a_student_that_is_replayed_takes_the_same_way(precision: Any, soft: bool, memory: Any) -> None:
    """Batches of ten and five alternate; pooling does not divide the sides."""
    torch.manual_seed(0)
    net, generator = ConvNet(3, 10, (9, 11), width=4, depth=2), torch.Generator().manual_seed(1)
    theta = torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])
    images = torch.randn(25, 3, 9, 11, generator=generator)
    labels = torch.randn(25, 10, generator=generator) if soft else torch.arange(25) % 10
    rows = [some for _ in range(30) for some in torch.randperm(25, generator=generator).split(10)]
    steps = [Step(some, siamese.sample("flip_crop_colour", len(some), generator)) for some in rows]
    targets = {len(steps): (theta + 0.02, 1.0)}
    found: list[list[Tensor]] = []
    recorder = OnTheProcessor()
    ways: tuple[Caller, ...] = (directly, recorder)
    for call in ways:
        student = Student(net, precision=precision, native=False)
        student._call = call
        written = student.derivatives(theta)
        assert written is not None
        written.piece = None  # a card processes a batch in one piece
        result = unroll(student, theta, images, labels, steps, torch.tensor(0.02), targets, memory=memory)
        found.append([result.loss, *tensors(list(vars(result.grads).values())), *result.trace.inner_losses])
    assert len(recorder.recordings) == 4, "two functions of two shapes"
    for recording in recorder.recordings.values():
        assert recording is not None and recording.graph.replays >= 9  # type: ignore[attr-defined]
    for plain, replayed in zip(*found, strict=True):
        assert torch.equal(plain, replayed)


def test_beyond_the_most_shapes_and_without_memory_functions_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(x: Tensor) -> list[Tensor]:
        return [2 * x]

    recorder = OnTheProcessor()
    for size in range(1, MOST_SHAPES + 3):
        for _ in range(CALLS_BEFORE + 2):
            assert torch.equal(recorder(double, torch.ones(size))[0], 2 * torch.ones(size))
    assert len(recorder.recordings) == MOST_SHAPES

    def full(self: Any, function: Any, calls: Any) -> Any:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(OnTheProcessor, "_record", full)
    recorder = OnTheProcessor()
    for _ in range(CALLS_BEFORE + 3):
        assert torch.equal(recorder(double, torch.ones(2))[0], 2 * torch.ones(2))
    assert list(recorder.recordings.values()) == [None]


def test_what_made_a_recording_is_gone_with_its_last_name() -> None:
    """At once and not at the next garbage collection, since a recording holds memory of the card."""
    net = ConvNet(3, 10, (8, 8), width=4, depth=2)
    student = Student(net, native=False)
    theta = torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])
    student.gradient(theta, torch.randn(2, 3, 8, 8), torch.arange(2))
    watched = weakref.ref(student), weakref.ref(student.derivatives(theta))
    gc.disable()
    try:
        del student
        assert [reference() for reference in watched] == [None, None]
    finally:
        gc.enable()


def test_none_stays_where_no_tensor_was() -> None:
    assert with_tensors([None, (True, torch.ones(1))], iter([torch.zeros(1)])) == [None, (True, torch.zeros(1))]


def _network() -> tuple[ConvNet, torch.device]:
    torch.manual_seed(0)
    device = torch.device("cuda")
    return ConvNet(3, 10, (16, 16), width=8, depth=2).to(device), device


def _batches(device: torch.device, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for _ in range(count):
        yield torch.randn(6, 3, 16, 16, device=device), torch.randn(6, 10, device=device).softmax(1)


@on_a_card
@pytest.mark.parametrize("precision", ["float32", "bfloat16-backward", "bfloat16"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_replayed_derivatives_are_those_launched_one_by_one(precision: Any, compiled: bool, keep: bool) -> None:
    net, device = _network()
    parameters = [parameter.detach() for parameter in net.parameters()]
    direction = [torch.randn_like(parameter) for parameter in parameters]
    made: dict[str, Any] = {"precision": precision, "compiled": compiled, "native": not compiled}
    recorder = Recorder()
    ways = [Derivatives(net, device, **made), Derivatives(net, device, call=recorder, **made)]
    results: list[list[Tensor]] = [[], []]
    for images, targets in _batches(device, CALLS_BEFORE + 5):
        for found, way in zip(results, ways, strict=True):
            gradient = way.gradient(parameters, images, targets, keep=keep)
            found += [gradient.loss, *gradient.parameters, gradient.logits]
            found += tensors(way.tangents(parameters, direction, images, targets, gradient.kept))
            found += tensors(way.penalty(parameters, images, pixelwise=False))
    assert len(recorder.recordings) == 3
    for plain, replayed in zip(*results, strict=True):
        torch.testing.assert_close(replayed, plain, rtol=1e-4, atol=1e-5)


@on_a_card
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_the_unrolled_gradient_on_a_card_is_that_of_float64_on_the_processor(memory: Any) -> None:
    net, device = _network()
    generator = torch.Generator().manual_seed(1)
    theta = torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()])
    images, labels = torch.randn(20, 3, 16, 16, generator=generator), torch.arange(20) % 10
    target = theta + 0.02 * torch.randn(len(theta), generator=generator).to(device)
    draws = [(torch.randperm(20, generator=generator)[:10], siamese.sample("flip_scale", 10, generator)) for _ in range(30)]

    def found(device: torch.device, dtype: torch.dtype, **options: Any) -> Tensor:
        steps = [Step(rows.to(device), params) for rows, params in draws]
        moved = (theta.to(device, dtype), images.to(device, dtype), labels.to(device), steps)
        student, alpha = Student(net.to(device, dtype)), torch.tensor(0.02, device=device, dtype=dtype)
        result = unroll(student, *moved, alpha, {30: (target.to(device, dtype), 1.0)}, **options)
        return torch.cat([result.grads.images.reshape(-1), result.grads.alpha.reshape(-1)]).cpu().double()

    card = found(device, torch.float32, memory=memory)
    plain = found(device, torch.float32, gradient="graph")
    truth = found(torch.device("cpu"), torch.float64, gradient="graph")
    # The error comes from ReLU masks that flip, not from arithmetic: allow as much as plain autograd has.
    assert (card - truth).norm() <= 3 * (plain - truth).norm() + 1e-4 * truth.norm()


@on_a_card
def test_a_network_trains_on_a_card_as_on_the_processor() -> None:
    net, device = _network()
    images, labels = torch.randn(64, 3, 16, 16), torch.arange(64) % 10
    start = {name: value.clone() for name, value in net.state_dict().items()}
    losses: list[list[float]] = []
    for where in (device, torch.device("cpu")):
        net.load_state_dict(start)
        net.to(where)
        seen: list[float] = []
        fit(
            net,
            images.to(where),
            labels.to(where),
            epochs=10,
            batch_size=16,
            optimiser=torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
            generator=torch.Generator().manual_seed(0),
            augmentation="flip_crop",
            observer=lambda report, seen=seen: seen.append(report.loss),  # type: ignore[misc]
        )
        losses.append(seen)
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=1e-4)
    assert losses[0][-1] < losses[0][0]
