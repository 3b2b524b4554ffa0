"""Herding and Forgetting against brute force, and the network that they use."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dstill.config.settings import NetConfig, TrainingConfig
from dstill.data import preprocess as preprocessing
from dstill.data.real import RealSet
from dstill.derivatives.engine import Derivatives
from dstill.errors import DstillError
from dstill.experts.trained import NetworkTask, train_network, trained_network
from dstill.methods.herding import herd
from dstill.methods.selection import highest
from dstill.training.checkpoint import Bookmark
from dstill.training.fit import Batch, EpochReport, Objective, cross_entropy_objective, predictions

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(5))
def test_each_herded_image_brings_the_mean_of_the_chosen_nearest_to_the_mean_of_all(seed: int) -> None:
    features = torch.randn(12, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = herd(features, 6).tolist()
    assert len(set(chosen)) == 6
    for k in range(6):
        free = [i for i in range(12) if i not in chosen[:k]]
        distances = {i: float((features[[*chosen[:k], i]].mean(0) - features.mean(0)).norm()) for i in free}
        assert chosen[k] == min(free, key=lambda i: distances[i])


def test_the_highest_scores_come_first_and_ties_are_drawn() -> None:
    scores = torch.tensor([0, 5, 2, 2, 2, 9])
    draws = [highest(scores, 3, torch.Generator().manual_seed(seed)).tolist() for seed in range(30)]
    assert all(draw[:2] == [5, 1] for draw in draws)
    assert {draw[2] for draw in draws} == {2, 3, 4}


def task(real: RealSet, epochs: int, lr: float = 0.05) -> NetworkTask:
    config = TrainingConfig(epochs=epochs, lr=lr, batch_size=7)
    return NetworkTask(real, preprocessing.fit("standardise", real.train.images), NetConfig(width=4, depth=1), config, 0)


def test_forgetting_events_are_the_changes_from_right_to_wrong(tiny_real: RealSet, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[bytes], list[int]]] = []

    def watched(written: Derivatives | None, watch: Callable[[Batch, torch.Tensor], None]) -> Objective:
        objective = cross_entropy_objective(written, watch)

        def asked_first(net: torch.nn.Module, batch: Batch) -> torch.Tensor:
            seen.append(([image.numpy().tobytes() for image in batch.raw], predictions(net, batch.raw).tolist()))
            return objective(net, batch)

        return asked_first

    monkeypatch.setattr("dstill.experts.trained.cross_entropy_objective", watched)
    job = task(tiny_real, 5, lr=5.0)  # a learning rate so large that much is forgotten
    trained = train_network(job, CPU)
    images = job.preprocess.forward(tiny_real.train.images.float() / 255)
    history: dict[bytes, list[int]] = {}
    for names, found in seen:
        for name, prediction in zip(names, found, strict=True):
            history.setdefault(name, []).append(prediction)
    expected = []
    for image, label in zip(images, tiny_real.train.labels.tolist(), strict=True):
        right = [prediction == label for prediction in history[image.numpy().tobytes()]]
        assert len(right) == 5
        expected.append(sum(a and not b for a, b in itertools.pairwise(right)) if any(right) else 5)
    assert trained.forgotten.tolist() == expected
    assert sum(expected) > 0


def test_a_network_whose_state_is_more_than_its_weights_is_refused(tiny_real: RealSet) -> None:
    with pytest.raises(DstillError, match="running statistics"):
        train_network(replace(task(tiny_real, 1), net=NetConfig(width=4, depth=1, norm="batch")), CPU)


def test_the_network_is_trained_once_and_classifies(tiny_real: RealSet, tmp_path: Path) -> None:
    epochs: list[int] = []

    def watch(report: EpochReport) -> None:
        epochs.append(report.epochs_done)

    found = [trained_network(task(tiny_real, 6), tmp_path, CPU, watch) for _ in range(2)]
    assert epochs == [1, 2, 3, 4, 5, 6]
    assert torch.equal(found[0].weights, found[1].weights) and torch.equal(found[0].forgotten, found[1].forgotten)
    trained_network(task(tiny_real, 3), tmp_path, CPU, watch)
    assert len(epochs) == 9, "another training is another network"


def test_a_network_that_was_cut_off_goes_on_to_the_same_bits(tiny_real: RealSet, tmp_path: Path) -> None:
    def cut(report: EpochReport) -> None:
        if report.epochs_done == 4:
            raise KeyboardInterrupt

    job, bookmark = task(tiny_real, 6, lr=5.0), Bookmark(tmp_path / "training.safetensors", seconds=0)
    whole, epochs = train_network(job, CPU), []
    with pytest.raises(KeyboardInterrupt):
        train_network(job, CPU, cut, bookmark)
    again = train_network(job, CPU, lambda report: epochs.append(report.epochs_done), bookmark)
    assert epochs == [5, 6]
    assert again.weights.equal(whole.weights)
    assert again.forgotten.equal(whole.forgotten)


def test_a_damaged_network_is_set_aside_and_trained_again(tiny_real: RealSet, tmp_path: Path) -> None:
    right = trained_network(task(tiny_real, 2), tmp_path, CPU).weights.clone()  # loaded weights are a view of the file
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert trained_network(task(tiny_real, 2), tmp_path, CPU).weights.equal(right)
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.damaged"]
