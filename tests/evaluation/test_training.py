"""Networks of an evaluation and of its baselines are trained as the set beside them says: net, augmentation, rate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dstill import DistilledSet
from dstill.artifacts.result import Score
from dstill.config.settings import NetConfig, Protocol
from dstill.data import preprocess, siamese
from dstill.data.real import RealSet
from dstill.evaluation.baselines import RANDOM_RATES, random_baseline, random_set, whole_set
from dstill.evaluation.networks import Trial, evaluate_set, measure, prepared, score_network, train_network, trials_of
from dstill.evaluation.protocols import load_protocol
from dstill.nets import networks as nets
from dstill.support import seeding

CPU = torch.device("cpu")
DSA = "colour_crop_cutout_flip_scale_rotate"
NET, OTHER = NetConfig(width=8, depth=2, norm="none"), NetConfig(width=4, depth=1)
PROTOCOL = Protocol(
    name="short", version=1, passes=8, batch_size=2, momentum=0.9, weight_decay=5e-4, lr=0.02, lr_factor=0.5, networks=2
)


@pytest.fixture
def syn(tiny_real: RealSet) -> DistilledSet:
    """One image of each class, with an augmentation and a network of its own."""
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    images, labels = fitted.forward(tiny_real.train.images[:3].float() / 255), tiny_real.train.labels[:3]
    names, mark = tiny_real.class_names, tiny_real.fingerprint
    return DistilledSet(images, labels, 0.03, fitted, "mtt", 1, names, DSA, NET, "tiny", mark, None, 0)


@pytest.fixture
def noise() -> Tensor:
    """Images that networks of different training classify differently."""
    return torch.randn(1000, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(
    net: NetConfig, images: Tensor, labels: Tensor, protocol: Protocol, lr: float, generator: torch.Generator
) -> torch.nn.Module:
    """A network after SGD on augmented batches: PyTorch's own, and a loop."""
    network = nets.build(net, 3, 3, (8, 8), generator)
    optimiser = torch.optim.SGD(network.parameters(), lr, protocol.momentum, weight_decay=protocol.weight_decay)
    for epoch in range(protocol.passes):
        if epoch == protocol.passes // 2:
            optimiser.param_groups[0]["lr"] *= protocol.lr_factor
        for rows in torch.randperm(len(images), generator=generator).split(protocol.batch_size):
            augmented = siamese.apply(images[rows], siamese.sample(DSA, len(rows), generator))
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(augmented), labels[rows]).backward()
            optimiser.step()
    return network


@torch.no_grad()
def answers(network: torch.nn.Module, images: Tensor) -> Tensor:
    return network(images).argmax(1)


def test_networks_are_trained_on_augmented_images_with_the_learned_rate(syn: DistilledSet, noise: Tensor) -> None:
    generator = seeding.generator(7, "evaluate", "convnet", "here", 0)
    expected = answers(trained(NET, syn.images, syn.labels, PROTOCOL, 0.03, generator), noise)
    (agreement,) = evaluate_set(syn, (noise, expected), PROTOCOL, networks=1, seed=7, stream=("here",))
    assert agreement >= 0.998
    for other in (replace(syn, augmentation="none"), replace(syn, alpha=0.01), replace(syn, net=OTHER)):
        (agreement,) = evaluate_set(other, (noise, expected), PROTOCOL, networks=1, seed=7, stream=("here",))
        assert agreement < 0.998


def test_training_by_adam_is_on_squared_errors_along_a_warm_cosine(syn: DistilledSet, noise: Tensor) -> None:
    changes = {"optimiser": "adam", "loss": "squared", "schedule": "cosine", "warmup": 3, "lr": 0.01, "batch_size": 4}
    protocol = PROTOCOL.model_copy(update=changes)
    generator = seeding.generator(7, "evaluate", "convnet", 0)
    network = nets.build(NET, 3, 3, (8, 8), generator)
    optimiser = torch.optim.Adam(network.parameters(), weight_decay=protocol.weight_decay)
    targets = (torch.eye(3)[syn.labels] - 1 / 3) / math.sqrt(0.3)
    for epoch in range(8):
        share = (epoch + 1) / 3 if epoch < 3 else 0.5 * (1 + math.cos(math.pi * (epoch - 3) / 5))
        optimiser.param_groups[0]["lr"] = 0.01 * share
        rows = torch.randperm(3, generator=generator)
        augmented = siamese.apply(syn.images[rows], siamese.sample(DSA, 3, generator))
        optimiser.zero_grad()
        (network(augmented) - targets[rows]).square().mean().backward()
        optimiser.step()
    (agreement,) = evaluate_set(syn, (noise, answers(network, noise)), protocol, networks=1, seed=7)
    assert agreement >= 0.998


def test_the_network_that_is_asked_for_is_trained_on_the_set(syn: DistilledSet, noise: Tensor) -> None:
    generator = seeding.generator(7, "evaluate", "convnet", 0)
    expected = answers(trained(OTHER, syn.images, syn.labels, PROTOCOL, 0.03, generator), noise)
    (measured,) = measure(trials_of(syn, 1, net=OTHER, seed=7), (noise, expected), PROTOCOL)
    assert measured.accuracy >= 0.998


def test_the_way_through_each_training_is_told_and_then_its_accuracy(
    syn: DistilledSet, noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstill.training.fit._TICK_SECONDS", 0.0)
    told: list[tuple[int | str, float, float | None]] = []
    labels = torch.arange(len(noise)) % 3

    def tell(trial: Trial, share: float, accuracy: float | None) -> None:
        told.append((trial.stream[-1], share, accuracy))

    found = measure(trials_of(syn, 2), (noise, labels), PROTOCOL, progress=tell)
    batches = [(k + part) / PROTOCOL.passes for k in range(PROTOCOL.passes) for part in (2 / 3, 1)]  # of two images and of one
    for k, measured in enumerate(found):
        mine = [one[1:] for one in told if one[0] == k]
        assert mine[-1] == (1.0, measured.accuracy)
        assert [share for share, _ in mine[:-1]] == pytest.approx(batches)
        assert all(accuracy is None for _, accuracy in mine[:-1])


def test_every_network_of_a_set_has_weights_of_its_own(syn: DistilledSet, noise: Tensor) -> None:
    labels = torch.arange(len(noise)) % 3
    assert len(set(evaluate_set(syn, (noise, labels), PROTOCOL, networks=3))) == 3


def test_rows_of_the_confusion_are_true_classes_and_columns_predicted_ones(tiny_real: RealSet, syn: DistilledSet) -> None:
    images, labels = prepared(tiny_real.train, syn.preprocess, CPU)
    test, classes = prepared(tiny_real.test, syn.preprocess, CPU)
    network = train_network(
        NetConfig(width=8, depth=2), images, labels, classes=3,
        protocol=PROTOCOL.model_copy(update={"batch_size": 20}), lr=0.05, augmentation="none",
        generator=seeding.generator(0, "confusion"),
    )  # fmt: skip
    measured = score_network(network, (test, torch.where(classes == 0, 2, classes)), 3)
    # What is seen is learned without a mistake; the first class is called the third.
    assert measured.confusion == [[0, 0, 0], [0, 10, 0], [10, 0, 10]]
    assert measured.accuracy == pytest.approx(2 / 3)


def test_random_images_take_the_rate_that_learns_most_on_the_held_out_part(syn: DistilledSet, tiny_real: RealSet) -> None:
    test = prepared(tiny_real.test, syn.preprocess, CPU)
    held = tiny_real.holdout(5)
    draw = random_set(syn, held.train, seeding.generator(5, "random-rate"))
    protocol = PROTOCOL.model_copy(update={"passes": 12})
    validation, reached = prepared(held.test, syn.preprocess, CPU), dict[float, float]()
    for lr in RANDOM_RATES:
        (reached[lr],) = evaluate_set(draw, validation, protocol, networks=1, lr=lr, seed=5, stream=("random-rate",))
    assert len(set(reached.values())) > 1
    score = random_baseline(syn, tiny_real, test, protocol, networks=1, seed=5)
    assert score.lr is not None
    assert reached[score.lr] == max(reached.values())


def test_the_images_that_a_rate_is_chosen_with_are_none_of_those_it_is_judged_by(syn: DistilledSet, tiny_real: RealSet) -> None:
    """Held-out images are plain areas in the colour of another class: whoever has not seen them is misled by high rates."""
    held_out = (tiny_real.train.images[:, None] == tiny_real.holdout(5).test.images).flatten(2).all(2).any(1)
    colours = torch.tensor([[60, 200, 60], [60, 60, 200], [200, 60, 60]], dtype=torch.uint8)
    plain = colours[tiny_real.train.labels][:, :, None, None].expand_as(tiny_real.train.images)
    images = torch.where(held_out[:, None, None, None], plain, tiny_real.train.images)
    real = replace(tiny_real, train=replace(tiny_real.train, images=images), fingerprint="")
    protocol = PROTOCOL.model_copy(update={"passes": 60, "batch_size": 20})
    everything, test = replace(syn, ipc=20, augmentation="none"), prepared(real.test, syn.preprocess, CPU)
    assert random_baseline(everything, real, test, protocol, networks=1, seed=5).lr == min(RANDOM_RATES)


def test_random_images_are_trained_with_the_network_that_is_asked_for(
    syn: DistilledSet, tiny_real: RealSet, noise: Tensor
) -> None:
    test = noise, torch.arange(len(noise)) % 3

    def scores(own: NetConfig, asked: NetConfig | None) -> tuple[float, ...]:
        like = replace(syn, net=own)
        return random_baseline(like, tiny_real, test, PROTOCOL, net=asked, networks=1, seed=0).values

    assert scores(NET, OTHER) == scores(OTHER, None)
    assert scores(NET, OTHER) != scores(NET, None) == scores(OTHER, NET)


@pytest.mark.parametrize(("k", "j"), [(0, 0), (1, 1), (2, 0)])
def test_random_images_are_three_draws_for_several_networks_under_the_augmentation_of_the_set(
    syn: DistilledSet, tiny_real: RealSet, noise: Tensor, k: int, j: int
) -> None:
    def measured(right: Tensor) -> Score:
        return random_baseline(syn, tiny_real, (noise, right), PROTOCOL, networks=2, seed=0)

    lr = measured(torch.zeros(len(noise), dtype=torch.int64)).lr
    assert lr is not None
    draw = random_set(syn, tiny_real.train, seeding.generator(0, "random-draw", k))
    generator = seeding.generator(0, "evaluate", "convnet", "random", k, j)
    score = measured(answers(trained(NET, draw.images, draw.labels, PROTOCOL, lr, generator), noise))
    assert score.n == 3 * 2
    assert score.values[2 * k + j] >= 0.998


def test_the_whole_set_is_trained_with_the_augmentation_of_the_set(
    syn: DistilledSet, tiny_real: RealSet, noise: Tensor
) -> None:
    images, labels = prepared(tiny_real.train, syn.preprocess, CPU)
    protocol = load_protocol("whole")
    network = trained(OTHER, images, labels, protocol, protocol.lr, seeding.generator(2, "whole", 0))
    score = whole_set(OTHER, syn, tiny_real, (noise, answers(network, noise)), seed=2)
    assert score.mean >= 0.998
    plain = whole_set(OTHER, replace(syn, augmentation="none"), tiny_real, (noise, answers(network, noise)), seed=2)
    assert plain.mean < 0.998
