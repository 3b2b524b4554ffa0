"""Trains a fresh network under a protocol and measures it once. Every accuracy is measured here."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import NetConfig, Protocol
from dstill.data.preprocess import Preprocess, from_bytes
from dstill.data.real import Split
from dstill.errors import CollapseError, DstillError
from dstill.nets import networks as nets
from dstill.support import seeding
from dstill.support.workers import Workers, choose_workers, spread
from dstill.training.fit import Tick, fit, predictions, squared_objective, step_at, warm_cosine


def prepared(split: Split, preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """The preprocessed float32 images and the class ids of a split, on a device."""
    return from_bytes(preprocess, split.images, device), split.labels.to(device)


class Measured(NamedTuple):
    """The performance of one network on the test images.

    Attributes:
        accuracy: share of the images that are classified correctly, in [0, 1].
        confusion: how many images of class i (row) are classified as class j (column).
    """

    accuracy: float
    confusion: list[list[int]]


def train_network(
    net: NetConfig,
    images: Tensor,
    labels: Tensor,
    *,
    classes: int,
    protocol: Protocol,
    lr: float,
    augmentation: str,
    generator: torch.Generator,
    tick: Tick | None = None,
) -> nn.Module:
    """Trains a fresh network for as many passes as the protocol says.

    Args:
        net: the network.
        images: training images `[S, C, H, W]`, preprocessed.
        labels: class ids `[S]` or label logits `[S, K]`.
        classes: number of outputs.
        protocol: how to train.
        lr: learning rate.
        augmentation: DSA strategy.
        generator: decides the initial weights, the order of the images and the augmentation.
        tick: called about once a second with the number of passes done so far.
    """
    channels, size = images.shape[1], (images.shape[2], images.shape[3])
    network = nets.build(net, channels, classes, size, generator).to(images.device)
    optimiser: torch.optim.Optimizer
    if protocol.optimiser == "adam":
        optimiser = torch.optim.Adam(network.parameters(), lr=lr, weight_decay=protocol.weight_decay)
    else:
        optimiser = torch.optim.SGD(network.parameters(), lr=lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay)
    step = protocol.schedule == "step"
    with _drawing(net, generator, images, protocol.batch_size):
        fit(
            network,
            images,
            labels,
            epochs=protocol.passes,
            batch_size=protocol.batch_size,
            optimiser=optimiser,
            generator=generator,
            augmentation=augmentation,
            objective=squared_objective if protocol.loss == "squared" else None,
            schedule=step_at(protocol.passes // 2, protocol.lr_factor)
            if step
            else warm_cosine(lr, protocol.warmup, protocol.passes),
            tick=tick,
        )
    return network


def score_network(network: nn.Module, test: tuple[Tensor, Tensor], classes: int) -> Measured:
    """The performance of a trained network on preprocessed images with their class ids."""
    predicted, true = predictions(network, test[0]), test[1]
    counts = torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)
    return Measured(float((predicted == true).cpu().double().mean()), counts.tolist())


@contextlib.contextmanager
def _drawing(net: NetConfig, generator: torch.Generator, images: Tensor, batch_size: int) -> Iterator[None]:
    """What a training needs of layers that are not dstill's own.

    Dropout and the like draw from torch's global generators, which are seeded here and restored afterwards. Seeding takes
    nothing from `generator`. A batch norm over maps of a single pixel fails on a batch of a single image.
    """
    with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed())
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise DstillError(
                f"network {net.name} has a batch norm over maps of one pixel, and of {len(images)} images in batches of "
                f"{batch_size} one stays alone: take a protocol with another batch_size, larger images, or another network"
            ) from error


@dataclass(frozen=True)
class Trial:
    """A fresh network that is to be trained on a set and measured.

    Attributes:
        distilled: the set.
        net: the network.
        lr: learning rate; that of `learning_rate` if None.
        seed: master seed.
        stream: tells this trial from others with the same seed.
    """

    distilled: DistilledSet
    net: NetConfig
    lr: float | None
    seed: int
    stream: tuple[str | int, ...]


# Called with a trial, the share of its training that is done, and its accuracy once it is known.
TrialProgress = Callable[[Trial, float, float | None], None]


def learning_rate(distilled: DistilledSet, protocol: Protocol) -> float:
    """The learning rate for a set: its α, or the protocol's rate if it has none or the optimiser is not SGD.

    α was learned for SGD, so another optimiser does not use it.

    Args:
        distilled: the set.
        protocol: how to train.

    Raises:
        CollapseError: α is not positive, which can happen if `distill.guard` is off.
    """
    if distilled.alpha is None or protocol.optimiser != "sgd":
        return protocol.lr
    if distilled.alpha <= 0:
        raise CollapseError(f"the run collapsed: no network can be trained with the learned α, {distilled.alpha:.3g}")
    return distilled.alpha


def measure(
    trials: Sequence[Trial],
    test: tuple[Tensor, Tensor],
    protocol: Protocol,
    *,
    workers: Workers = 1,
    progress: TrialProgress | None = None,
) -> list[Measured]:
    """Trains and measures the network of each trial.

    Args:
        trials: the networks and their sets. `test` must have been preprocessed as the sets were.
        test: preprocessed test images and class ids.
        protocol: how to train.
        workers: number of processes; `auto` for one for each core, if the time of the first network shows that it is worth it.
        progress: called about once a second, and after each network.

    Returns:
        The results, in the order of the trials.

    Raises:
        CollapseError: a set has an α that is not positive.
        DstillError: a process died.
    """
    work = functools.partial(_measured, test, protocol)

    def tell(trial: Trial, told: tuple[float, float | None]) -> None:
        if progress is not None:
            progress(trial, *told)

    started = time.perf_counter()
    first = spread(work, trials[:1], 1, tell)
    rest = trials[1:]
    seconds = (time.perf_counter() - started) * len(rest)
    return first + spread(work, rest, choose_workers(workers, len(rest), test[0].device, seconds), tell)


def _measured(
    test: tuple[Tensor, Tensor], protocol: Protocol, trial: Trial, report: Callable[[tuple[float, float | None]], None]
) -> Measured:
    network = train_on_set(trial, protocol, test[0].device, lambda passes: report((passes / protocol.passes, None)))
    measured = score_network(network, test, trial.distilled.classes)
    report((1.0, measured.accuracy))
    return measured


def train_on_set(trial: Trial, protocol: Protocol, device: torch.device, tick: Tick | None = None) -> nn.Module:
    """The network of a trial, trained on its set; see `train_network`."""
    distilled = trial.distilled.decoded
    return train_network(
        trial.net,
        distilled.images.to(device),
        distilled.labels.to(device),
        classes=distilled.classes,
        protocol=protocol,
        lr=trial.lr or learning_rate(distilled, protocol),
        augmentation=distilled.augmentation,
        generator=seeding.generator(trial.seed, "evaluate", trial.net.name, *trial.stream),
        tick=tick,
    )


def trials_of(
    distilled: DistilledSet,
    count: int,
    *,
    net: NetConfig | None = None,
    lr: float | None = None,
    seed: int = 0,
    stream: tuple[str | int, ...] = (),
) -> list[Trial]:
    """Trials of several fresh networks on one set.

    Args:
        distilled: the set.
        count: number of networks.
        net: the network; that of the set if left out.
        lr: learning rate; that of `learning_rate` if left out.
        seed: master seed.
        stream: tells these trials from others with the same seed.
    """
    return [Trial(distilled, net or distilled.net, lr, seed, (*stream, k)) for k in range(count)]


def evaluate_set(
    distilled: DistilledSet,
    test: tuple[Tensor, Tensor],
    protocol: Protocol,
    *,
    networks: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    stream: tuple[str | int, ...] = (),
) -> list[float]:
    """The accuracies of fresh networks that are trained on a set.

    Args:
        distilled: the set.
        test: preprocessed test images and class ids.
        protocol: how to train.
        networks: number of networks; the protocol's number if left out.
        lr: learning rate; that of `learning_rate` if left out.
        seed: master seed.
        stream: tells these networks from others with the same seed.
    """
    trials = trials_of(distilled, networks or protocol.networks, lr=lr, seed=seed, stream=stream)
    return [measured.accuracy for measured in measure(trials, test, protocol)]
