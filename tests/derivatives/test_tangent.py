"""The hand-written derivatives, in tensor operations and in native kernels, against torch.autograd in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from dstill.derivatives import build as native
from dstill.derivatives.build import kernels
from dstill.derivatives.engine import Derivatives, supports
from dstill.nets.convnet import ConvNet
from dstill.nets.vgg import VGG11


@dataclass
class Case:
    """A network with every parameter random (also scales, shifts and biases), a direction, and a labelled batch."""

    net: ConvNet
    parameters: list[Tensor]
    direction: list[Tensor]
    images: Tensor
    label_logits: Tensor
    hard_labels: Tensor
    derivatives: Derivatives

    def logits(self, parameters: Sequence[Tensor], images: Tensor) -> Tensor:
        names = [name for name, _ in self.net.named_parameters()]
        return functional_call(self.net, dict(zip(names, parameters, strict=True)), images)

    def loss(self, parameters: Sequence[Tensor], images: Tensor, targets: Tensor) -> Tensor:
        return -(targets * self.logits(parameters, images).log_softmax(1)).sum(1).mean()

    def targets(self, soft: bool) -> Tensor:
        classes = self.label_logits.shape[1]
        return self.label_logits.softmax(1) if soft else nn.functional.one_hot(self.hard_labels, classes).double()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    depth, width, channels = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 3, 9]))
    side = st.integers(2**depth, 2**depth + 5)
    size = draw(side), draw(side)
    classes, batch = draw(st.integers(2, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    net = ConvNet(channels, classes, size, width=width, depth=depth).double()
    return Case(
        net,
        parameters=[normal(*p.shape) for p in net.parameters()],
        direction=[normal(*p.shape) for p in net.parameters()],
        images=normal(batch, channels, *size),
        label_logits=normal(batch, classes),
        hard_labels=torch.randint(classes, (batch,), generator=generator),
        derivatives=Derivatives(
            net, torch.device("cpu"), torch.float64, threads=draw(st.integers(1, 3)), native=draw(st.booleans())
        ),
    )


def assert_equal(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Equal to 1e-12 of the largest entry of all, or of 1."""
    scale = max(1.0, *(float(e.abs().max()) for e in expected))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert float((a - e).abs().max()) <= 1e-12 * scale


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def tracked(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@given(cases(), st.booleans())
def test_the_cross_entropy_gradient_equals_autograd(case: Case, soft: bool):
    parameters = tracked(case.parameters)
    loss = case.loss(parameters, case.images, case.targets(soft))
    expected = torch.autograd.grad(loss, parameters)

    actual_loss, actual, _, logits = case.derivatives.gradient(case.parameters, case.images, case.targets(soft))

    assert_equal([actual_loss, *actual], [loss.detach(), *expected])
    assert_equal([logits], [case.derivatives.logits(case.parameters, case.images)])


@given(cases(), st.booleans())
def test_the_cross_entropy_tangents_equal_double_backward(case: Case, soft: bool):
    parameters, (images,) = tracked(case.parameters), tracked([case.images])
    loss = case.loss(parameters, images, case.targets(soft))
    slope = inner(torch.autograd.grad(loss, parameters, create_graph=True), case.direction)
    *hessian_vector, by_images = torch.autograd.grad(slope, [*parameters, images])

    actual = case.derivatives.tangents(case.parameters, case.direction, case.images, case.targets(soft))

    assert_equal([actual.loss, *actual.parameters, actual.images], [slope.detach(), *hessian_vector, by_images])


@given(cases())
def test_the_tangent_by_label_logits_equals_double_backward(case: Case):
    parameters, (logits,) = tracked(case.parameters), tracked([case.label_logits])
    loss = case.loss(parameters, case.images, logits.softmax(1))
    slope = inner(torch.autograd.grad(loss, parameters, create_graph=True), case.direction)
    (expected,) = torch.autograd.grad(slope, logits)

    actual = case.derivatives.tangents(case.parameters, case.direction, case.images, case.targets(soft=True))

    assert_equal([actual.labels], [expected])


@given(cases(), st.booleans(), st.sampled_from([0.0, 1.0, 2.5]))
def test_the_gradient_penalty_equals_double_backward(case: Case, pixelwise: bool, target: float):
    parameters, (images,) = tracked(case.parameters), tracked([case.images])
    (jacobian,) = torch.autograd.grad(case.logits(parameters, images).sum(), images, create_graph=True)
    norm = torch.linalg.vector_norm(jacobian, dim=1 if pixelwise else (1, 2, 3))
    penalty = (norm - target).square().mean()
    expected = torch.autograd.grad(penalty, parameters, materialize_grads=True)

    value, actual = case.derivatives.penalty(case.parameters, case.images, pixelwise=pixelwise, target=target)

    assert_equal([value, *actual], [penalty.detach(), *expected])


@given(cases())
def test_logits_and_features_equal_the_network(case: Case):
    actual = case.derivatives.logits(case.parameters, case.images)
    assert_equal([actual], [case.logits(case.parameters, case.images)])
    features = case.derivatives.features(case.parameters, case.images)
    assert_equal([torch.nn.functional.linear(features, *case.parameters[-2:])], [actual])


@given(cases(), st.booleans())
def test_tangents_from_what_the_gradient_kept_are_the_same_to_the_last_bit(case: Case, soft: bool):
    _, _, kept, _ = case.derivatives.gradient(case.parameters, case.images, case.targets(soft), keep=True)
    arguments = case.parameters, case.direction, case.images, case.targets(soft)
    kept_all, recomputed = case.derivatives.tangents(*arguments, kept), case.derivatives.tangents(*arguments)
    assert torch.equal(kept_all.loss, recomputed.loss)
    assert torch.equal(kept_all.images, recomputed.images)
    assert all(torch.equal(a, b) for a, b in zip(kept_all.parameters, recomputed.parameters, strict=True))


def test_a_cache_that_cannot_be_written_is_no_reason_for_other_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels() is None:
        pytest.skip("no C++ compiler here: native kernels are not tested")
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DSTILL_NATIVE", raising=False)
    monkeypatch.setattr(native, "_FLAGS", ["-O0" if flag == "-O3" else flag for flag in native._FLAGS])  # a third of the time
    find = native._found.__wrapped__
    assert find()[0] is not None
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "other"))
    assert find()[0] is not None
    (library,) = (tmp_path / "other" / "native").iterdir()
    assert library.suffix == ".so"
    damaged = tmp_path / "third" / "native" / library.name  # elsewhere: a loaded library is not opened again
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"cut off")
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "third"))
    assert find()[0] is not None
    assert damaged.stat().st_size > 1000, "built anew"


def test_why_there_are_no_kernels_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSTILL_NATIVE", raising=False)
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path))
    broken = tmp_path / "broken-compiler"
    broken.write_text("#!/bin/sh\necho no space for you >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert native._found.__wrapped__() == (
        None,
        f"{broken} could not build them (no space for you); name another compiler in CXX",
    )


def test_what_a_card_runs_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTILL_NATIVE", "0")
    assert native._found_fused.__wrapped__() == (None, native._SWITCHED_OFF)
    monkeypatch.setattr(native, "_found_fused", lambda: (None, "install triton"))
    said = native.describe(torch.device("cuda"))
    assert said == "plain tensor operations, slower than fused kernels: install triton"
    assert native.describe(torch.device("mps"), compiled=True) == "compiled tensor operations"


def test_a_student_that_diverged_looks_so_in_native_kernels_too() -> None:
    net = ConvNet(3, 4, (8, 8), width=16)
    parameters = [p.detach() for p in net.parameters()]
    images, targets = torch.randn(2, 3, 8, 8), torch.eye(4)[:2]
    images[0, 0, 0, 0] = float("nan")
    for flag in (True, False):
        assert Derivatives(net, torch.device("cpu"), native=flag).gradient(parameters, images, targets).loss.isnan()


def test_this_machine_runs_the_native_kernels():
    """Otherwise half of the cases above would repeat the other half."""
    if kernels() is None:
        pytest.skip("no C++ compiler here: native kernels are not tested")
    net = ConvNet(3, 10, (32, 32))
    assert Derivatives(net, torch.device("cpu")).native
    assert not Derivatives(net, torch.device("cpu"), native=False).native


def test_compiled_operations_give_the_same_derivatives():
    """One block in float64; each of its forms is compiled separately, which takes seconds."""
    if kernels() is None:
        pytest.skip("no C++ compiler here, which torch.compile needs as well")
    torch.manual_seed(0)
    net = ConvNet(2, 3, (4, 4), width=3, depth=1).double()
    parameters = [p.detach() for p in net.parameters()]
    direction = [torch.randn_like(p) for p in parameters]
    images, targets = torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[:2]
    plain, compiled = (
        Derivatives(net, torch.device("cpu"), torch.float64, native=False, compiled=flag) for flag in (False, True)
    )
    found = [engine.tangents(parameters, direction, images, targets) for engine in (plain, compiled)]
    assert type(compiled.operations.unit(*parameters[2:4])).__name__ == "CompiledUnit"
    assert_equal([found[1].loss, *found[1].parameters, found[1].images], [found[0].loss, *found[0].parameters, found[0].images])


def test_bfloat16_products_are_near_the_exact_ones_and_not_equal():
    torch.manual_seed(0)
    net = ConvNet(3, 4, (16, 16), width=32)
    parameters = [p.detach() for p in net.parameters()]
    direction = [torch.randn_like(p) for p in parameters]
    images, targets = torch.randn(6, 3, 16, 16), torch.eye(4)[torch.arange(6) % 4]
    exact, backward, everywhere = (
        Derivatives(net, torch.device("cpu"), precision=precision) for precision in ("float32", "bfloat16-backward", "bfloat16")
    )
    assert torch.equal(exact.gradient(parameters, images, targets)[1][0], backward.gradient(parameters, images, targets)[1][0])
    wanted = exact.tangents(parameters, direction, images, targets).images
    for rounded, bound in ((backward, 0.02), (everywhere, 0.2)):
        found = rounded.tangents(parameters, direction, images, targets).images
        assert 0 < float((found - wanted).norm() / wanted.norm()) < bound


def test_the_instance_norm_convnet_is_supported_at_any_depth():
    assert supports(ConvNet(3, 10, (32, 32)))
    assert supports(ConvNet(1, 2, (8, 8), width=3, depth=1))


@pytest.mark.parametrize("norm", ["group", "batch", "layer", "none"])
def test_other_norms_are_not_supported(norm):
    assert not supports(ConvNet(3, 10, (8, 8), width=4, norm=norm))


def test_a_subclass_is_not_supported_since_its_forward_may_differ():
    class Doubled(ConvNet):
        def forward(self, images: Tensor) -> Tensor:
            return 2 * super().forward(images)

    assert not supports(Doubled(3, 10, (8, 8)))


def test_other_networks_are_not_supported():
    assert not supports(VGG11(3, 10, (8, 8)))
