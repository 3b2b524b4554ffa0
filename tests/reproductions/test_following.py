"""The accumulated error is zero for a student that repeats the expert's own steps, and grows otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import NetConfig, Recipe
from dstill.data import preprocess as preprocessing
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories, save_expert
from dstill.methods.trajectory_matching import MatchingConfig
from dstill.nets.networks import build
from dstill.reproductions.following import accumulated_error
from dstill.unrolling.student import Student

CPU = torch.device("cpu")
NET = NetConfig(width=4, depth=2)
STEPS, SPAN, LAST = 3, 2, 6


@pytest.fixture
def distilled(tiny_real: RealSet) -> Callable[..., DistilledSet]:
    def make(alpha: float | None = 0.1, method: str = "mtt") -> DistilledSet:
        settings = MatchingConfig(student_steps=STEPS, expert_epochs=SPAN, max_start_epoch=LAST - SPAN + 1)
        recipe = Recipe(data="tiny", method=method, ipc=1, net=NET, augmentation="none", distill=settings)
        preprocess = preprocessing.fit("standardise", tiny_real.train.images)
        return DistilledSet(
            images=preprocess.forward(tiny_real.train.images[[0, 20, 40]].float() / 255),
            labels=torch.arange(3),
            alpha=alpha,
            preprocess=preprocess,
            method=method,
            ipc=1,
            class_names=tiny_real.class_names,
            augmentation="none",
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
