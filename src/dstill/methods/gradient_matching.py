"""Gradient matching: DC (Zhao et al. 2021) and DSA (Zhao and Bilen 2021) differ only in its settings.

The images are optimised so that a network's gradient on them agrees with its gradient on real images, class by class, while
the network is trained on the synthetic set. With g the gradient on the synthetic images and v = ∂D/∂g of the distance D,
the gradient by the images is ∂<g, v>/∂x. It takes one tangent pass, as in an unrolled student.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from dstill.config.settings import Count, Passes, Recipe
from dstill.methods.base import Problem, State
from dstill.methods.batches import ImageMethod, InnerConfig, train_on_synthetic
from dstill.methods.drawing import Drawn
from dstill.unrolling.student import Student

_EPSILON = 1e-6


class GradientMatchingConfig(InnerConfig):
    """Gradient matching. Defaults are DSA's."""

    outer_steps: Count | None = None
    """K_o, updates of the images per network; left out: the published number for the IPC, see `loops`."""
    inner_epochs: Annotated[int, Field(ge=0)] | None = None
    """K_i, passes over the synthetic set between updates; left out: likewise."""

    def smoke(self) -> Self:
        return super().smoke().model_copy(update={"outer_steps": 2, "inner_epochs": 2})

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        outer, inner = self.loops(ipc // self.parts**2)
        real = Passes("gradient", outer * classes, self.batch_real)
        synthetic = [Passes(kind, outer * classes, ipc) for kind in ("gradient", "tangent")]
        training = self.training(ipc * classes)
        return [real, *synthetic, training._replace(times=training.times * outer * inner)]

    def loops(self, ipc: int) -> tuple[int, int]:
        """The numbers (K_o, K_i). Published: (1, 1), (10, 50), (20, 25), (30, 20), (40, 15), (50, 10) for IPC 1, 10 ... 50.

        The IPC is that of stored images, whatever they hold.

        For other IPC (our extension), K_o = IPC up to 50, and K_i is interpolated linearly.
        """
        known = ((1, 1), (10, 50), (20, 25), (30, 20), (40, 15), (50, 10))
        low = max(pair for pair in known if pair[0] <= ipc)
        high = min((pair for pair in known if pair[0] >= ipc), default=known[-1])
        share = (ipc - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
        inner = round(low[1] + share * (high[1] - low[1]))
        return self.outer_steps or min(ipc, 50), inner if self.inner_epochs is None else self.inner_epochs


def gradient_distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """D(g, g') = Σ_tensors Σ_rows 1 - <g_r, g'_r> / (|g_r| |g'_r| + 1e-6) (DC, Eq. 9 and its code).

    A row holds the weights of one output unit: `[O, I, k, k]` is read as O rows of I k k numbers. One-dimensional tensors
    (biases, scales and shifts of norms) are left out.
    """
    total = torch.zeros_like(ours[0].reshape(-1)[0])
    for a, b in zip(ours, theirs, strict=True):
        if a.dim() > 1:
            a, b = a.flatten(1), b.flatten(1)
            total = total + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + _EPSILON)).sum()
    return total


def matching_gradient(student: Student, theta: Tensor, real: Tensor, synthetic: Tensor, label: int) -> tuple[Tensor, Tensor]:
    """The distance between the gradients on real and synthetic images of one class, and its gradient by the synthetic ones.

    Args:
        student: the network.
        theta: its weights `[P]`.
        real: `[B, C, H, W]`, preprocessed and augmented.
        synthetic: `[S, C, H, W]`, likewise.
        label: their class.
    """
    synthetic = synthetic.detach()
    real_labels, labels = (torch.full((len(images),), label, device=images.device) for images in (real, synthetic))
    of_real, of_synthetic = student.gradient(theta, real, real_labels)[1], student.gradient(theta, synthetic, labels)[1]
    with torch.enable_grad():
        of_synthetic.requires_grad_()
        distance = gradient_distance(student.split(of_synthetic), student.split(of_real))
        (v,) = torch.autograd.grad(distance, of_synthetic)
    return distance.detach(), student.tangents(theta, v, synthetic, labels).images


class GradientMatching(ImageMethod):
    """A draw is one network with its outer and inner loops; it contributes to each update of the outer loop."""

    Settings = GradientMatchingConfig

    @classmethod
    def check(cls, recipe: Recipe, network: nn.Module) -> None:
        Student(network)

    def start(self, problem: Problem) -> None:
        super().start(problem)
        self.settings = problem.settings(GradientMatchingConfig)
        self.student = Student(problem.network())

    def draw(self, state: State, iteration: int, number: int, generator: torch.Generator) -> Iterator[Drawn]:
        settings, net = self.settings, self.problem.fresh_network(generator)
        outer, inner = settings.loops(self.problem.recipe.ipc)
        distances: list[float] = []
        for k in range(outer):
            theta = nn.utils.parameters_to_vector(net.parameters()).detach()
            distance, gradient = self._distance(theta, state["images"], generator)
            distances.append(float(distance) / self.problem.real.classes)
            metrics = {"loss": sum(distances) / len(distances), "loss_first": distances[0], "loss_last": distances[-1]}
            yield Drawn({"images": gradient}, metrics, last=k == outer - 1)
            if inner and k < outer - 1:
                train_on_synthetic(net, state["images"], self.batches, settings, inner, generator)

    def _distance(self, theta: Tensor, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The distance summed over the classes, and its gradient by the synthetic images. Takes one class at a time."""
        total, gradient = torch.zeros((), device=images.device), torch.zeros_like(images)
        for c in range(self.problem.real.classes):
            with torch.enable_grad():
                batch = self.batches.draw(c, images, generator)
            distance, by_synthetic = matching_gradient(self.student, theta, batch.real, batch.synthetic, c)
            total += distance
            gradient[batch.rows] = torch.autograd.grad(batch.synthetic, batch.source, by_synthetic)[0]
        return total, gradient
