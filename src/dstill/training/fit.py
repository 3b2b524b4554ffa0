"""The only loop that trains a network: experts, evaluation and methods all call `fit`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dstill.data import siamese
from dstill.derivatives.engine import Derivatives, derivatives_of
from dstill.nets import networks as nets
from dstill.support.devices import sent

_BLOCK = 512  # images at a time where no gradient is needed
_TICK_SECONDS = 1.0

# Computes the loss of a batch, stores its gradients in `parameter.grad`, and returns the detached loss.
Objective = Callable[[nn.Module, "Batch"], Tensor]
# Called about once a second with the number of epochs done so far, such as 2.5.
Tick = Callable[[float], None]
# Called with the optimiser and the epoch before each epoch. It may change learning rates or clear the optimiser's state.
Schedule = Callable[[torch.optim.Optimizer, int], None]


@dataclass(frozen=True)
class Batch:
    """The input of an objective.

    Attributes:
        images: augmented images `[B, C, H, W]`.
        raw: the same images before augmentation.
        labels: class ids `[B]` or label logits `[B, K]`.
        rows: row numbers in the training tensor.
        epoch: 0 for the first pass.
    """

    images: Tensor
    raw: Tensor
    labels: Tensor
    rows: Tensor
    epoch: int


@dataclass(frozen=True)
class EpochReport:
    """The outcome of one epoch.

    Attributes:
        epochs_done: number of epochs done, this one included.
        loss: mean loss of the epoch.
        images_per_second: training images per second.
    """

    epochs_done: int
    loss: float
    images_per_second: float


def probabilities(labels: Tensor, classes: int) -> Tensor:
    """Target probabilities `[B, K]` of labels.

    Args:
        labels: class ids `[B]`, which become one-hot rows in float32, or label logits `[B, K]`, whose softmax is taken.
        classes: number of classes K.

    Example:
        >>> probabilities(torch.tensor([1, 0]), 2).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    if labels.is_floating_point():
        return labels.softmax(1)
    return torch.zeros(len(labels), classes, device=labels.device).scatter_(1, labels.unsqueeze(1), 1.0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy with class ids `[B]`, or with the softmax of label logits `[B, K]`."""
    if labels.is_floating_point():
        return -(labels.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return nn.functional.cross_entropy(logits, labels)


def cross_entropy_objective(written: Derivatives | None, watch: Callable[[Batch, Tensor], None] | None = None) -> Objective:
    """The mean cross-entropy of the augmented batch, as an objective.

    Args:
        written: the network's hand-written derivatives; None to use autograd.
        watch: called with each batch and its logits `[B, K]`, before the optimiser's step.
    """

    def by_hand(net: nn.Module, batch: Batch) -> Tensor:
        assert written is not None
        parameters = list(net.parameters())
        targets = probabilities(batch.labels, len(parameters[-1])).to(parameters[-1])
        loss, gradients, _, logits = written.gradient(parameters, batch.images, targets)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.requires_grad:
                parameter.grad = gradient
        if watch is not None:
            watch(batch, logits)
        return loss

    def by_library(net: nn.Module, batch: Batch) -> Tensor:
        logits = net(batch.images)
        loss = cross_entropy(logits, batch.labels)
        loss.backward()
        if watch is not None:
            watch(batch, logits.detach())
        return loss.detach()

    return by_library if written is None else by_hand


def shuffled_batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of one pass over `count` images in random order, in batches of `size`; the last batch may be smaller."""
    yield from torch.randperm(count, generator=generator).split(size)


def student_batches(count: int, size: int | None, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers for the steps of a student: one fresh permutation after another, so that all images are used equally often.

    Args:
        count: number of images.
        size: images in a batch; None for all of them.
        steps: number of steps.
        generator: draws the permutations.

    Example:
        >>> batches = student_batches(4, 2, 3, torch.Generator().manual_seed(0))
        >>> [len(rows) for rows in batches]
        [2, 2, 2]
    """
    passes = (shuffled_batches(count, size or count, generator) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(passes), steps)


def step_at(epoch: int, factor: float, *, reset: bool = False) -> Schedule:
    """A schedule that changes the learning rate once.

    Args:
        epoch: the change comes before this epoch, counted from 0.
        factor: the learning rate is multiplied by this factor.
        reset: also clear the optimiser's state, such as its momentum.
    """

    def schedule(optimiser: torch.optim.Optimizer, current: int) -> None:
        if current == epoch:
            for group in optimiser.param_groups:
                group["lr"] *= factor
            if reset:
                optimiser.state.clear()

    return schedule


def warm_cosine(lr: float, warmup: int, total: int) -> Schedule:
    """A schedule with linear warm-up and cosine decay.

    Args:
        lr: the highest learning rate.
        warmup: number of epochs in which the learning rate grows to `lr`.
        total: number of epochs after which it has fallen to 0 along half a cosine.
    """

    def schedule(optimiser: torch.optim.Optimizer, current: int) -> None:
        falling = math.cos(math.pi * (current - warmup) / max(1, total - warmup))
        factor = (current + 1) / warmup if current < warmup else 0.5 * (1 + falling)
        for group in optimiser.param_groups:
            group["lr"] = factor * lr

    return schedule


def squared_objective(net: nn.Module, batch: Batch) -> Tensor:
    """FRePo's objective: the mean squared error of the outputs, with (probabilities - 1/K) / √(K/10) as targets."""
    outputs = net(batch.images)
    classes = outputs.shape[1]
    targets = (probabilities(batch.labels, classes) - 1 / classes) / math.sqrt(classes / 10)
    loss = (outputs - targets).square().mean()
    loss.backward()
    return loss.detach()


def fit(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
    objective: Objective | None = None,
    augmentation: str = "none",
    schedule: Schedule | None = None,
    observer: Callable[[EpochReport], None] | None = None,
    tick: Tick | None = None,
    begin: int = 0,
) -> None:
    """Trains a network in place.

    Args:
        net: the network, on the device of `images`.
        images: preprocessed training images `[N, C, H, W]`.
        labels: class ids `[N]` or label logits `[N, K]`, on the same device.
        epochs: passes over the images.
        batch_size: images in a batch.
        optimiser: the optimiser of `net.parameters()`.
        generator: CPU generator for the order of the images and for augmentation.
        objective: what is minimised; the cross-entropy if left out.
        augmentation: a strategy of `dstill.data.siamese`, drawn anew for each batch.
        schedule: called before each epoch.
        observer: called after each epoch.
        tick: called about once a second with the number of epochs done so far, such as 2.5.
        begin: number of epochs that are already done (see `dstill.training.checkpoint`).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.eye(4).view(4, 1, 2, 2), torch.arange(4) % 2
        >>> sgd, generator = torch.optim.SGD(net.parameters(), lr=10.0), torch.Generator().manual_seed(0)
        >>> fit(net, images, labels, epochs=20, batch_size=4, optimiser=sgd, generator=generator)
        >>> accuracy(net, images, labels)
        1.0
    """
    net.train()
    objective = objective or cross_entropy_objective(derivatives_of(net))
    told = time.perf_counter()
    for epoch in range(begin, epochs):
        if schedule is not None:
            schedule(optimiser, epoch)
        started, losses, counts = time.perf_counter(), list[Tensor](), list[int]()
        for rows in shuffled_batches(len(images), batch_size, generator):
            here = sent(rows, images.device)
            raw = images[here]
            augmented = siamese.apply(raw, siamese.sample(augmentation, len(raw), generator))
            optimiser.zero_grad(set_to_none=True)
            loss = objective(net, Batch(augmented, raw, labels[here], rows, epoch))
            optimiser.step()
            losses.append(loss)  # read after the epoch, so that no step waits for the device
            counts.append(len(rows))
            if tick is not None and time.perf_counter() - told >= _TICK_SECONDS:
                told = time.perf_counter()
                tick(epoch + sum(counts) / len(images))
        if observer is not None:
            total = sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True))
            seconds = time.perf_counter() - started
            observer(EpochReport(epoch + 1, total / len(images), len(images) / seconds))


@torch.no_grad()
def answers(net: nn.Module, images: Tensor) -> Tensor:
    """Logits `[N, K]` for images `[N, C, H, W]`, in evaluation mode and without a gradient; the network's mode is restored."""
    written = derivatives_of(net)
    if written is not None and written.native:
        return written.logits(list(net.parameters()), images)
    return _in_blocks(net, images, net)


def predictions(net: nn.Module, images: Tensor) -> Tensor:
    """Class ids `[N]` predicted for images `[N, C, H, W]`, in evaluation mode; the network's mode is restored."""
    return answers(net, images).argmax(1)


@torch.no_grad()
def described(net: nn.Module, images: Tensor) -> Tensor:
    """Inputs `[N, F]` of the last linear layer for images `[N, C, H, W]`, in evaluation mode and without a gradient."""
    written = derivatives_of(net)
    if written is not None and written.native:
        return written.features(list(net.parameters()), images)
    return _in_blocks(net, images, lambda block: nets.features(net, block))


def _in_blocks(net: nn.Module, images: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    mode = net.training
    net.eval()
    try:
        return torch.cat([work(block) for block in images.split(_BLOCK)])
    finally:
        net.train(mode)


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose class is predicted correctly, in [0, 1]."""
    return float((predictions(net, images) == labels).cpu().double().mean())
