"""The two baselines beside every result: random real images with the same IPC, and the whole training set."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.result import Score
from dstill.config.settings import NetConfig, Protocol
from dstill.data.preprocess import from_bytes
from dstill.data.real import RealSet, Split
from dstill.evaluation.networks import Trial, TrialProgress, measure, prepared, score_network, train_network, trials_of
from dstill.evaluation.protocols import load_protocol
from dstill.experts.trained import Labeller
from dstill.methods.initialisation import random_rows
from dstill.support import seeding
from dstill.support.workers import Workers
from dstill.training.fit import Tick

RANDOM_DRAWS = 3
# The learning rates from which one is chosen for random images.
RANDOM_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def random_set(like: DistilledSet, split: Split, generator: torch.Generator, labeller: Labeller | None = None) -> DistilledSet:
    """Random real images, with the preprocessing, augmentation and IPC of another set, and so as many bytes.

    They are stored one by one, whatever the images of the other set hold.

    Args:
        like: the other set.
        split: the real images to draw from.
        generator: draws the images.
        labeller: gives them soft labels; class ids if left out.
    """
    rows = random_rows(split, like.classes, like.ipc, generator)
    images = from_bytes(like.preprocess, split.images[rows], like.images.device)
    labels = split.labels[rows] if labeller is None else labeller(split.images[rows]).to(images.device)
    fields = {**like.__dict__, "images": images, "labels": labels, "alpha": None, "method": "random", "parts": 1}
    return DistilledSet(**fields)


def random_rates(real: RealSet, protocol: Protocol) -> list[float]:
    """The learning rates from which one is chosen for random images; a single one if there is no choice.

    There is none under a protocol with Adam, or if a class has a single training image, so that none can be held out.
    """
    lonely = int(torch.bincount(real.train.labels, minlength=real.classes).min()) < 2
    return [protocol.lr] if lonely or protocol.optimiser != "sgd" else list(RANDOM_RATES)


def random_trainings(real: RealSet, protocol: Protocol, networks: int) -> int:
    """How many networks `random_baseline` trains."""
    rates = len(random_rates(real, protocol))
    return (rates if rates > 1 else 0) + RANDOM_DRAWS * networks


def random_baseline(
    like: DistilledSet,
    real: RealSet,
    test: tuple[Tensor, Tensor],
    protocol: Protocol,
    *,
    net: NetConfig | None = None,
    networks: int | None,
    seed: int,
    labeller: Labeller | None = None,
    workers: Workers = 1,
    note: Callable[[str], None] = lambda _: None,
    progress: TrialProgress | None = None,
) -> Score:
    """The accuracy of random real images under a protocol: `RANDOM_DRAWS` draws, with several networks each.

    A distilled set may come with a learned rate. The comparison is meant to be between images, not between learning rates, so
    the rate for random images is chosen from `RANDOM_RATES` on a held-out part of the training images. The test images are not
    used for this choice.

    Args:
        like: the set that the random images are compared with.
        real: the real data.
        test: preprocessed test images and class ids.
        protocol: how to train and measure.
        net: the network; that of `like` if left out.
        networks: number of networks for each draw; the protocol's number if None.
        seed: master seed.
        labeller: gives the random images soft labels; their classes if left out. It may know the held-out part, since the rate
            is all that is chosen there.
        workers: number of processes, or `auto`.
        note: called with messages.
        progress: called about once a second, and after each of `random_trainings` networks.
    """
    rates = random_rates(real, protocol)
    best = rates[0]
    if len(rates) == 1 and protocol.optimiser == "sgd":
        note("a class has a single training image, so none can be held out: random images take the protocol's learning rate")
    if len(rates) > 1:
        note(f"random images: trying learning rates {', '.join(f'{rate:.3g}' for rate in rates)}")
        held = real.holdout(seed)
        validation = prepared(held.test, like.preprocess, test[0].device)
        draw = random_set(like, held.train, seeding.generator(seed, "random-rate"), labeller)
        tried = [trial for lr in rates for trial in trials_of(draw, 1, net=net, lr=lr, seed=seed, stream=("random-rate",))]
        reached = [one.accuracy for one in measure(tried, validation, protocol, workers=workers, progress=progress)]
        best = max(zip(reached, rates, strict=True), key=lambda pair: pair[0])[1]
    count = networks or protocol.networks
    trials: list[Trial] = []
    for k in range(RANDOM_DRAWS):
        draw = random_set(like, real.train, seeding.generator(seed, "random-draw", k), labeller)
        trials += trials_of(draw, count, net=net, lr=best, seed=seed, stream=("random", k))
    note(f"random images: {RANDOM_DRAWS} draws, {count} network(s) each")
    scores = [one.accuracy for one in measure(trials, test, protocol, workers=workers, progress=progress)]
    return Score.of([scores[k * count : (k + 1) * count] for k in range(RANDOM_DRAWS)], lr=best)


def _after(tick: Tick, before: int, passes: float) -> None:
    tick(before + passes)


def whole_set(
    net: NetConfig, like: DistilledSet, real: RealSet, test: tuple[Tensor, Tensor], *, seed: int, tick: Tick | None = None
) -> Score:
    """The accuracy of the whole training set under the protocol `whole`.

    Args:
        net: the network.
        like: the set whose preprocessing and augmentation are used.
        real: the real data.
        test: preprocessed test images and class ids.
        seed: master seed.
        tick: called about once a second with the number of passes done so far, those of all networks together.
    """
    protocol = load_protocol("whole")
    images, labels = prepared(real.train, like.preprocess, test[0].device)
    values = []
    for k in range(protocol.networks):
        network = train_network(
            net,
            images,
            labels,
            classes=real.classes,
            protocol=protocol,
            lr=protocol.lr,
            augmentation=like.augmentation,
            generator=seeding.generator(seed, "whole", k),
            tick=tick and functools.partial(_after, tick, k * protocol.passes),
        )
        values.append(score_network(network, test, real.classes).accuracy)
    return Score.of([values], lr=protocol.lr)
