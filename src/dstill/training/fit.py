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

_BLOCK = 512  # images at a time where nothing has to be remembered

# Computes the loss of a batch, leaves its gradients in `parameter.grad`, returns the detached loss.
Objective = Callable[[nn.Module, "Batch"], Tensor]
# Called before each epoch; may change learning rates or clear the optimiser's state.
Schedule = Callable[[torch.optim.Optimizer, int], None]


@dataclass(frozen=True)
class Batch:
    """What an objective sees.

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
    """Mean loss of one pass, the number of passes done, and images trained on per second."""

    epochs_done: int
    loss: float
    images_per_second: float


def probabilities(labels: Tensor, classes: int) -> Tensor:
    """Target probabilities `[B, K]` of class ids `[B]` (float32), or the softmax of label logits `[B, K]`."""
    if labels.is_floating_point():
        return labels.softmax(1)
    return torch.zeros(len(labels), classes, device=labels.device).scatter_(1, labels.unsqueeze(1), 1.0)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy with class ids `[B]`, or with the softmax of label logits `[B, K]`."""
    if labels.is_floating_point():
        return -(labels.softmax(1) * logits.log_softmax(1)).sum(1).mean()
    return nn.functional.cross_entropy(logits, labels)


def cross_entropy_objective(written: Derivatives | None, watch: Callable[[Batch, Tensor], None] | None = None) -> Objective:
    """Mean cross-entropy of the augmented batch, by the network's hand-written derivatives; by the library's without.

    `watch` is called with each batch and its logits `[B, K]`, before the step that they lead to.
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
    """Row numbers of one pass in random order, in batches of `size`; the last one may be smaller."""
    yield from torch.randperm(count, generator=generator).split(size)


def student_batches(count: int, size: int | None, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row numbers of the N steps of a student: fresh permutations one after another, in batches of `size` (all if None).

    Every image is used once before any is used twice.
    """
    passes = (shuffled_batches(count, size or count, generator) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(passes), steps)


def step_at(epoch: int, factor: float, *, reset: bool = False) -> Schedule:
    """Multiplies the learning rate once, before the pass number `epoch`; `reset` also forgets the momentum."""

    def schedule(optimiser: torch.optim.Optimizer, current: int) -> None:
        if current == epoch:
            for group in optimiser.param_groups:
                group["lr"] *= factor
            if reset:
                optimiser.state.clear()

    return schedule


def warm_cosine(lr: float, warmup: int, total: int) -> Schedule:
    """Grows the learning rate linearly to `lr` over `warmup` passes; then it falls to 0 at `total` along half a cosine."""

    def schedule(optimiser: torch.optim.Optimizer, current: int) -> None:
        falling = math.cos(math.pi * (current - warmup) / max(1, total - warmup))
        factor = (current + 1) / warmup if current < warmup else 0.5 * (1 + falling)
        for group in optimiser.param_groups:
            group["lr"] = factor * lr

    return schedule


def squared_objective(net: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of the outputs to the label probabilities minus 1/K, divided by √(K/10): FRePo's targets."""
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
    begin: int = 0,
) -> None:
    """Trains `net` in place.

    Args:
        net: on the device of `images`.
        images: preprocessed training images `[N, C, H, W]`.
        labels: class ids `[N]`, or label logits `[N, K]`, on the same device.
        epochs: passes over the images.
        batch_size: images a step.
        optimiser: over `net.parameters()`.
        generator: CPU generator for the order of the images and for augmentation.
        objective: what is minimised; cross-entropy if left out.
        augmentation: a strategy of `dstill.data.siamese`, drawn anew for every batch.
        schedule: called before each epoch.
        observer: called after each epoch.
        begin: epochs that were done before (see `dstill.training.checkpoint`).
    """
    net.train()
    objective = objective or cross_entropy_objective(derivatives_of(net))
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
            losses.append(loss)  # read at the end: until then the device need not be waited for
            counts.append(len(rows))
        if observer is not None:
            total = sum(loss * count for loss, count in zip(torch.stack(losses).tolist(), counts, strict=True))
            seconds = time.perf_counter() - started
            observer(EpochReport(epoch + 1, total / len(images), len(images) / seconds))


@torch.no_grad()
def predictions(net: nn.Module, images: Tensor) -> Tensor:
    """Class ids predicted for `[N, C, H, W]`, in evaluation mode; the network's mode is restored."""
    written = derivatives_of(net)
    if written is not None and written.native:
        return written.logits(list(net.parameters()), images).argmax(1)
    return _in_blocks(net, images, lambda block: net(block).argmax(1))


@torch.no_grad()
def described(net: nn.Module, images: Tensor) -> Tensor:
    """Features `[N, F]` before the last linear layer of `[N, C, H, W]`, in evaluation mode; no gradient."""
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
    """Share of images whose class is predicted, in [0, 1]."""
    return float((predictions(net, images) == labels).cpu().double().mean())
