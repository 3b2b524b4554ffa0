"""The initialisation gives the right number of distinct real images, and those nearest to the centroids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from dstill.data.real import RealSet, Split
from dstill.experts.trajectory import Trajectories, save_expert
from dstill.methods.base import Problem
from dstill.methods.initialisation import (
    clusters,
    expert_network,
    initial_images,
    nearest_to_centroids,
    random_rows,
    representative_rows,
)
from dstill.methods.random import Random
from dstill.support import seeding

MakeProblem = Callable[..., Problem]
FEWER_DISTINCT_POINTS = "ignore:Number of distinct clusters"  # scikit-learn's ConvergenceWarning on duplicates


def uneven(count: int = 60) -> np.ndarray:
    """Features of one class: ten are far outliers, the others are duplicates of two points."""
    generator = np.random.default_rng(0)
    features = np.zeros((count, 4))
    features[count // 2 :] = 1.0
    outliers = generator.choice(count, 10, replace=False)
    features[outliers] = 100 * generator.standard_normal((10, 4))
    return features


def crowded(real: RealSet) -> RealSet:
    """Every training image three times: 60 per class."""
    train = Split(real.train.images.repeat(3, 1, 1, 1), real.train.labels.repeat(3))
    return replace(real, train=train, fingerprint="")


@pytest.mark.filterwarnings(FEWER_DISTINCT_POINTS)
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("ipc", [1, 3, 10, 15, 20, 50, 60])
def test_ipc_distinct_images_are_taken_also_where_clusters_are_smaller_than_their_share(ipc: int, released: bool) -> None:
    chosen = nearest_to_centroids(uneven(), ipc, clusters(ipc, released=released), seed=0)
    assert len(chosen) == len(set(chosen.tolist())) == ipc
    assert set(chosen.tolist()) <= set(range(60))


@pytest.mark.parametrize("ipc", [2, 6])
def test_the_images_taken_are_those_nearest_to_the_mean_of_their_cluster(ipc: int) -> None:
    generator = np.random.default_rng(0)
    blobs = [generator.standard_normal((20, 3)), generator.standard_normal((30, 3)) + 50]
    features = np.concatenate(blobs)
    chosen = set(nearest_to_centroids(features, ipc, 2, seed=0).tolist())
    expected: set[int] = set()
    for first, blob in ((0, blobs[0]), (20, blobs[1])):
        distances = [sum((x - m) ** 2 for x, m in zip(row, blob.mean(0), strict=True)) for row in blob]
        expected |= {first + int(i) for i in np.argsort(distances)[: ipc // 2]}
    assert chosen == expected


@pytest.mark.parametrize("ipc", [4, 5, 6, 7, 8])
def test_the_first_clusters_of_k_means_give_the_images_that_a_remainder_asks_for(ipc: int) -> None:
    generator = np.random.default_rng(1)
    features = np.concatenate([generator.standard_normal((10, 2)) + middle for middle in (0.0, 50.0, 100.0, 150.0)])
    chosen = nearest_to_centroids(features, ipc, 4, seed=2)
    counts = [int((chosen // 10 == blob).sum()) for blob in range(4)]
    centroids = KMeans(4, n_init=4, random_state=2).fit(features).cluster_centers_
    order = [int((centroid[0] + 25) // 50) for centroid in centroids]  # which blob is which cluster
    assert [counts[blob] for blob in order] == sorted(counts, reverse=True)
    assert sum(counts) == ipc
    assert max(counts) - min(counts) <= 1


def test_what_one_cluster_has_taken_the_next_one_passes_over() -> None:
    # Two clusters; that of the single far point has fewer images than its share of three.
    features = np.array([[0.0], [1.0], [2.0], [3.0], [100.0], [4.0]])
    assert sorted(nearest_to_centroids(features, 6, 2, seed=0).tolist()) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("ipc", "paper", "released"), [(1, 1, 1), (3, 3, 3), (9, 9, 9), (10, 10, 10), (15, 15, 10), (20, 10, 10), (50, 10, 10)]
)
def test_the_number_of_clusters(ipc: int, paper: int, released: int) -> None:
    assert (clusters(ipc, released=False), clusters(ipc, released=True)) == (paper, released)


@pytest.mark.parametrize("ipc", [1, 20])
def test_random_rows_are_distinct_and_of_their_class(tiny_real: RealSet, ipc: int) -> None:
    labels = tiny_real.train.labels
    rows = random_rows(tiny_real.train, 3, ipc, seeding.generator(0, "rows"))
    assert labels[rows].tolist() == [c for c in range(3) for _ in range(ipc)]
    assert len(set(rows.tolist())) == 3 * ipc


def test_random_rows_follow_their_generator(tiny_real: RealSet) -> None:
    draws = [random_rows(tiny_real.train, 3, 5, seeding.generator(seed, "rows")).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.filterwarnings(FEWER_DISTINCT_POINTS)
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("ipc", [1, 3, 10, 20, 50])
def test_representative_rows_are_distinct_and_of_their_class(
    make_problem: MakeProblem, tiny_real: RealSet, ipc: int, released: bool
) -> None:
    problem = make_problem(ipc=ipc, real=crowded(tiny_real))
    rows = representative_rows(problem, seeding.generator(0, "rows"), released=released)
    assert problem.real.train.labels[rows].tolist() == problem.labels().tolist()
    assert len(set(rows.tolist())) == 3 * ipc


@pytest.mark.parametrize("released", [False, True])
def test_one_image_a_class_is_the_one_nearest_to_the_mean_of_features_or_of_logits(
    make_problem: MakeProblem, tiny_real: RealSet, released: bool
) -> None:
    problem = make_problem(ipc=1)
    net = expert_network(problem)
    with torch.no_grad():
        described: Tensor = net.body(problem.prepared(torch.arange(60))).flatten(1)  # type: ignore[operator,union-attr]
        if released:
            described = net.classifier(described)  # type: ignore[operator]
    expected: list[int] = []
    for c in range(3):
        rows = [i for i in range(60) if int(tiny_real.train.labels[i]) == c]
        mean = described[rows].mean(0)
        expected.append(min(rows, key=lambda i: float((described[i] - mean).norm())))
    assert representative_rows(problem, seeding.generator(0, "rows"), released=released).tolist() == expected


def test_features_and_logits_choose_other_images(make_problem: MakeProblem) -> None:
    problem = make_problem(ipc=3)
    paper, released = (
        set(representative_rows(problem, seeding.generator(0, "rows"), released=released).tolist())
        for released in (False, True)
    )
    assert paper != released


def test_the_features_come_from_the_last_record_of_the_first_expert(
    make_problem: MakeProblem, trajectories: Trajectories
) -> None:
    net = expert_network(make_problem())
    assert torch.equal(parameters_to_vector(net.parameters()), trajectories.rows(0, 5, 6)[0])
    assert not net.training


def test_the_features_come_from_an_expert_that_is_kept_for_this_where_there_is_one(
    make_problem: MakeProblem, trajectories: Trajectories, tmp_path: Path
) -> None:
    rows = trajectories.rows(0, 0, 4).flip(0)
    save_expert(tmp_path, 0, rows, {"record": {"accuracy": [0.0] * 3, "step_lengths": [0.0] * 3}})
    net = expert_network(replace(make_problem(), feature_expert=Trajectories(tmp_path)))
    assert torch.equal(parameters_to_vector(net.parameters()), rows[3])


def test_noise_is_standard_normal_in_the_shape_of_the_set(make_problem: MakeProblem) -> None:
    images = initial_images(make_problem(ipc=20), "noise", seeding.generator(0, "noise"))
    assert images.shape == (60, 3, 8, 8)
    assert abs(float(images.mean())) < 0.05
    assert float(images.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["random", "representative", "representative-released"])
def test_the_start_is_preprocessed_real_images_class_by_class(make_problem: MakeProblem, kind: str) -> None:
    problem = make_problem(ipc=2)
    images = initial_images(problem, kind, seeding.generator(0, "start"))
    pixels = (problem.preprocess.invert(images) * 255).round().to(torch.uint8)
    for image, label in zip(pixels, problem.labels(), strict=True):
        (rows,) = (problem.real.train.images == image).flatten(1).all(1).nonzero(as_tuple=True)
        assert problem.real.train.labels[rows].tolist() == [int(label)]


def test_the_random_method_returns_real_images_without_a_learning_rate(make_problem: MakeProblem) -> None:
    method = Random()
    problem = make_problem(ipc=2)
    method.start(problem)
    assert method.iterations() == 0
    state = method.initialise(seeding.generator(0, "initialise"))
    distilled = method.result(state)
    assert torch.equal(distilled.images, initial_images(problem, "random", seeding.generator(0, "initialise")))
    assert distilled.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert distilled.alpha is None
