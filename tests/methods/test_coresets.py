"""K-Means, k-centre, GraNd and EL2N against brute force, and the several networks that the last two ask."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from dstill.config.settings import NetConfig, Recipe, TrainingConfig, digest
from dstill.data import preprocess as preprocessing
from dstill.data.real import RealSet, Split
from dstill.distillation.loop import make_method
from dstill.errors import DstillError
from dstill.experts.trained import NetworkTask, TrainedNetwork, train_network
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Choice, Machine
from dstill.methods import grand
from dstill.methods.base import Problem
from dstill.methods.difficulty import Difficulty, DifficultyConfig, EarlyTrainingConfig
from dstill.methods.el2n import error_norms
from dstill.methods.grand import gradient_norms
from dstill.methods.k_centre import greedy_centres
from dstill.methods.selection import Selection
from dstill.nets import networks as nets
from dstill.nets.convnet import ConvNet
from dstill.nets.norm import Norm
from dstill.support import seeding

CPU = torch.device("cpu")
NET = NetConfig(width=4, depth=1)
BY_FEATURES = ("herding", "kmeans", "k-centre")
BY_SCORES = ("grand", "el2n")


def task(real: RealSet, number: int = 0, epochs: int = 2) -> NetworkTask:
    config = TrainingConfig(epochs=epochs, lr=0.05, batch_size=7)
    return NetworkTask(real, preprocessing.fit("standardise", real.train.images), NET, config, seed=3, number=number)


def selection(method: str, real: RealSet, *, ipc: int = 1, networks: int = 1, **settings: Any) -> Selection:
    """A method that is ready to choose, with networks trained for two epochs."""
    recipe = Recipe.model_validate({"data": real.name, "method": method, "ipc": ipc, "net": NET, "distill": settings})
    trained = tuple(train_network(task(real, number), CPU) for number in range(networks))
    problem = Problem(real, task(real).preprocess, recipe, None, CPU, 0, trained=trained)
    made = make_method(problem)
    assert isinstance(made, Selection)
    return made


def shuffled(real: RealSet) -> RealSet:
    """The same training images in another order, so that the classes are mixed."""
    order = torch.randperm(len(real.train), generator=torch.Generator().manual_seed(2))
    return replace(real, train=Split(real.train.images[order], real.train.labels[order]), fingerprint="")


# Selection by features


@pytest.mark.parametrize("seed", range(5))
def test_k_centre_takes_the_image_farthest_from_those_it_has(seed: int) -> None:
    points = torch.randn(15, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean = points.mean(0)
    expected = [min(range(15), key=lambda i: math.dist(points[i], mean))]
    while len(expected) < 7:
        expected.append(max(range(15), key=lambda i: min(math.dist(points[i], points[j]) for j in expected)))
    assert greedy_centres(points, 7).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_k_centre_leaves_no_image_twice_as_far_as_the_best_choice_would(seed: int) -> None:
    points = torch.randn(9, 2, generator=torch.Generator().manual_seed(seed))

    def radius(chosen: tuple[int, ...]) -> float:
        return max(min(math.dist(point, points[i]) for i in chosen) for point in points)

    best = min(map(radius, itertools.combinations(range(9), 3)))
    assert best <= radius(tuple(greedy_centres(points, 3).tolist())) <= 2 * best


def test_k_centre_takes_no_image_twice_even_if_all_are_copies() -> None:
    assert sorted(greedy_centres(torch.ones(4, 2), 4).tolist()) == [0, 1, 2, 3]


def test_k_centre_looks_at_each_class_by_itself_through_the_trained_network(tiny_real: RealSet) -> None:
    real = shuffled(tiny_real)
    method = selection("k-centre", real, ipc=3)
    net = method.problem.trained_network().eval()
    expected: list[int] = []
    for c in range(3):
        rows = torch.nonzero(real.train.labels == c).flatten()
        with torch.no_grad():
            features = nets.features(net, method.problem.prepared(rows))
        expected += rows[greedy_centres(features, 3)].tolist()
    assert method.choose(torch.Generator()).tolist() == expected


@pytest.mark.parametrize("ipc", [1, 4])
def test_k_means_takes_the_image_nearest_to_each_centroid(tiny_real: RealSet, ipc: int) -> None:
    method = selection("kmeans", tiny_real, ipc=ipc)
    net, draws = method.problem.trained_network().eval(), torch.Generator().manual_seed(5)
    chosen = method.choose(torch.Generator().manual_seed(5)).tolist()
    assert len(set(chosen)) == 3 * ipc
    for c in range(3):
        rows = torch.nonzero(tiny_real.train.labels == c).flatten()
        with torch.no_grad():
            features = nets.features(net, method.problem.prepared(rows))
        seed = int(torch.randint(2**31, (), generator=draws))
        centroids = KMeans(ipc, n_init=4, random_state=seed).fit(features.numpy()).cluster_centers_
        of_class = [rows.tolist().index(row) for row in chosen[c * ipc : (c + 1) * ipc]]
        for k, centroid in enumerate(centroids.tolist()):
            free = [i for i in range(len(rows)) if i not in of_class[:k]]
            distances = {i: math.dist(features[i].tolist(), centroid) for i in free}
            assert distances[of_class[k]] == pytest.approx(min(distances.values()), rel=1e-5)  # two of a cluster are as near


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")  # scikit-learn's ConvergenceWarning on duplicates
@pytest.mark.parametrize("method", ["kmeans", "k-centre"])
def test_no_image_is_taken_twice_where_most_are_copies(tiny_real: RealSet, method: str) -> None:
    rows = torch.cat([tiny_real.train.labels.eq(c).nonzero()[:1].repeat(6, 1) for c in range(3)]).flatten()
    copies = replace(tiny_real, train=tiny_real.train.take(rows), fingerprint="")
    chosen = selection(method, copies, ipc=6).choose(torch.Generator()).tolist()
    assert sorted(chosen) == list(range(18))


# Scores


def convnet(norm: Norm, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64, seven images and their classes."""
    generator = torch.Generator().manual_seed(seed)
    net = nets.build(NetConfig(width=8, depth=2, norm=norm), 3, 4, (8, 8), generator).double()
    images = torch.randn(7, 3, 8, 8, generator=generator, dtype=torch.float64)
    return net, images, torch.randint(4, (7,), generator=generator)


def one_by_one(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Norms of the gradients by plain autograd, an image at a time."""
    found = []
    for image, label in zip(images, labels, strict=True):
        loss = -net(image[None])[0].log_softmax(0)[label]
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        found.append(math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("norm", ["instance", "group", "none"])
def test_grand_is_the_norm_of_each_images_own_gradient(norm: Norm) -> None:
    net, images, labels = convnet(norm, 0)
    torch.testing.assert_close(gradient_norms(net, images, labels), one_by_one(net, images, labels), rtol=1e-11, atol=0)


def test_grand_does_not_depend_on_the_size_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    net, images, labels = convnet("instance", 1)
    sizes: list[int] = []
    forward = ConvNet.forward
    monkeypatch.setattr(ConvNet, "forward", lambda self, some: sizes.append(1) or forward(self, some))
    whole = gradient_norms(net, images, labels)
    gradient = 8 * sum(parameter.numel() for parameter in net.parameters())
    for held, blocks in ((3, 3), (1, 7), (0.5, 7)):
        sizes.clear()
        monkeypatch.setattr(grand, "_BLOCK_BYTES", int(held * gradient))
        torch.testing.assert_close(gradient_norms(net, images, labels), whole, rtol=1e-12, atol=0)
        assert len(sizes) == blocks, "so many gradients are held at a time"


def test_grand_leaves_the_weights_of_the_network_as_they_are() -> None:
    net, images, labels = convnet("instance", 2)
    before = [parameter.clone() for parameter in net.parameters()]
    gradient_norms(net, images, labels)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters(), strict=True))


def test_el2n_is_the_distance_of_the_probabilities_from_the_label() -> None:
    logits, labels = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 0, 1])
    found = error_norms(logits, labels).tolist()
    for row, label, norm in zip(logits.tolist(), labels.tolist(), found, strict=True):
        total = sum(map(math.exp, row))
        errors = [math.exp(value) / total - (k == label) for k, value in enumerate(row)]
        assert norm == pytest.approx(math.sqrt(sum(error**2 for error in errors)), rel=1e-5)


@pytest.mark.parametrize("method", BY_SCORES)
def test_a_score_is_the_mean_over_the_networks(tiny_real: RealSet, method: str) -> None:
    made = selection(method, shuffled(tiny_real), networks=3)
    assert isinstance(made, Difficulty)
    images, labels = made.problem.prepared(torch.arange(60)), made.problem.real.train.labels
    each = []
    for trained in made.problem.trained:
        net = made.problem.network(trained.weights)
        with torch.no_grad():
            errors = net(images).softmax(1) - nn.functional.one_hot(labels, 3)
        each.append(one_by_one(net, images, labels) if method == "grand" else errors.norm(dim=1).double())
    torch.testing.assert_close(made.scores(), (each[0] + each[1] + each[2]) / 3, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", BY_SCORES)
@pytest.mark.parametrize("choose", ["hardest", "easiest"])
def test_the_images_taken_are_the_hardest_or_the_easiest_of_their_class(tiny_real: RealSet, method: str, choose: str) -> None:
    made = selection(method, shuffled(tiny_real), ipc=4, networks=2, choose=choose)
    assert isinstance(made, Difficulty)
    scores, labels = made.scores().tolist(), made.problem.real.train.labels.tolist()
    expected: list[int] = []
    for c in range(3):
        rows = [i for i in range(60) if labels[i] == c]
        expected += sorted(rows, key=lambda i: scores[i], reverse=choose == "hardest")[:4]
    assert made.choose(torch.Generator()).tolist() == expected


@pytest.mark.parametrize("method", [*BY_FEATURES, *BY_SCORES])
def test_a_network_whose_training_diverged_selects_nothing(tiny_real: RealSet, method: str) -> None:
    made = selection(method, tiny_real)
    (trained,) = made.problem.trained
    broken = TrainedNetwork(torch.full_like(trained.weights, torch.nan), trained.forgotten)
    made.start(replace(made.problem, trained=(broken,)))
    with pytest.raises(DstillError, match=r"not finite: lower distill\.training\.lr"):
        made.choose(torch.Generator())


# The networks


def test_the_first_of_several_networks_is_the_one_that_other_methods_share(tiny_real: RealSet) -> None:
    first = task(tiny_real)
    alone = {
        "data": tiny_real.fingerprint,
        "preprocess": "standardise",
        "net": {"name": "convnet", "width": 4, "depth": 1},
        "training": {"epochs": 2, "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 7},
        "seed": 3,
    }
    assert first.identity() == alone and first.fingerprint() == digest(alone)
    assert first.generator().initial_seed() == seeding.generator(3, "trained-network").initial_seed()


def test_several_networks_differ_in_their_draws_alone(tiny_real: RealSet) -> None:
    tasks = [task(tiny_real, number) for number in range(3)]
    assert len({one.fingerprint() for one in tasks}) == 3
    assert [one.identity() for one in tasks[1:]] == [{**tasks[0].identity(), "number": number} for number in (1, 2)]
    weights = [train_network(one, CPU).weights for one in tasks]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))


def test_a_network_without_training_is_as_it_was_initialised(tiny_real: RealSet) -> None:
    untrained = train_network(task(tiny_real, epochs=0), CPU)
    net = nets.build(NET, 3, 3, (8, 8), task(tiny_real).generator())
    assert torch.equal(untrained.weights, nn.utils.parameters_to_vector(net.parameters()))
    assert untrained.forgotten.eq(0).all()


def test_the_networks_are_trained_once_and_their_first_is_herdings(tiny_real: RealSet, tmp_path: Path) -> None:
    def trained(method: str, *changes: str) -> tuple[TrainedNetwork, ...]:
        choice = Choice(method=method, recipe="smoke", changes=["net.width=4", *changes])
        return Job.resolve(tiny_real, choice, 0, Workplace.of(Machine(device="cpu", cache=tmp_path), False)).trained_networks()

    (shared,) = trained("herding")
    (path,) = (tmp_path / "networks").iterdir()
    three = trained("el2n", "distill.networks=3")
    assert torch.equal(three[0].weights, shared.weights) and len({network.weights.sum().item() for network in three}) == 3
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()}
    assert path in written and len(written) == 3
    assert len(trained("grand", "distill.networks=2")) == 2 and trained("random") == ()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "networks").iterdir()} == written


def test_a_smoke_run_trains_two_networks_for_two_passes() -> None:
    small = DifficultyConfig().smoke()
    assert (small.networks, small.training.epochs) == (2, 2)
    least = DifficultyConfig(networks=1, training=EarlyTrainingConfig(epochs=0))
    assert least.smoke() == least
