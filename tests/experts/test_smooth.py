"""Clipped loss, gradient penalty and smoothness metric against loops that anyone can check by eye."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dstill.artifacts.record import avg_var
from dstill.derivatives.engine import supports
from dstill.experts.smooth import Form, clip_factor, gradient_penalty, penalty_weight, smooth_objective, step_lengths
from dstill.nets.convnet import ConvNet
from dstill.training.fit import Batch


def small_net(norm: str = "instance") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = ConvNet(2, 3, (8, 8), width=4, depth=2, norm=norm).double()  # type: ignore[arg-type]
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5)
        return net


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(epoch: int = 1) -> Batch:
    """Augmented and raw images differ, so that a test can tell which of them a term uses."""
    raw = normal(0, 5, 2, 8, 8)
    return Batch(raw + normal(1, 5, 2, 8, 8), raw, torch.tensor([0, 2, 1, 1, 0]), torch.arange(5), epoch)


def penalty_by_loop(net: nn.Module, images: Tensor, form: Form) -> Tensor:
    """(|grad_x sum of logits| - 1)^2 one image at a time; released: one pixel at a time."""
    terms: list[Tensor] = []
    for image in images:
        x = image[None].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        if form == "paper":
            terms.append((gradient.square().sum().sqrt() - 1) ** 2)
        else:
            for row, column in itertools.product(range(8), range(8)):
                terms.append((gradient[0, :, row, column].square().sum().sqrt() - 1) ** 2)
    return torch.stack(terms).mean()


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("paper", [0.5, 0.625, 0.75, 0.875, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("released", [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1, 1]),
        ("off", [1] * 12),
    ],
)
def test_the_clipped_loss_rises_from_a_half_to_one_as_each_form_says(form: Form, expected: list[float]) -> None:
    assert [clip_factor(epoch, form) for epoch in range(12)] == pytest.approx(expected, abs=1e-12)


def test_the_clipped_loss_stays_at_one_for_the_rest_of_the_training() -> None:
    assert clip_factor(49, "paper") == clip_factor(49, "released") == 1


def test_the_penalty_weighs_one_in_the_paper_and_two_in_the_released_code() -> None:
    assert (penalty_weight("off"), penalty_weight("paper"), penalty_weight("released")) == (0, 1, 2)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_the_gradient_penalty_equals_a_loop_over_samples(form: Form) -> None:
    net, images = small_net(), batch().raw
    expected = float(penalty_by_loop(net, images, form).detach())
    assert float(gradient_penalty(net, images, form).detach()) == pytest.approx(expected, rel=1e-12)


def test_paper_and_released_penalties_are_different_numbers() -> None:
    net, images = small_net(), batch().raw
    paper, released = (float(gradient_penalty(net, images, form).detach()) for form in ("paper", "released"))
    assert abs(paper - released) > 0.1 * max(paper, released)


@torch.no_grad()
def test_the_penalty_is_two_sided_and_vanishes_at_its_target() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False)).double()
    images = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
    nn.init.constant_(net[1].weight, 0.5)  # |grad_x W| = 1
    assert float(gradient_penalty(net, images, "paper")) == pytest.approx(0, abs=1e-15)
    assert float(gradient_penalty(net, images, "paper", target=3.0)) == pytest.approx(4)
    nn.init.constant_(net[1].weight, 0.25)
    assert float(gradient_penalty(net, images, "paper")) == pytest.approx(0.25)


@pytest.mark.parametrize("norm", ["instance", "layer"])
@pytest.mark.parametrize(("form", "clip", "weight"), [("paper", 0.625, 1), ("released", 0.55, 2)])
def test_the_smooth_objective_leaves_the_gradient_of_clipped_loss_plus_penalty(
    form: Form, clip: float, weight: float, norm: str
) -> None:
    net, data = small_net(norm), batch(epoch=1)
    assert supports(net) == (norm == "instance")  # one case per path: hand-written derivatives, and autograd
    loss = clip * F.cross_entropy(net(data.images), data.labels) + weight * penalty_by_loop(net, data.raw, form)
    expected = torch.autograd.grad(loss, list(net.parameters()))

    value = smooth_objective(net, form, form)(net, data)

    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-12)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-12)


def test_with_both_parts_off_the_objective_is_plain_cross_entropy() -> None:
    net, data = small_net(), batch(epoch=0)
    expected = torch.autograd.grad(F.cross_entropy(net(data.images), data.labels), list(net.parameters()))
    smooth_objective(net, "off", "off")(net, data)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)


def test_the_objective_returns_a_loss_without_a_graph() -> None:
    for norm in ("instance", "layer"):
        net = small_net(norm)
        assert not smooth_objective(net, "paper", "paper")(net, batch()).requires_grad


def test_avg_var_is_the_mean_of_the_squared_steps_of_a_loop() -> None:
    trajectory = normal(2, 6, 11)
    lengths = [sum((float(b) - float(a)) ** 2 for a, b in zip(p, q, strict=True)) for p, q in itertools.pairwise(trajectory)]
    assert step_lengths(trajectory).tolist() == pytest.approx(lengths, rel=1e-12)
    assert avg_var(step_lengths(trajectory).tolist()) == pytest.approx(sum(lengths) / 5, rel=1e-12)


def test_squared_steps_are_summed_in_float64() -> None:
    trajectory = torch.zeros(2, 3, dtype=torch.float32)
    trajectory[1] = torch.tensor([4096.0, 1.0, 1.0])  # 4096^2 + 1 + 1 cannot be represented in float32
    assert step_lengths(trajectory).tolist() == [16777218.0]
    assert step_lengths(trajectory / 3).dtype == torch.float64
