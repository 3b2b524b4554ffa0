"""The baselines of a result are measured as fairly as the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts.result import Score
from dstill.config.settings import NetConfig, Protocol
from dstill.data import preprocess
from dstill.data.real import RealSet
from dstill.evaluation.baselines import RANDOM_DRAWS, RANDOM_RATES, random_baseline, random_set
from dstill.evaluation.networks import evaluate_set, prepared, score_network, train_network
from dstill.evaluation.protocols import load_protocol
from dstill.nets import networks as nets
from dstill.support import seeding

NET = NetConfig(width=4, depth=2)
UNNORMED = NetConfig(width=8, depth=2, norm="none")
CPU = torch.device("cpu")
PROTOCOL = Protocol(
    name="short", version=1, passes=5, batch_size=4, momentum=0.9, weight_decay=0.01, lr=0.05, lr_factor=0.1, networks=2
)


@pytest.fixture
def syn(tiny_real: RealSet) -> DistilledSet:
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    images = fitted.forward(tiny_real.train.images[:3].float() / 255)
    names, mark = tiny_real.class_names, tiny_real.fingerprint
    return DistilledSet(images, tiny_real.train.labels[:3], 0.03, fitted, "mtt", 1, names, "none", NET, "tiny", mark, None, 0)


def relabelled(real: RealSet) -> RealSet:
    """The same training images with wrong test labels."""
    return replace(real, test=replace(real.test, labels=(real.test.labels + 1) % real.classes), fingerprint="")


def by_hand(images: Tensor, labels: Tensor, test: Tensor, protocol: Protocol) -> Tensor:
    """Classes that a network predicts after SGD with momentum and decay in plain PyTorch; the rate changes at half time."""
    generator = seeding.generator(0, "by hand")
    net = nets.build(UNNORMED, 3, 3, (8, 8), generator)
    parameters = list(net.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(protocol.passes):
        rate = protocol.lr if epoch < protocol.passes // 2 else protocol.lr * protocol.lr_factor
        for rows in torch.randperm(len(images), generator=generator).split(protocol.batch_size):
            gradients = torch.autograd.grad(torch.nn.functional.cross_entropy(net(images[rows]), labels[rows]), parameters)
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradients, strict=True):
                    v.mul_(protocol.momentum).add_(g + protocol.weight_decay * p)
                    p -= rate * v
    return net(test).argmax(1)


@pytest.mark.parametrize("factor", [0.5, 0.1])
def test_training_is_sgd_with_momentum_decay_and_one_step_of_the_rate(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(10, 3, 8, 8, generator=generator), torch.arange(10) % 3
    # Noise, so that any other training would classify many images differently.
    test = torch.randn(2000, 3, 8, 8, generator=generator)
    protocol = PROTOCOL.model_copy(update={"lr_factor": factor, "passes": 9, "lr": 0.3})
    expected = by_hand(images, labels, test, protocol)
    network = train_network(
        UNNORMED, images, labels, classes=3, protocol=protocol, lr=protocol.lr, augmentation="none",
        generator=seeding.generator(0, "by hand"),
    )  # fmt: skip
    assert score_network(network, (test, expected), 3).accuracy >= 0.9995
    for change in (
        {"lr_factor": 1.0},
        {"momentum": 0.0},
        {"weight_decay": 0.0},
        {"passes": 8},
        {"batch_size": 5},
        {"lr": 0.25},
    ):
        other = by_hand(images, labels, test, protocol.model_copy(update=change))
        assert float((other == expected).double().mean()) < 0.999, change


def test_a_rate_that_is_asked_for_goes_before_the_learned_one(syn: DistilledSet) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(500, 3, 8, 8, generator=generator), torch.randint(3, (500,), generator=generator)
    learned, asked, other = (
        evaluate_set(one, noise, PROTOCOL, lr=lr) for one, lr in ((replace(syn, alpha=0.2), None), (syn, 0.2), (syn, None))
    )
    assert asked == learned != other


def test_random_images_choose_their_rate_without_the_test_set(syn: DistilledSet, tiny_real: RealSet) -> None:
    def measure(real: RealSet) -> Score:
        return random_baseline(syn, real, prepared(real.test, syn.preprocess, CPU), PROTOCOL, net=NET, networks=2, seed=0)

    right, wrong = measure(tiny_real), measure(relabelled(tiny_real))
    assert right.lr == wrong.lr
    assert right.lr in RANDOM_RATES
    assert right.values != wrong.values
    assert right.n == wrong.n == RANDOM_DRAWS * 2


def test_random_images_have_the_ipc_and_the_dress_of_the_set_beside_them(syn: DistilledSet, tiny_real: RealSet) -> None:
    larger = replace(syn, ipc=4)
    draw = random_set(larger, tiny_real.train, seeding.generator(0, "draw"))
    assert torch.bincount(draw.labels).tolist() == [4, 4, 4]
    assert len(draw.images.flatten(1).unique(dim=0)) == 12
    assert (draw.method, draw.alpha, draw.augmentation, draw.net) == ("random", None, syn.augmentation, syn.net)
    assert draw.preprocess is syn.preprocess


def test_a_result_is_the_same_again_and_another_with_another_seed(
    syn: DistilledSet, tiny_real: RealSet, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROTOCOL.model_dump_json())
    first, again, other = (dstill.evaluate(syn, tiny_real, protocol=str(path), seed=seed) for seed in (0, 0, 5))
    assert (first.accuracy, first.random) == (again.accuracy, again.random)
    assert first.random != other.random


def test_a_holdout_of_the_training_images_does_not_depend_on_the_test_images(tiny_real: RealSet) -> None:
    one, other = tiny_real.holdout(3), relabelled(tiny_real).holdout(3)
    assert one.fingerprint == other.fingerprint
    assert one.judged_on == "validation"
    assert len(one.train) + len(one.test) == len(tiny_real.train)


@pytest.mark.parametrize("networks", [0, -1])
def test_fewer_than_one_network_is_refused(syn: DistilledSet, tiny_real: RealSet, networks: int) -> None:
    with pytest.raises(DstillError, match=f"networks must be at least 1, got {networks}"):
        dstill.evaluate(syn, tiny_real, networks=networks)


def test_an_unknown_network_is_refused_before_the_known_ones_are_trained(syn: DistilledSet, tiny_real: RealSet) -> None:
    class Watching:
        def note(self, text: str) -> None:
            raise AssertionError(text)

        def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
            raise AssertionError(stage)

    with pytest.raises(DstillError, match="unknown network 'vgg12'; did you mean vgg11"):
        dstill.evaluate(syn, tiny_real, nets=["convnet", "vgg12"], progress=Watching())


def test_the_rate_that_was_trained_with_is_in_the_score(syn: DistilledSet, tiny_real: RealSet, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROTOCOL.model_dump_json())

    def rate(*sets: DistilledSet) -> float | None:
        return dstill.evaluate(list(sets), tiny_real, protocol=str(path), random=False, networks=1).accuracy.lr

    without = replace(syn, alpha=None)
    assert rate(syn) == 0.03
    assert rate(without) == rate(without, without) == 0.05
    assert rate(syn, without) is None


def test_the_remaining_protocols_say_how_long_they_train() -> None:
    quick, whole = load_protocol("quick"), load_protocol("whole")
    assert (quick.passes, quick.networks) == (300, 2)
    assert (whole.passes, whole.networks, whole.lr_factor) == (50, 1, 0.1)


def test_a_protocol_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(PROTOCOL.model_dump_json().replace('"passes"', '"epochs"'))
    with pytest.raises(DstillError, match="passes: Field required"):
        load_protocol(str(path))
