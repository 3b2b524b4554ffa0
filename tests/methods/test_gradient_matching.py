"""DC and DSA against naive loops and torch's double backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dstill.data import siamese
from dstill.methods.gradient_matching import gradient_distance, matching_gradient
from dstill.nets.convnet import ConvNet
from dstill.unrolling.student import Student


def naive_distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Row by row, as the paper describes it."""
    total = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.dim() == 1:
            continue
        for row, other in zip(a.reshape(len(a), -1).tolist(), b.reshape(len(b), -1).tolist(), strict=True):
            product = sum(x * y for x, y in zip(row, other, strict=True))
            lengths = sum(x * x for x in row) ** 0.5 * sum(y * y for y in other) ** 0.5
            total += 1 - product / (lengths + 1e-6)
    return total


def test_the_distance_is_one_minus_the_cosine_of_every_row_of_every_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 2, 3, 3), (3,), (3,), (4, 12), (4,)]
    ours, theirs = ([torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(2))
    assert float(gradient_distance(ours, theirs)) == pytest.approx(naive_distance(ours, theirs), rel=1e-12)
    assert float(gradient_distance(ours, ours)) == pytest.approx(0.0, abs=1e-5)
    assert float(gradient_distance(ours, [-t for t in ours])) == pytest.approx(2 * (3 + 4), rel=1e-5)


class Other(nn.Module):
    """A network without hand-written derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(4))
        self.classifier = nn.Linear(4 * 2 * 2, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(images).flatten(1))
        return logits


@pytest.mark.parametrize("kind", ["convnet", "other"])
def test_the_gradient_by_the_images_is_that_of_double_backward(kind: str) -> None:
    torch.manual_seed(0)
    net: nn.Module = ConvNet(3, 3, (8, 8), width=5, depth=2) if kind == "convnet" else Other()
    student = Student(net.double())
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    real, synthetic = torch.randn(7, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    distance, gradient = matching_gradient(student, theta, real, synthetic, 1)

    parameters = [part.clone().requires_grad_() for part in student.split(theta)]
    flat = torch.cat([part.reshape(-1) for part in parameters])
    images = synthetic.clone().requires_grad_()
    of_real = torch.autograd.grad(student.loss(flat, real, torch.ones(7, dtype=torch.int64)), parameters, retain_graph=True)
    of_images = torch.autograd.grad(student.loss(flat, images, torch.ones(2, dtype=torch.int64)), parameters, create_graph=True)
    expected = gradient_distance(of_images, [g.detach() for g in of_real])
    assert float(distance) == pytest.approx(float(expected.detach()), rel=1e-9)
    (by_images,) = torch.autograd.grad(expected, images)
    torch.testing.assert_close(gradient, by_images, rtol=1e-8, atol=1e-12)


def test_one_draw_augments_real_and_synthetic_images_of_a_class_alike() -> None:
    draw = siamese.sample("flip_crop_scale", 2, torch.Generator().manual_seed(3), shared=True)
    images = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(siamese.apply(images, draw)[:2], siamese.apply(images[:2], draw))
