"""Steps equal torch.optim; pullbacks equal autograd; the whole unroll equals torchopt's differentiable Adam."""

from __future__ import annotations

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dstill.data import siamese
from dstill.errors import DstillError
from dstill.nets.convnet import ConvNet
from dstill.support import seeding
from dstill.unrolling import optimisers
from dstill.unrolling.optimisers import Adam, Optimiser, Sgd, optimiser
from dstill.unrolling.student import Student
from dstill.unrolling.types import Step
from dstill.unrolling.unroll import unroll

ALL: list[Optimiser] = [
    Sgd(),
    Sgd(weight_decay=0.1),
    Sgd(momentum=0.9, weight_decay=0.1),
    Adam(),
    Adam(betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
    Adam(weight_decay=0.1, decoupled=True),
]


def torchs(one: Optimiser, parameter: Tensor) -> torch.optim.Optimizer:
    if isinstance(one, Sgd):
        return torch.optim.SGD([parameter], lr=0.1, momentum=one.momentum, weight_decay=one.weight_decay)
    assert isinstance(one, Adam)
    kind = torch.optim.AdamW if one.decoupled else torch.optim.Adam
    return kind([parameter], lr=0.1, betas=one.betas, eps=one.eps, weight_decay=one.weight_decay)


def drawn(count: int = 37) -> Tensor:
    return torch.randn(count, generator=seeding.generator(0, "drawn"), dtype=torch.float64)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("one", ALL, ids=str)
def test_steps_equal_torchs_optimiser(one: Optimiser, native: bool) -> None:
    theta, generator = drawn(), torch.Generator().manual_seed(1)
    live = theta.clone().requires_grad_()
    reference, buffers = torchs(one, live), one.start(theta)
    for number in range(1, 6):
        live.grad = torch.randn(len(theta), generator=generator, dtype=torch.float64)
        live.grad[:3] = 0  # these never move, as biases before a norm
        with torch.set_grad_enabled(not native):
            theta, buffers, _ = one.step(theta, buffers, live.grad, torch.tensor(0.1, dtype=torch.float64), number)
        reference.step()
        torch.testing.assert_close(theta.detach(), live.detach(), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("one", ALL, ids=str)
def test_pullbacks_equal_autograd(one: Optimiser, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(optimisers, "kernels", lambda: None)
    theta, lr = drawn().requires_grad_(), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    # Second moments are positive: at 0, with a gradient, autograd's own derivative of the root is infinite.
    buffers = tuple((drawn() ** 2 + 0.1).requires_grad_() for _ in one.start(theta))
    gradient = drawn().flip(0).requires_grad_()
    stepped = one.step(theta, buffers, gradient, lr, 3)
    outputs = (stepped.theta, *stepped.buffers)
    cotangents = [torch.cos((k + 1) * drawn()) for k in range(len(outputs))]
    inputs = (gradient, theta, lr, *buffers)
    expected = torch.autograd.grad(outputs, inputs, cotangents)
    with torch.no_grad():
        kept = tuple(tensor.detach() for tensor in stepped.kept)
        pulled = one.pullback(theta.detach(), kept, lr.detach(), 3, cotangents[0], tuple(cotangents[1:]))
        h = gradient @ pulled.gradient
        found = (pulled.gradient, pulled.theta, pulled.by_lr(h), *pulled.buffers)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("native", [False, True])
def test_a_weight_without_any_gradient_has_no_slope(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(optimisers, "kernels", lambda: None)
    adam, zero, one = Adam(), torch.zeros(4), torch.ones(4)
    with torch.no_grad():
        stepped = adam.step(one, (zero, zero), zero, torch.tensor(0.1), 1)
        pulled = adam.pullback(one, stepped.kept, torch.tensor(0.1), 1, one, (zero, zero))
    assert torch.equal(stepped.theta, one)
    assert torch.isfinite(pulled.gradient).all() and torch.equal(pulled.buffers[1], zero)
    live = zero.clone().requires_grad_()
    graph = adam.step(one, (zero, zero), live, torch.tensor(0.1), 1)
    assert torch.isfinite(torch.autograd.grad(graph.theta.sum(), live)[0]).all()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(2, 5),
    depth=st.integers(1, 2),
    classes=st.integers(2, 4),
    steps=st.integers(1, 5),
    burn_in=st.integers(0, 3),
    soft=st.booleans(),
    native=st.booleans(),
)
def test_the_unroll_equals_torchopts_differentiable_adam(
    seed: int, width: int, depth: int, classes: int, steps: int, burn_in: int, soft: bool, native: bool
) -> None:
    g, burn_in = seeding.generator(seed, "case"), min(burn_in, steps - 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ConvNet(2, classes, (8, 8), width=width, depth=depth).double()
    student = Student(net, native=native)
    theta0 = torch.randn(student.numel, generator=g, dtype=torch.float64)
    images = torch.randn(5, 2, 8, 8, generator=g, dtype=torch.float64)
    labels = torch.randn(5, classes, generator=g, dtype=torch.float64) if soft else torch.arange(5) % classes
    draws = [Step(torch.randperm(5, generator=g)[:4], siamese.sample("flip_crop", 4, g)) for _ in range(steps)]
    target = torch.randn(student.numel, generator=g, dtype=torch.float64)

    def outer(theta: Tensor) -> tuple[Tensor, Tensor]:
        return (theta - target).square().sum(), 2 * (theta - target)

    found = unroll(
        student,
        theta0,
        images,
        labels,
        draws,
        torch.tensor(0.01, dtype=torch.float64),
        outer,
        # The conv biases' gradients are rounding noise. A large ε keeps either side from turning it into whole steps.
        optimiser=Adam(eps=1e-4),
        burn_in=burn_in,
    )
    torch.set_default_dtype(torch.float64)  # else torchopt corrects the moments' bias in float32
    try:
        value, by = through_torchopt(student, theta0, images, labels, draws, burn_in, target)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found.loss, value, rtol=1e-10, atol=0)
    assert len(by) == (2 if soft else 1)
    for ours, theirs in zip((found.grads.images, found.grads.labels), by, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * float(theirs.abs().max()))


def through_torchopt(
    student: Student, theta0: Tensor, images: Tensor, labels: Tensor, draws: list[Step], burn_in: int, target: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """|θ_N - target|² and its gradients by images and label logits, by torchopt's functional Adam and plain autograd."""
    soft = labels.is_floating_point()
    adam = torchopt.adam(lr=0.01, eps=1e-4, eps_root=1e-30)
    live, logits = images.clone().requires_grad_(), labels.clone().requires_grad_(soft)
    weights: tuple[Tensor, ...] = (theta0.clone().requires_grad_(),)
    state = adam.init(weights)
    for n, (rows, params) in enumerate(draws, 1):
        loss = student.loss(weights[0], siamese.apply(live[rows], params), logits[rows])
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        updates, state = adam.update(gradients, state, inplace=False)
        weights = torchopt.apply_updates(weights, updates, inplace=False)
        if n <= burn_in:
            weights = tuple(weight.detach().requires_grad_() for weight in weights)
            state = torchopt.pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, state)
    value = (weights[0] - target).square().sum()
    return value.detach(), torch.autograd.grad(value, [live, logits] if soft else [live])


def test_optimisers_have_names() -> None:
    assert optimiser("sgd", momentum=0.5, weight_decay=0.1) == Sgd(0.5, 0.1)
    assert optimiser("adam", momentum=0.5) == Adam()
    assert optimiser("adamw", weight_decay=0.1) == Adam(weight_decay=0.1, decoupled=True)
    assert [one.vectors for one in (Sgd(), Sgd(0.9), Adam())] == [1, 2, 4]
    with pytest.raises(DstillError, match="take sgd, adam or adamw"):
        optimiser("lion")
