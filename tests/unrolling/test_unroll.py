"""The adjoint equals plain autograd; the inner step equals torch.optim; TESLA's form equals its published formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dstill.data import siamese
from dstill.errors import DstillError
from dstill.nets.convnet import ConvNet
from dstill.support import seeding
from dstill.training.fit import cross_entropy
from dstill.unrolling.adjoint import adjoint
from dstill.unrolling.optimisers import Adam, Optimiser, Sgd, sgd_step
from dstill.unrolling.student import Student
from dstill.unrolling.types import FinalLoss, Step, Targets, Unrolled
from dstill.unrolling.unroll import unroll

DSA = "colour_crop_cutout_flip_scale_rotate"


def small_net(norm: str = "instance", width: int = 4, depth: int = 2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ConvNet(2, 3, (8, 8), width=width, depth=depth, norm=norm).double()  # type: ignore[arg-type]


class Case:
    """One random unrolled problem in float64."""

    def __init__(self, *, seed: int = 0, count: int = 6, batch: int = 6, steps: int = 4, soft: bool = False, dsa: bool = True):
        g = seeding.generator(seed, "case")
        self.net = small_net()
        self.theta0 = parameters_to_vector(self.net.parameters()).detach()
        self.images = torch.randn(count, 2, 8, 8, generator=g, dtype=torch.float64)
        self.labels: Tensor = torch.randint(3, (count,), generator=g)
        if soft:
            self.labels = torch.randn(count, 3, generator=g, dtype=torch.float64)
        self.alpha = torch.tensor(0.05, dtype=torch.float64)
        self.steps = [
            Step(torch.randperm(count, generator=g)[:batch], siamese.sample(DSA if dsa else "none", batch, g))
            for _ in range(steps)
        ]
        points = {max(1, steps // 2): 0.3, steps: 0.7}
        self.targets: Targets | FinalLoss = {
            n: (self.theta0 + 0.1 * torch.randn(len(self.theta0), generator=g, dtype=torch.float64), w)
            for n, w in points.items()
        }

    def run(self, gradient: str, *, native: bool = True, **options: Any) -> Unrolled:
        student = Student(self.net, native=native)
        return unroll(
            student,
            self.theta0,
            self.images,
            self.labels,
            self.steps,
            self.alpha,
            self.targets,
            gradient=gradient,  # type: ignore[arg-type]
            **options,
        )


def assert_equal(a: Unrolled, b: Unrolled, tolerance: float) -> None:
    for x, y in (
        (a.loss, b.loss),
        (a.grads.images, b.grads.images),
        (a.grads.alpha, b.grads.alpha),
        (a.grads.labels, b.grads.labels),
        (a.trace.theta, b.trace.theta),
    ):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert (x - y).norm() <= tolerance * y.norm()


OPTIMISERS: list[Optimiser] = [
    Sgd(),
    Sgd(weight_decay=0.1),
    Sgd(momentum=0.5),
    Sgd(momentum=0.9, weight_decay=0.1),
    Adam(),
    Adam(betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
    Adam(weight_decay=0.1, decoupled=True),
]


def real_loss(case: Case) -> FinalLoss:
    """The cross-entropy of images that the student was not trained on, as a loss of its weights."""
    generator = seeding.generator(1, "real")
    images = torch.randn(9, 2, 8, 8, generator=generator, dtype=torch.float64)
    student, labels = Student(case.net), torch.arange(9) % 3

    def loss(theta: Tensor) -> tuple[Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        with torch.enable_grad():
            value = student.loss(theta, images, labels)
        return value.detach(), torch.autograd.grad(value, theta)[0]

    return loss


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    soft=st.booleans(),
    batch=st.integers(2, 6),
    steps=st.integers(1, 5),
    burn_in=st.integers(0, 4),
    optimiser=st.sampled_from(OPTIMISERS),
    each=st.booleans(),
    final=st.booleans(),
    scale=st.sampled_from([0.3, 1.0, 2.5]),
    native=st.booleans(),
    memory=st.sampled_from(["auto", "keep", "recompute"]),
    dsa=st.booleans(),
)
def test_adjoint_equals_plain_autograd(
    seed: int,
    soft: bool,
    batch: int,
    steps: int,
    burn_in: int,
    optimiser: Optimiser,
    each: bool,
    final: bool,
    scale: float,
    native: bool,
    memory: str,
    dsa: bool,
) -> None:
    case = Case(seed=seed, soft=soft, batch=batch, steps=steps, dsa=dsa)
    burn_in = min(burn_in, steps - 1)
    if each:
        case.alpha = case.alpha * torch.linspace(0.5, 2.0, steps, dtype=torch.float64)
    if final:
        case.targets = real_loss(case)
    else:
        assert not callable(case.targets)
        case.targets = {n: target for n, target in case.targets.items() if n > burn_in}
    options = {"optimiser": optimiser, "burn_in": burn_in, "loss_scale": scale}
    adjoint = case.run("adjoint", native=native, memory=memory, **options)
    # Adam divides by the gradient's size: where that is nearly zero, the rounding of two implementations differs most.
    assert_equal(adjoint, case.run("graph", **options), 1e-11 if isinstance(optimiser, Sgd) else 1e-8)


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_adjoint_takes_any_module(norm: str) -> None:
    case = Case(soft=True)
    case.net = small_net(norm)
    case.theta0 = parameters_to_vector(case.net.parameters()).detach()
    case.targets = {4: (case.theta0 + 0.1, 1.0)}
    assert_equal(case.run("adjoint", optimiser=Sgd(0.9)), case.run("graph", optimiser=Sgd(0.9)), 1e-11)


def test_adjoint_passes_gradcheck_on_a_smooth_network() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    student = Student(net)
    theta0 = parameters_to_vector(net.parameters()).detach()
    labels = torch.randn(4, 3, dtype=torch.float64)
    steps = [
        Step(torch.tensor([0, 1, 2]), None),
        Step(torch.tensor([3, 1, 0]), None),
        Step(torch.tensor([2, 3, 1]), None),
    ]
    targets = {2: (theta0 + 0.1, 0.4), 3: (theta0 - 0.2, 1.0)}

    class Matched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, images: Tensor, logits: Tensor, alpha: Tensor) -> Tensor:
            out = unroll(student, theta0, images, logits, steps, alpha, targets, optimiser=Sgd(0.7, 0.1), loss_scale=1.3)
            ctx.save_for_backward(out.grads.images, out.grads.labels, out.grads.alpha)
            return out.loss

        @staticmethod
        def backward(ctx, grad: Tensor):
            return tuple(grad * g for g in ctx.saved_tensors)

    images = torch.randn(4, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Matched.apply, (images, labels.requires_grad_(), alpha))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_inner_step_equals_torch_sgd(momentum: float) -> None:
    case = Case(dsa=False)
    student = Student(case.net)
    theta, buffer = case.theta0, torch.zeros_like(case.theta0)
    live = small_net()
    vector_to_parameters(case.theta0, live.parameters())
    optimiser = torch.optim.SGD(live.parameters(), lr=0.05, momentum=momentum)
    for rows, _ in case.steps:
        _, gradient, _ = student.gradient(theta, case.images[rows], case.labels[rows])
        theta, buffer = sgd_step(theta, buffer, gradient, 0.05, momentum)
        optimiser.zero_grad()
        cross_entropy(live(case.images[rows]), case.labels[rows]).backward()
        optimiser.step()
    assert (theta - parameters_to_vector(live.parameters())).abs().max() < 1e-14


def test_tesla_equals_its_published_formula_and_differs_from_the_exact_gradient() -> None:
    case = Case(dsa=False)
    assert not callable(case.targets)
    target, _ = case.targets[4]
    case.targets = {4: (target, 1.0)}
    student = Student(case.net)
    theta, total, kept = case.theta0, torch.zeros_like(case.theta0), []
    for rows, _ in case.steps:
        kept.append((theta, rows))
        _, gradient, _ = student.gradient(theta, case.images[rows], case.labels[rows])
        theta, total = theta - case.alpha * gradient, total + gradient
    expected = torch.zeros_like(case.images)
    held = case.alpha * (target - case.theta0) + case.alpha**2 * total
    for at, rows in kept:
        images = case.images.clone().requires_grad_()
        at = at.detach().requires_grad_()
        (g,) = torch.autograd.grad(student.loss(at, images[rows], case.labels[rows]), at, create_graph=True)
        expected += 2 * torch.autograd.grad(g @ held, images)[0]
    tesla = case.run("tesla")
    assert (tesla.grads.images - expected).abs().max() < 1e-12
    assert (tesla.grads.alpha + 2 * (theta - target) @ total).abs() < 1e-10
    exact = case.run("adjoint")
    assert (tesla.grads.images - exact.grads.images).norm() > 1e-3 * exact.grads.images.norm()


def test_rows_never_seen_get_no_gradient() -> None:
    case = Case(batch=2)
    case.steps = [Step(torch.tensor([0, 3]), None)] * 4
    grads = case.run("adjoint").grads.images
    assert grads[[1, 2, 4, 5]].abs().max() == 0
    assert grads[[0, 3]].abs().min() > 0


@pytest.mark.parametrize("alpha", [0.0, float("inf"), float("nan")])
def test_a_step_size_that_is_zero_or_not_finite_is_refused(alpha: float) -> None:
    case = Case()
    case.alpha = torch.tensor(alpha, dtype=torch.float64)
    with pytest.raises(DstillError, match="finite and not zero"):
        case.run("adjoint")


def test_rates_that_do_not_fit_and_a_burn_in_without_a_window_are_refused() -> None:
    case = Case()
    with pytest.raises(DstillError, match=r"one for each of the 4 steps, got \(3,\)"):
        case.alpha = torch.full((3,), 0.1, dtype=torch.float64)
        case.run("adjoint")
    with pytest.raises(DstillError, match=r"finite and not zero, got 0\.0"):
        case.alpha = torch.tensor([0.1, 0.0, 0.1, 0.1], dtype=torch.float64)
        case.run("adjoint")
    case = Case()
    assert not callable(case.targets)
    case.targets = {4: case.targets[4]}
    for burn_in in (-1, 4):
        with pytest.raises(DstillError, match="burn_in must leave at least one of the 4 steps"):
            case.run("adjoint", burn_in=burn_in)
    case.targets = {2: case.targets[4], 4: case.targets[4]}
    with pytest.raises(DstillError, match=r"matching points must lie in 3 … 4"):
        case.run("adjoint", burn_in=2)


def test_targets_outside_the_steps_are_refused() -> None:
    case = Case()
    assert not callable(case.targets)
    case.targets = {5: case.targets[4]}
    with pytest.raises(DstillError, match="matching points"):
        case.run("adjoint")


def test_processes_that_share_a_machine_divide_the_memory_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    case, kept = Case(steps=5), list[int]()
    a_step = Student(case.net).kept_bytes(case.theta0, 6)
    assert a_step is not None
    monkeypatch.setattr("dstill.unrolling.unroll.available_memory", lambda device: 8.5 * a_step)
    inner = adjoint
    monkeypatch.setattr(
        "dstill.unrolling.unroll.adjoint", lambda *given, keep, **more: kept.append(keep) or inner(*given, keep=keep, **more)
    )
    for sharers, memory in ((1, "auto"), (2, "auto"), (5, "auto"), (5, "keep"), (1, "recompute")):
        case.run("adjoint", memory=memory, sharers=sharers)
    assert kept == [4, 2, 0, 5, 0]


def test_running_statistics_and_dropout_are_refused_with_the_layer_named() -> None:
    with pytest.raises(DstillError, match=r"body\.1.*running statistics"):
        Student(small_net("batch"))
    with pytest.raises(DstillError, match="drops units"):
        Student(nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)))


@pytest.mark.parametrize("mode", ["adjoint", "graph"])
def test_nvidias_rounding_is_off_inside_and_as_before_outside(mode: str) -> None:
    case, seen = Case(), list[bool]()
    case.net = small_net("group")  # without hand-written derivatives, the module itself is called
    case.net.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    case.run(mode)
    assert seen and not any(seen)
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("optimiser", [Sgd(), Adam(eps=1e-3)], ids=str)
def test_float32_adjoint_is_as_close_to_float64_as_plain_autograd_is(optimiser: Optimiser) -> None:
    errors: dict[str, list[float]] = {"adjoint": [], "graph": []}
    for seed in range(20):
        case = Case(seed=seed, steps=5)
        exact = case.run("graph", optimiser=optimiser).grads.images
        case.net, case.theta0, case.images, case.alpha = (
            case.net.float(),
            case.theta0.float(),
            case.images.float(),
            case.alpha.float(),
        )
        case.targets = {n: (t.float(), w) for n, (t, w) in case.targets.items()}
        for mode, values in errors.items():
            values.append(float((case.run(mode, optimiser=optimiser).grads.images - exact).norm() / exact.norm()))
    medians = {mode: sorted(values)[len(values) // 2] for mode, values in errors.items()}
    assert medians["adjoint"] <= 3 * medians["graph"]
