"""How far a student drifts from an expert while it trains on a distilled set."""

from __future__ import annotations

import torch

from dstill.artifacts.distilled import DistilledSet
from dstill.data import siamese
from dstill.experts.trajectory import Trajectories
from dstill.methods.trajectory_matching import matching_settings
from dstill.nets import networks as nets
from dstill.support import seeding
from dstill.training.fit import student_batches
from dstill.unrolling.optimisers import sgd_step
from dstill.unrolling.student import Student


def accumulated_error(distilled: DistilledSet, trajectories: Trajectories, expert: int, device: torch.device) -> list[float]:
    """|ε_t| / |θ*_t - θ*_0| at every M-th expert epoch t, with ε_t = θ̂_t - θ*_t.

    Distillation matches one segment at a time, each from the expert's own weights. Training on the finished set runs through
    all segments, so that the errors add up. The student starts at θ*_0 and takes N steps for every M expert epochs, up to the
    last epoch that matching reads. It uses the set's α, and the batches and momentum of the distillation, and keeps the
    momentum from segment to segment. As in plain training, the weights are not perturbed and ν = 1.

    Args:
        distilled: a set of trajectory matching.
        trajectories: experts.
        expert: number of the expert to follow.
        device: device to train on.

    Raises:
        DstillError: the set was not made by trajectory matching.
    """
    settings, alpha = matching_settings(distilled), distilled.alpha
    assert alpha is not None
    channels, *size = distilled.images.shape[1:]
    generator = seeding.generator(distilled.seed, "following", expert)
    student = Student(nets.build(distilled.net, channels, distilled.classes, (size[0], size[1]), generator).to(device))
    origin = trajectories.rows(expert, 0, 1)[0].to(device)
    theta, buffer, errors = origin, torch.zeros_like(origin), list[float]()
    decoded = distilled.decoded
    images, labels = decoded.images.to(device), decoded.labels.to(device)
    last = min(settings.epochs_needed, trajectories.epochs)
    for epoch in range(settings.expert_epochs, last + 1, settings.expert_epochs):
        for rows in student_batches(len(images), settings.batch_syn, settings.student_steps, generator):
            some = siamese.apply(images[rows], siamese.sample(distilled.augmentation, len(rows), generator))
            gradient = student.gradient(theta, some, labels[rows])[1]
            theta, buffer = sgd_step(theta, buffer, gradient, alpha, settings.student_momentum)
        target = trajectories.rows(expert, epoch, epoch + 1)[0].to(device)
        errors.append(float((theta - target).norm() / (target - origin).norm()))
    return errors
