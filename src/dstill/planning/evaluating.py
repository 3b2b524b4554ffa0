"""What it takes to measure sets: fresh networks, random images, the whole training set."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from dstill.config.settings import NetConfig, Passes, Protocol, TrainingConfig
from dstill.data.catalog import Shape
from dstill.evaluation.baselines import RANDOM_DRAWS, RANDOM_RATES
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.options import Evaluation
from dstill.nets.networks import evaluation_nets
from dstill.planning.clock import Clock
from dstill.planning.stages import Stage
from dstill.support.workers import threads_each


def image_bytes(shape: Shape) -> int:
    """Bytes of an image in float32."""
    return 4 * shape.numbers


class Measured(NamedTuple):
    """The sets that are measured.

    Attributes:
        net: their network.
        augmentation: their augmentation.
        ipc: stored images per class, as many as random ones.
        decoded_ipc: images per class that networks are trained on.
        sets: their number.
    """

    net: NetConfig
    augmentation: str
    ipc: int
    decoded_ipc: int
    sets: int = 1


def evaluation_stages(
    measured: Measured, protocol: Protocol, evaluation: Evaluation, clock: Clock, processes: int
) -> list[Stage]:
    """The stages of an evaluation.

    Args:
        measured: the sets.
        protocol: how networks are trained.
        evaluation: what is measured beside the sets.
        clock: how long a batch takes.
        processes: most processes that train networks.
    """
    shape, each, sets = clock.shape, evaluation.networks or protocol.networks, measured.sets
    sizes = {"peak_bytes": shape.test * image_bytes(shape), "disk_bytes": 0}

    def trainings(net: NetConfig, number: int, ipc: int, protocol: Protocol) -> float:
        return networks_seconds(net, number, ipc, measured.augmentation, protocol, shape.test, clock, processes)

    configs = evaluation_nets(measured.net, evaluation.nets)
    asked = [(config, sets * each, protocol) for config in configs]
    asked += [
        (configs[0], sets * (evaluation.networks or other.networks), other) for other in map(load_protocol, evaluation.also)
    ]
    seconds = sum(trainings(net, number, measured.decoded_ipc, under) for net, number, under in asked)
    note = f"{sum(number for _, number, _ in asked)} networks"
    stages = [Stage(name="evaluation", seconds=seconds, note=note, **sizes)]
    if evaluation.random:
        number = RANDOM_DRAWS * each + (len(RANDOM_RATES) if protocol.optimiser == "sgd" else 0)
        seconds, note = trainings(configs[0], number, measured.ipc, protocol), f"{number} networks, none if they are cached"
        stages.append(Stage(name="random images", seconds=seconds, note=note, **sizes))
    if evaluation.whole:
        full = load_protocol("whole")
        step = clock.training(configs[0], full.batch_size, measured.augmentation, torch.get_num_threads())
        seconds = full.networks * full.passes * math.ceil(shape.train / full.batch_size) * step
        held = (shape.train + shape.test) * image_bytes(shape)
        note = "none if it is cached"
        stages.append(Stage(name="whole set", seconds=seconds, peak_bytes=held, disk_bytes=0, note=note))
    return stages


def networks_seconds(
    net: NetConfig, number: int, ipc: int, augmentation: str, protocol: Protocol, judged: int, clock: Clock, processes: int
) -> float:
    """What it takes to train fresh networks on `ipc` images of each class, and to measure each on `judged` images."""
    count, used = ipc * clock.shape.classes, max(1, min(processes, number))
    step = clock.training(net, min(count, protocol.batch_size), augmentation, threads_each(used))
    one = protocol.passes * math.ceil(count / protocol.batch_size) * step
    return number * (one + clock.passes(net, Passes("forward", 1, judged))) / used


def network_seconds(net: NetConfig, config: TrainingConfig, clock: Clock) -> float:
    """What it takes to train a network on all real images without augmentation."""
    step = clock.training(net, config.batch_size, "none", torch.get_num_threads())
    return config.epochs * math.ceil(clock.shape.train / config.batch_size) * step
