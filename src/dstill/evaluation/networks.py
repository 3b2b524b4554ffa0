"""Training one fresh network under a protocol and measuring it once: the only way an accuracy arises."""

from __future__ import annotations

import torch
from torch import Tensor

from dstill import nets, seeding
from dstill.artifacts.distilled import DistilledSet
from dstill.config import NetConfig, Protocol
from dstill.data.preprocess import Preprocess
from dstill.data.real import Split
from dstill.training import accuracy, fit, step_at


def prepared(split: Split, preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """Preprocessed float32 images and labels of a split, on the device."""
    return preprocess.forward(split.images.to(device, torch.float32) / 255), split.labels.to(device)


def train_and_measure(
    net: NetConfig,
    images: Tensor,
    labels: Tensor,
    test: tuple[Tensor, Tensor],
    *,
    classes: int,
    protocol: Protocol,
    lr: float,
    augmentation: str,
    generator: torch.Generator,
) -> float:
    """Accuracy in [0, 1] of one fresh network: trained for the protocol's passes, measured once at the end.

    Args:
        net: which network.
        images: training images `[S, C, H, W]`, preprocessed.
        labels: class ids `[S]` or label logits `[S, K]`.
        test: preprocessed test images and class ids.
        classes: number of outputs.
        protocol: how to train.
        lr: learning rate.
        augmentation: DSA strategy.
        generator: decides initial weights, order and augmentation.
    """
    channels, size = images.shape[1], (images.shape[2], images.shape[3])
    network = nets.build(net, channels, classes, size, generator).to(images.device)
    optimiser = torch.optim.SGD(network.parameters(), lr=lr, momentum=protocol.momentum, weight_decay=protocol.weight_decay)
    fit(
        network,
        images,
        labels,
        epochs=protocol.passes,
        batch_size=protocol.batch_size,
        optimiser=optimiser,
        generator=generator,
        augmentation=augmentation,
        schedule=step_at(protocol.passes // 2, protocol.lr_factor),
    )
    return accuracy(network, *test)


def evaluate_set(
    distilled: DistilledSet,
    test: tuple[Tensor, Tensor],
    protocol: Protocol,
    *,
    net: NetConfig | None = None,
    networks: int | None = None,
    lr: float | None = None,
    seed: int = 0,
    stream: tuple[str | int, ...] = (),
) -> list[float]:
    """Accuracies of `networks` fresh networks trained on a set.

    Args:
        distilled: the set; its own preprocessing must have been applied to `test`.
        test: preprocessed images and class ids.
        protocol: how to train.
        net: evaluation network; the set's own if left out.
        networks: how many; the protocol's number if left out.
        lr: learning rate; the set's α, or the protocol's rate where it has none, if left out.
        seed: master seed.
        stream: names this evaluation among others of the same seed.
    """
    config = net or distilled.net
    device = test[0].device
    images, labels = distilled.images.to(device), distilled.labels.to(device)
    return [
        train_and_measure(
            config,
            images,
            labels,
            test,
            classes=distilled.classes,
            protocol=protocol,
            lr=lr or distilled.alpha or protocol.lr,
            augmentation=distilled.augmentation,
            generator=seeding.generator(seed, "evaluate", config.name, *stream, k),
        )
        for k in range(networks or protocol.networks)
    ]
