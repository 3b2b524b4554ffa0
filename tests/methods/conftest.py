"""Tiny experts, trained once per session, and problems with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstill.config.settings import ExpertConfig, NetConfig, Recipe
from dstill.data import preprocess as preprocessing
from dstill.data.real import RealSet
from dstill.experts.train import ExpertTask, train_missing
from dstill.experts.trajectory import Trajectories
from dstill.methods.base import Problem
from dstill.methods.matching_config import MatchingConfig

NET = NetConfig(width=4, depth=2)
EXPERTS = ExpertConfig(
    count=2,
    epochs=5,
    lr=0.1,
    momentum=0.0,
    weight_decay=0.0,
    batch_size=20,
    clipped_loss="off",
    gradient_penalty="off",
    lr_step="off",
)
# MTT's settings, reduced.
MATCHING: dict[str, Any] = {
    "iterations": 2,
    "student_steps": 5,
    "expert_epochs": 3,
    "max_start_epoch": 2,
    "lr_images": 10.0,
    "lr_alpha": 1e-3,
    "alpha_init": 0.1,
}


@pytest.fixture(scope="session")
def expert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture
def trajectories(tiny_real: RealSet, expert_folder: Path) -> Trajectories:
    """Two plain SGD experts of five epochs; the first test that needs them trains them, the others read them."""
    preprocess = preprocessing.fit("standardise", tiny_real.train.images)
    task = ExpertTask(tiny_real, preprocess, NET, EXPERTS, "none", 0)
    return Trajectories(train_missing(task, expert_folder, torch.device("cpu")))


@pytest.fixture
def make_problem(tiny_real: RealSet, trajectories: Trajectories) -> Callable[..., Problem]:
    """Builds a problem with reduced MTT settings; keywords of `MatchingConfig` change them."""

    def make(
        *,
        ipc: int = 1,
        seed: int = 0,
        real: RealSet = tiny_real,
        experts: Trajectories | None = trajectories,
        net: NetConfig = NET,
        augmentation: str = "none",
        **settings: Any,
    ) -> Problem:
        recipe = Recipe(
            data="tiny",
            method="mtt",
            ipc=ipc,
            net=net,
            augmentation=augmentation,
            experts=EXPERTS,
            distill=MatchingConfig(**{**MATCHING, **settings}),
        )
        preprocess = preprocessing.fit("standardise", real.train.images)
        return Problem(real, preprocess, recipe, experts, torch.device("cpu"), seed)

    return make
