"""FRePo's regression, labels and optimiser against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dstill.methods.frepo import centred, kernel_regression, label_margin, uncentred_logits
from dstill.methods.lamb import cosine, lamb_step


def test_kernel_regression_is_ridge_regression_on_the_features() -> None:
    generator = np.random.default_rng(0)
    synthetic, real = generator.normal(size=(6, 4)), generator.normal(size=(5, 4))
    labels = generator.normal(size=(6, 3))
    strength = 0.1 * np.trace(synthetic @ synthetic.T) / 6
    weights = np.linalg.solve(synthetic.T @ synthetic + strength * np.eye(4), synthetic.T @ labels)  # the primal form
    found = kernel_regression(*(torch.from_numpy(a) for a in (real, synthetic, labels)), 0.1)
    np.testing.assert_allclose(found.numpy(), real @ weights, rtol=1e-9)


def test_the_solve_is_a_least_squares_problem_with_the_ridge_as_rows() -> None:
    torch.manual_seed(0)
    synthetic, real, labels = (torch.randn(6, n, dtype=torch.float64) for n in (9, 9, 3))
    strength = 1e-6 * (synthetic @ synthetic.t()).trace() / 6
    rows = torch.cat([synthetic, strength.sqrt() * torch.eye(9, dtype=torch.float64)])
    weights = torch.linalg.lstsq(rows, torch.cat([labels, torch.zeros(9, 3, dtype=torch.float64)]), driver="gelsd").solution
    torch.testing.assert_close(kernel_regression(real, synthetic, labels, 1e-6), real @ weights, rtol=1e-6, atol=1e-8)


def test_more_images_than_features_can_be_solved_in_float32() -> None:
    torch.manual_seed(0)
    synthetic, real = torch.randn(300, 40), torch.randn(5, 40)
    labels = centred(torch.arange(300) % 3, 3)
    found = kernel_regression(real, synthetic, labels, 1e-6)
    exact = kernel_regression(real.double(), synthetic.double(), labels.double(), 1e-6)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-3)


def test_labels_sum_to_nothing_and_come_back_as_probabilities() -> None:
    for classes in (2, 10, 25):
        labels = centred(torch.arange(classes), classes)
        assert float(labels.sum(1).abs().max()) < 1e-6
        probabilities = uncentred_logits(labels / math.sqrt(classes / 10)).softmax(1)
        assert float((probabilities - torch.eye(classes)).abs().max()) < 1e-4 * classes
    soft = torch.tensor([[0.5, 0.3, 0.2]])
    back = uncentred_logits((soft - 1 / 3) / math.sqrt(0.3)).softmax(1)
    torch.testing.assert_close(back, soft, rtol=1e-5, atol=1e-6)


def test_the_margin_asks_for_no_more_than_one_over_the_classes() -> None:
    labels = torch.tensor([[0.9, 0.0, 0.0, 0.0], [0.1, 0.0, 0.0, 0.0]])
    assert float(label_margin(labels)) == pytest.approx(-(0.25 + 0.1) / 2)


def test_lamb_moves_by_a_share_of_the_weights_along_adams_direction() -> None:
    torch.manual_seed(0)
    weights = torch.randn(3, 4, dtype=torch.float64)
    reference = weights.clone().requires_grad_()
    adam = torch.optim.Adam([reference], lr=1.0, eps=1e-6)
    state = {"x": weights, "x.first": torch.zeros_like(weights), "x.second": torch.zeros_like(weights)}
    for step in range(1, 5):
        gradient = torch.randn(3, 4, dtype=torch.float64)
        before = reference.detach().clone()
        reference.grad = gradient.clone()
        adam.step()
        direction = before - reference.detach()  # Adam's step of length one
        expected = state["x"] - 0.01 * state["x"].norm() / direction.norm() * direction
        lamb_step(state, "x", gradient, 0.01, step)
        torch.testing.assert_close(state["x"], expected, rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            reference.copy_(state["x"])


def test_lamb_leaves_what_has_no_gradient_and_moves_what_is_zero() -> None:
    zero = torch.zeros(2)
    state = {"x": zero, "x.first": zero.clone(), "x.second": zero.clone()}
    lamb_step(state, "x", torch.zeros(2), 0.1, 1)
    assert state["x"].tolist() == [0.0, 0.0]
    lamb_step(state, "x", torch.tensor([1.0, -1.0]), 0.1, 2)
    reference = torch.zeros(2, requires_grad=True)  # which is moved as Adam moves it
    adam = torch.optim.Adam([reference], lr=0.1, eps=1e-6)
    for gradient in (torch.zeros(2), torch.tensor([1.0, -1.0])):
        reference.grad = gradient
        adam.step()
    torch.testing.assert_close(state["x"], reference.detach())
    assert state["x"][0] < 0 < state["x"][1]


def test_the_rate_falls_to_a_tenth() -> None:
    assert [round(cosine(1.0, at, 100), 3) for at in (0, 50, 100)] == [1.0, 0.55, 0.1]
