"""GSAM against its formula on flat vectors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dstill.derivatives.engine import derivatives_of
from dstill.experts.gsam import gsam_objective
from dstill.nets.convnet import ConvNet
from dstill.training.fit import Batch, cross_entropy_objective


def small_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return ConvNet(2, 3, (8, 8), width=4, depth=1).double()


def batch() -> Batch:
    images = torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Batch(images, images, torch.tensor([0, 2, 1, 1, 0, 2]), torch.arange(6), 0)


def gradient_at(weights: Tensor) -> Tensor:
    """The gradient of the cross-entropy, in a separate network."""
    net = small_net()
    vector_to_parameters(weights.clone(), net.parameters())
    loss = F.cross_entropy(net(batch().images), batch().labels)
    return parameters_to_vector(torch.autograd.grad(loss, list(net.parameters())))


def left_behind(rho: float, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Weights before, weights after, and the gradient that the wrapped objective leaves."""
    net = small_net()
    before = parameters_to_vector(net.parameters()).detach().clone()
    gsam_objective(cross_entropy_objective(derivatives_of(net)), rho, alpha)(net, batch())
    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return before, parameters_to_vector(net.parameters()).detach(), parameters_to_vector(gradients)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rho", [0.01, 0.5])
def test_the_gradient_equals_the_formula(rho: float, alpha: float) -> None:
    w, _, actual = left_behind(rho, alpha)
    g = gradient_at(w)
    h = gradient_at(w + rho * w**2 * g / (w.abs() * g).norm())
    vertical = g - (g @ h) / (h @ h) * h
    torch.testing.assert_close(actual, h - alpha * vertical, rtol=1e-9, atol=1e-12)


def test_what_is_taken_away_is_orthogonal_to_the_perturbed_gradient_and_matters() -> None:
    (_, _, plain), (_, _, full) = left_behind(0.5, 0.0), left_behind(0.5, 1.0)
    taken = plain - full
    assert taken.norm() > 1e-3 * plain.norm()
    assert abs(float(taken @ plain)) < 1e-10 * float(taken.norm() * plain.norm())


def test_the_weights_come_back_from_the_climb() -> None:
    before, after, _ = left_behind(0.5, 1.0)
    assert (before - after).abs().max() < 1e-15


def test_a_vanishing_climb_gives_the_plain_gradient() -> None:
    w, _, actual = left_behind(1e-9, 1.0)
    torch.testing.assert_close(actual, gradient_at(w), rtol=1e-6, atol=1e-9)


def test_the_loss_is_that_of_the_weights_before_the_climb() -> None:
    net = small_net()
    expected = F.cross_entropy(net(batch().images), batch().labels).detach()
    assert float(gsam_objective(cross_entropy_objective(derivatives_of(net)), 0.5, 1.0)(net, batch())) == pytest.approx(
        float(expected), rel=1e-12
    )


def test_frozen_parameters_stay_out_of_it() -> None:
    net = small_net()
    first = next(iter(net.parameters())).requires_grad_(False)
    before = first.clone()
    gsam_objective(cross_entropy_objective(derivatives_of(net)), 0.5, 1.0)(net, batch())
    assert first.grad is None
    assert torch.equal(first, before)
