"""Shared by the methods that optimise images against batches of real ones: state, batches, inner training, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import Count, DistillConfig, Momentum, Passes, Positive
from dstill.data import siamese
from dstill.data.catalog import Shape
from dstill.derivatives.engine import derivatives_of
from dstill.errors import CollapseError
from dstill.methods.base import Metrics, Problem, State
from dstill.methods.drawing import DrawingMethod, Mean, Told, averaged, move_averages, with_averages
from dstill.methods.initialisation import initial_images
from dstill.support.devices import sent, total_memory
from dstill.training.fit import cross_entropy_objective, fit, student_batches
from dstill.unrolling.optimisers import sgd_step
from dstill.unrolling.types import Step

_PREPARED_SHARE = 1 / 8
_BLOCK = 1000  # images that are preprocessed at once


class ImageConfig(DistillConfig):
    """Settings of every method that optimises images by SGD against batches of real ones."""

    optimises_images: ClassVar[bool] = True
    late: ClassVar[frozenset[str]] = DistillConfig.late | {"image_ema"}

    iterations: Count = 1000
    """Updates, each with its own network."""
    batch_real: Count = 256
    """Real images of a class in a batch; all of them if the class has fewer."""
    lr_images: Positive = 0.1
    """Step size of the images, in preprocessed units squared per unit of the objective."""
    image_momentum: Momentum = 0.5
    """Momentum of the SGD on images."""
    initialisation: Literal["random", "noise"] = "random"
    """Real images drawn at random, or standard normal noise in preprocessed units."""
    augment: bool = True
    """Whether the real and synthetic images of a class share one draw of the recipe's augmentation."""
    image_ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the images, which becomes the result; left out: the last ones."""

    def smoke(self) -> Self:
        return self.model_copy(update={"iterations": 5, "batch_real": min(self.batch_real, 16)})


class InnerConfig(ImageConfig):
    """Additional settings of methods that train a network on the synthetic set between updates."""

    lr_net: Positive = 0.01
    """Learning rate of the network's SGD, which has no momentum."""
    batch_train: Count = 256
    """Synthetic images per step of the network's training."""

    def training(self, images: int) -> Passes:
        """The cost of one pass over a synthetic set of `images` images."""
        return Passes("gradient", math.ceil(images / self.batch_train), min(images, self.batch_train))


class ClassBatch(NamedTuple):
    """Augmented real and synthetic images of one class.

    `source` holds the stored images that the synthetic ones are decoded from, `rows` their rows in the set. `synthetic` is
    differentiable in `source`.
    """

    real: Tensor
    synthetic: Tensor
    source: Tensor
    rows: Tensor


def mean_distance(real: Tensor, synthetic: Tensor) -> Tensor:
    """|mean real - mean synthetic|^2 of a network's outputs for the images of a class, `[n, ...]` and `[m, ...]`.

    Means are over the images. The squares are summed, not averaged (DM, Eq. 5; CAFE, Eq. 3, for each layer).
    """
    return (real.mean(0) - synthetic.mean(0)).square().sum()


class ClassBatches:
    """Draws batches of one class at a time.

    Args:
        problem: provides the real images.
        settings: the number of real images in a batch (all of a class if it has fewer), and whether the real and synthetic
            images of a class share one draw of the recipe's augmentation (siamese).
    """

    def __init__(self, problem: Problem, settings: ImageConfig) -> None:
        self.problem, self.size = problem, settings.batch_real
        self.strategy = problem.recipe.augmentation if settings.augment else "none"
        self.rows = problem.real.train.by_class(problem.real.classes)
        # One for all the networks that a method trains, so that a recorded CUDA graph is reused.
        self.cross_entropy = cross_entropy_objective(derivatives_of(problem.network()))

    def real(self, c: int, generator: torch.Generator, size: int | None = None) -> Tensor:
        """Preprocessed real images of class c, without replacement and without augmentation."""
        rows = self.rows[c]
        return self.problem.prepared(rows[torch.randperm(len(rows), generator=generator)[: size or self.size]])

    def draw(self, c: int, images: Tensor, generator: torch.Generator) -> ClassBatch:
        """Real and synthetic images of class c. With gradients enabled, `synthetic` is differentiable in `source`.

        Args:
            c: the class.
            images: the stored images of all classes `[S, C, H, W]`.
            generator: generator of all draws.
        """
        recipe = self.problem.recipe
        rows = torch.arange(c * recipe.ipc, (c + 1) * recipe.ipc, device=images.device)
        real = self.real(c, generator)
        params = siamese.sample(self.strategy, recipe.decoded_ipc, generator, shared=True)
        source = images[rows].detach().requires_grad_()
        decoded = self.problem.decoded(source)
        return ClassBatch(siamese.apply(real, params), siamese.apply(decoded, params), source, rows)


class RealBatches:
    """Draws batches of preprocessed real images of all classes, each class in its share of the training set.

    With equal shares in every batch, the gradient of the loss of a batch varies about a fifth less than with shares left to
    chance.

    All training images are preprocessed once if they then take at most an eighth of the device's memory; otherwise each batch
    is preprocessed by itself, and whitening alone may take as long as the method's own work.

    Args:
        problem: provides the real images.
        size: number of images in a batch; all of them if there are fewer.
    """

    def __init__(self, problem: Problem, size: int) -> None:
        self.problem, self.size, images = problem, size, problem.real.train.images
        self.prepared: Tensor | None = None
        if 4 * images.numel() <= _PREPARED_SHARE * total_memory(problem.device):
            blocks = torch.arange(len(images)).split(_BLOCK)  # all at once would take three times the memory
            self.prepared = torch.cat([problem.prepared(rows) for rows in blocks])
        self.labels = problem.real.train.labels.to(problem.device)
        self.by_class = problem.real.train.by_class(problem.real.classes)

    @staticmethod
    def peak_bytes(shape: Shape, size: int, device: torch.device) -> float:
        """Memory of the prepared images, while they are joined, and of a batch before and after augmentation."""
        prepared = 4.0 * shape.numbers * shape.train
        return (2 * prepared if prepared <= _PREPARED_SHARE * total_memory(device) else 0) + 2 * 4 * shape.numbers * size

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images `[B, C, H, W]` without augmentation, and their class ids `[B]`; no image comes twice."""
        # The keys of a class are evenly spaced in [0, 1], in random order: the smallest ones hold equal shares of all classes.
        keys = torch.empty(len(self.labels))
        for rows in self.by_class:
            spaced = torch.randperm(len(rows), generator=generator) + torch.rand((), generator=generator)
            keys[rows] = spaced / max(1, len(rows))
        rows = keys.topk(min(self.size, len(keys)), largest=False).indices
        here = sent(rows, self.labels.device)
        images = self.problem.prepared(rows) if self.prepared is None else self.prepared[here]
        return images, self.labels[here]


def draw_steps(problem: Problem, size: int | None, count: int, generator: torch.Generator) -> list[Step]:
    """Draws the mini-batches of a student on the decoded images, each with its own augmentation.

    Args:
        problem: its recipe has the augmentation.
        size: images in a batch; None for all.
        count: number of steps.
        generator: generator of all draws.
    """
    return [
        Step(sent(rows, problem.device), siamese.sample(problem.recipe.augmentation, len(rows), generator))
        for rows in student_batches(problem.decoded_count, size, count, generator)
    ]


def train_on_synthetic(
    net: nn.Module, images: Tensor, batches: ClassBatches, settings: InnerConfig, epochs: int, generator: torch.Generator
) -> None:
    """Trains by plain SGD for some passes over what stored images hold, with the augmentation of the batches."""
    fit(
        net,
        batches.problem.decoded(images),
        batches.problem.labels(),
        epochs=epochs,
        batch_size=settings.batch_train,
        optimiser=torch.optim.SGD(net.parameters(), lr=settings.lr_net),
        generator=generator,
        objective=batches.cross_entropy,
        augmentation=batches.strategy,
    )


class ImageMethod(DrawingMethod):
    """Optimises images by SGD with momentum along the mean gradient of its draws.

    State: `images` and `images.momentum` `[S, C, H, W]`; `images.average` if a moving average is kept.
    """

    Settings = ImageConfig

    def start(self, problem: Problem) -> None:
        super().start(problem)
        self.image_settings = problem.settings(ImageConfig)
        self.batches = ClassBatches(problem, self.image_settings)

    def initialise(self, generator: torch.Generator) -> State:
        settings = self.image_settings
        images = initial_images(self.problem, settings.initialisation, generator)
        return with_averages({"images": images, "images.momentum": torch.zeros_like(images)}, ["images"], settings.image_ema)

    def update(self, state: State, iteration: int, drawn: Sequence[Told], mean: Mean) -> Metrics:
        """One step on the images.

        Raises:
            CollapseError: the images would no longer be finite.
        """
        settings, gradient = self.image_settings, mean(drawn)["images"]
        lr = self.lr_images(iteration) * settings.draw_factor
        images, buffer = sgd_step(state["images"], state["images.momentum"], gradient, lr, settings.image_momentum)
        if not bool(torch.isfinite(images).all()):
            raise CollapseError("the synthetic images are no longer finite: lower distill.lr_images")
        state["images"], state["images.momentum"] = images, buffer
        move_averages(state, settings.image_ema)
        return {}

    def lr_images(self, iteration: int) -> float:
        """The step size at an iteration."""
        return self.image_settings.lr_images

    def result(self, state: State) -> DistilledSet:
        return self.problem.result(averaged(state, "images"), self.problem.labels(), None)
