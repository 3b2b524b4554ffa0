"""Networks trained on the real images: what they forgot during training, for selection methods, and how they label images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstill.artifacts import files
from dstill.config.settings import NetConfig, TrainingConfig, canonical, digest
from dstill.data.preprocess import Preprocess, from_bytes
from dstill.data.real import RealSet
from dstill.derivatives.engine import derivatives_of
from dstill.nets import networks as nets
from dstill.support import seeding
from dstill.training.checkpoint import Bookmark, Training
from dstill.training.fit import Batch, EpochReport, Tick, answers, cross_entropy_objective, fit
from dstill.unrolling.student import Student

_KIND = "trained network"


@dataclass(frozen=True)
class TrainedNetwork:
    """A network after its training.

    Attributes:
        weights: its weights `[P]`.
        forgotten: for each training image, the number of passes in which it was classified wrongly after being classified
            correctly in the pass before; int64 `[N]`. An image that was never classified correctly gets the number of passes,
            which is more than any other image can have.
    """

    weights: Tensor
    forgotten: Tensor


@dataclass(frozen=True)
class NetworkTask:
    """Everything that determines a trained network.

    Attributes:
        real: the real data.
        preprocess: the preprocessing, fitted on the training images.
        net: the network.
        config: the training settings.
        seed: master seed.
        number: which of several networks that differ in nothing but their random draws, from 0.
    """

    real: RealSet
    preprocess: Preprocess
    net: NetConfig
    config: TrainingConfig
    seed: int
    number: int = 0

    def identity(self) -> dict[str, Any]:
        """What the weights depend on. The first network is named as if it were the only one, so that all methods share it."""
        return {
            "data": self.real.fingerprint,
            "preprocess": self.preprocess.kind,
            "net": canonical(self.net, exclude_none=True),
            "training": canonical(self.config),
            "seed": self.seed,
            **({"number": self.number} if self.number else {}),
        }

    def fingerprint(self) -> str:
        """The name of the network's file: 16 hex digits of the SHA-256 of its identity."""
        return digest(self.identity())

    def generator(self) -> torch.Generator:
        """The generator of all its random draws, at its start."""
        return seeding.generator(self.seed, "trained-network", *([self.number] if self.number else []))


@dataclass(frozen=True)
class Labeller:
    """Gives images the answers of a trained network as soft labels.

    Attributes:
        name: names the network, and so the labels.
        net: the network.
        preprocess: what its images go through.
        device: where it is.
    """

    name: str
    net: nn.Module
    preprocess: Preprocess
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Label logits `[N, K]` for pixels `[N, C, H, W]`, uint8."""
        return answers(self.net, from_bytes(self.preprocess, images, self.device))


class _Events:
    """Counts, for each training image, how often it turns from right to wrong between one pass and the next."""

    def __init__(self, count: int) -> None:
        self.right = torch.zeros(count, dtype=torch.bool)
        self.ever_right = torch.zeros(count, dtype=torch.bool)
        self.forgotten = torch.zeros(count, dtype=torch.int64)

    def __call__(self, batch: Batch, logits: Tensor) -> None:
        right = (logits.argmax(1) == batch.labels).cpu()
        self.forgotten[batch.rows] += self.right[batch.rows] & ~right
        self.ever_right[batch.rows] |= right
        self.right[batch.rows] = right


def train_network(
    task: NetworkTask,
    device: torch.device,
    observer: Callable[[EpochReport], None] | None = None,
    bookmark: Bookmark | None = None,
    tick: Tick | None = None,
) -> TrainedNetwork:
    """Trains on all real training images without augmentation, and counts forgetting events (Toneva et al. 2019).

    An image is judged when its batch is presented, before the optimiser's step.

    Args:
        task: what to train.
        device: device to train on.
        observer: called after each epoch.
        bookmark: the file in which the state is stored during the training. If it holds a state, the training is resumed.
        tick: called about once a second with the number of epochs done so far, such as 2.5.

    Raises:
        DstillError: the network has running statistics or dropout.
    """
    real, config = task.real, task.config
    generator = task.generator()
    net = nets.build(task.net, real.channels, real.classes, real.size, generator).to(device)
    Student(net)  # refuses running statistics, since only the weights are stored
    images = from_bytes(task.preprocess, real.train.images, device)
    events = _Events(len(real.train))
    sgd = torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    training = Training(net, sgd, generator)
    begin, stored, _ = bookmark.restore(training) if bookmark else (0, {}, {})
    vars(events).update(stored)

    def observe(report: EpochReport) -> None:
        if bookmark is not None:
            bookmark.store(report.epochs_done, training, lambda: (vars(events), {}))
        if observer is not None:
            observer(report)

    fit(
        net,
        images,
        real.train.labels.to(device),
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimiser=sgd,
        generator=generator,
        objective=cross_entropy_objective(derivatives_of(net), events),
        observer=observe,
        tick=tick,
        begin=begin,
    )
    forgotten = torch.where(events.ever_right, events.forgotten, config.epochs)
    return TrainedNetwork(nn.utils.parameters_to_vector(net.parameters()).detach().cpu(), forgotten)


def trained_network(
    task: NetworkTask,
    folder: Path,
    device: torch.device,
    observer: Callable[[EpochReport], None] | None = None,
    tick: Tick | None = None,
) -> TrainedNetwork:
    """The network of a task from a folder. If it is missing there, it is trained and stored first.

    Args:
        task: what to train.
        folder: the folder of trained networks.
        device: device to train on.
        observer: called after each epoch of a training.
        tick: called about once a second with the number of epochs done so far, such as 2.5.

    Raises:
        DstillError: the network has running statistics or dropout.
    """
    path = folder / f"{task.fingerprint()}.safetensors"

    def make() -> None:
        bookmark = Bookmark(folder / f"{task.fingerprint()}-training.safetensors")
        trained = train_network(task, device, observer, bookmark, tick)
        files.save(path, _KIND, {"weights": trained.weights, "forgotten": trained.forgotten}, task.identity())
        bookmark.remove()

    _, tensors = files.load_or_make(path, _KIND, make)
    return TrainedNetwork(tensors["weights"], tensors["forgotten"])


def labeller(task: NetworkTask, trained: TrainedNetwork, device: torch.device) -> Labeller:
    """What labels images as the trained network of a task does."""
    real = task.real
    net = nets.build(task.net, real.channels, real.classes, real.size, task.generator()).to(device)
    nn.utils.vector_to_parameters(trained.weights.to(device), net.parameters())
    return Labeller(task.fingerprint(), net, task.preprocess, device)
