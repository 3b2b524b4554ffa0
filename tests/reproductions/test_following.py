"""The accumulated error is zero for a student that repeats the expert's own steps, and grows otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import NetConfig, Recipe
from dstill.data import preprocess as preprocessing
from dstill.data import siamese
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories, save_expert
from dstill.methods.matching_config import MatchingConfig
from dstill.nets.networks import build
from dstill.reproductions.following import accumulated_error
from dstill.support import seeding
from dstill.unrolling.student import Student

CPU = torch.device("cpu")
NET = NetConfig(width=4, depth=2)
STEPS, SPAN, LAST = 3, 2, 6


@pytest.fixture
def distilled(tiny_real: RealSet) -> Callable[..., DistilledSet]:
    def make(
        alpha: float | None = 0.1, method: str = "mtt", augmentation: str = "none", **changes: float | None
    ) -> DistilledSet:
        fixed = {"student_steps": STEPS, "expert_epochs": SPAN, "max_start_epoch": LAST - SPAN + 1}
        settings = MatchingConfig.model_validate({**fixed, **changes})
        recipe = Recipe(data="tiny", method=method, ipc=1, net=NET, augmentation=augmentation, distill=settings)
        preprocess = preprocessing.fit("standardise", tiny_real.train.images)
        return DistilledSet(
            images=preprocess.forward(tiny_real.train.images[[0, 20, 40]].float() / 255),
            labels=torch.arange(3),
            alpha=alpha,
            preprocess=preprocess,
            method=method,
            ipc=1,
            class_names=tiny_real.class_names,
            augmentation=augmentation,
            net=NET,
            data="tiny",
            data_fingerprint="0",
            recipe=recipe,
            seed=0,
        )

    return make


@pytest.fixture
def own_steps(distilled: Callable[..., DistilledSet], tmp_path: Path) -> Trajectories:
    """An expert that takes plain gradient steps on the set itself, N in M epochs; the records in between do not matter."""
    one = distilled()
    student = Student(build(NET, 3, 3, (8, 8), torch.Generator().manual_seed(5)))
    theta = torch.cat([p.detach().reshape(-1) for p in student.net.parameters()])
    rows = [theta]
    for _ in range(LAST // SPAN):
        for _ in range(STEPS):
            images, labels = one.images, one.labels
            loss = torch.nn.functional.cross_entropy(student.logits(leaf := theta.requires_grad_(), images), labels)
            theta = (leaf - 0.1 * torch.autograd.grad(loss, leaf)[0]).detach()
        rows += [rows[-1], theta]
    record = {"accuracy": [0.0] * LAST, "step_lengths": [0.0] * LAST}
    save_expert(tmp_path, 0, torch.stack([row.detach() for row in rows]), {"record": record})
    return Trajectories(tmp_path)


def test_a_student_that_repeats_the_experts_steps_has_no_error(
    distilled: Callable[..., DistilledSet], own_steps: Trajectories
) -> None:
    errors = accumulated_error(distilled(), own_steps, 0, CPU)
    assert len(errors) == LAST // SPAN
    assert max(errors) < 1e-5


def test_a_wrong_rate_leads_astray(distilled: Callable[..., DistilledSet], own_steps: Trajectories) -> None:
    exact, slower, slowest = (accumulated_error(distilled(alpha), own_steps, 0, CPU) for alpha in (0.1, 0.05, 0.01))
    assert exact[-1] < slower[-1] < slowest[-1] < 1


def test_only_sets_with_a_student_follow(distilled: Callable[..., DistilledSet], own_steps: Trajectories) -> None:
    with pytest.raises(DstillError, match="only sets of trajectory matching"):
        accumulated_error(distilled(alpha=None), own_steps, 0, CPU)


@pytest.mark.parametrize("student_momentum", [0.0, 0.9])
def test_the_errors_are_those_of_plain_training_that_is_never_put_back(
    distilled: Callable[..., DistilledSet], tmp_path: Path, student_momentum: float
) -> None:
    """From θ*_0 on, with the set's augmentation and batches, and one optimiser for all segments."""
    generator = torch.Generator().manual_seed(1)
    net = build(NET, 3, 3, (8, 8), generator)
    origin = parameters_to_vector(net.parameters()).detach()
    rows = origin + 0.02 * torch.randn(LAST + 1, len(origin), generator=generator).cumsum(0)
    save_expert(tmp_path, 0, rows, {"record": {"accuracy": [0.0] * LAST, "step_lengths": [0.0] * LAST}})
    one = distilled(augmentation="colour_crop_flip_rotate", batch_syn=2, student_momentum=student_momentum)

    draws = seeding.generator(one.seed, "following", 0)
    build(NET, 3, 3, (8, 8), draws)  # its weights are the first draws
    vector_to_parameters(rows[0].clone(), net.parameters())
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=student_momentum)
    expected: list[float] = []
    for epoch in range(SPAN, LAST + 1, SPAN):
        left: list[int] = []  # of the pass under way: every segment begins a new one
        for _ in range(STEPS):
            left = left or torch.randperm(3, generator=draws).tolist()
            batch, left = left[:2], left[2:]
            augmented = siamese.apply(one.images[batch], siamese.sample(one.augmentation, len(batch), draws))
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(augmented), one.labels[batch]).backward()
            optimiser.step()
        theta = parameters_to_vector(net.parameters()).detach()
        expected.append(float((theta - rows[epoch]).norm() / (rows[epoch] - rows[0]).norm()))
    assert accumulated_error(one, Trajectories(tmp_path), 0, CPU) == pytest.approx(expected, rel=1e-4)


def test_a_student_follows_on_what_stored_images_hold(distilled: Callable[..., DistilledSet], own_steps: Trajectories) -> None:
    held = replace(distilled(), parts=2)
    assert accumulated_error(held, own_steps, 0, CPU) == accumulated_error(held.decoded, own_steps, 0, CPU)
    assert accumulated_error(held, own_steps, 0, CPU) != accumulated_error(distilled(), own_steps, 0, CPU)
