"""What methods share that improve images against batches of real ones: drawing the batches, and the step on the images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dstill.data import siamese
from dstill.errors import DstillError
from dstill.methods.base import Problem, State
from dstill.unroll import sgd_step


class ClassBatch(NamedTuple):
    """Augmented real and synthetic images of one class.

    `synthetic` is differentiable in `source`, the images of the class before augmentation, which stand in `rows` of the set.
    """

    real: Tensor
    synthetic: Tensor
    source: Tensor
    rows: Tensor


class ClassBatches:
    """Draws batches of one class at a time.

    Args:
        problem: whose real images.
        size: real images a batch; all of a class where it has fewer.
        strategy: augmentation; one draw hits the real and the synthetic images of a class alike (siamese).
    """

    def __init__(self, problem: Problem, size: int, strategy: str) -> None:
        self.problem, self.size, self.strategy = problem, size, strategy
        self.rows = problem.real.train.by_class(problem.real.classes)

    def real(self, c: int, generator: torch.Generator, size: int | None = None) -> Tensor:
        """Preprocessed real images of class c, without replacement and without augmentation."""
        rows = self.rows[c]
        return self.problem.prepared(rows[torch.randperm(len(rows), generator=generator)[: size or self.size]])

    def draw(self, c: int, images: Tensor, generator: torch.Generator) -> ClassBatch:
        """Real images of class c beside the synthetic ones. Where gradients are enabled, `synthetic` has one by `source`."""
        ipc = self.problem.recipe.ipc
        rows = torch.arange(c * ipc, (c + 1) * ipc, device=images.device)
        real = self.real(c, generator)
        params = siamese.sample(self.strategy, ipc, generator, shared=True)
        source = images[rows].detach().requires_grad_()
        return ClassBatch(siamese.apply(real, params), siamese.apply(source, params), source, rows)


def update_images(state: State, gradient: Tensor, lr: float, momentum: float) -> None:
    """One SGD step on `state["images"]`, in place of the old entries.

    Raises:
        DstillError: the images would not be finite.
    """
    images, buffer = sgd_step(state["images"], state["images.momentum"], gradient, lr, momentum)
    if not bool(torch.isfinite(images).all()):
        raise DstillError("the synthetic images are no longer finite: lower distill.lr_images")
    state["images"], state["images.momentum"] = images, buffer
