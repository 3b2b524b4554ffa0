"""An accuracy is one measurement of a fresh network at the end of the protocol's training."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts.result import Result
from dstill.config.settings import NetConfig
from dstill.data import preprocess
from dstill.data.real import RealSet
from dstill.errors import CollapseError
from dstill.evaluation.baselines import RANDOM_DRAWS, RANDOM_RATES, random_set
from dstill.evaluation.networks import evaluate_set, prepared, score_network, train_network
from dstill.evaluation.protocols import load_protocol, protocol_names
from dstill.nets import networks as nets
from dstill.support import seeding
from dstill.training.fit import Batch, squared_objective, warm_cosine

NET = NetConfig(width=4, depth=2)


@pytest.fixture
def short(tmp_path: Path) -> str:
    path = tmp_path / "short.yaml"
    path.write_text(
        "{name: short, version: 3, passes: 6, batch_size: 2, momentum: 0.9, weight_decay: 5e-4, lr: 0.05, "
        "lr_factor: 0.5, networks: 2}"
    )
    return str(path)


@pytest.fixture
def syn(tiny_real: RealSet) -> DistilledSet:
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    rows = torch.tensor([0, 1, 2])
    images = fitted.forward(tiny_real.train.images[rows].float() / 255)
    labels = tiny_real.train.labels[rows]
    names, mark = tiny_real.class_names, tiny_real.fingerprint
    return DistilledSet(images, labels, 0.03, fitted, "mtt", 1, names, "none", NET, "tiny", mark, None, 0)


def test_the_shipped_protocols_hold_the_published_numbers() -> None:
    assert protocol_names() == ["ast", "datm", "frepo", "mtt", "quick", "rat", "whole"]
    ast, mtt = load_protocol("ast"), load_protocol("mtt")
    for protocol in (ast, mtt):
        assert (protocol.passes, protocol.batch_size, protocol.networks) == (1000, 256, 5)
        assert (protocol.momentum, protocol.weight_decay, protocol.lr) == (0.9, 5e-4, 0.01)
    assert (ast.lr_factor, mtt.lr_factor) == (0.5, 0.1)
    assert load_protocol("whole").passes == 50


def test_the_protocols_of_rat_bptt_and_datm() -> None:
    rat, datm, mtt = load_protocol("rat"), load_protocol("datm"), load_protocol("mtt")
    assert (rat.optimiser, rat.lr, rat.passes, rat.weight_decay, rat.lr_factor) == ("adam", 1e-3, 1000, 0.0, 1.0)
    assert rat.batch_size >= 5000, "a pass is a step"
    assert datm.batch_size == 128 and datm == mtt.model_copy(update={"name": "datm", "batch_size": 128})


def test_frepos_protocol_is_regression_by_adam() -> None:
    frepo = load_protocol("frepo")
    assert (frepo.loss, frepo.optimiser, frepo.lr, frepo.schedule, frepo.warmup) == ("squared", "adam", 3e-4, "cosine", 500)


def test_the_rate_grows_and_falls_along_a_cosine() -> None:
    sgd = torch.optim.SGD([torch.zeros(1)], lr=9.0)
    rates = []
    for epoch in range(8):
        warm_cosine(0.4, 4, 8)(sgd, epoch)
        rates.append(round(sgd.param_groups[0]["lr"], 6))
    assert rates[:5] == [0.1, 0.2, 0.3, 0.4, 0.4]
    assert rates[6] == 0.2
    assert rates[7] == pytest.approx(0.2 * (1 + math.cos(0.75 * math.pi)), abs=1e-6)


def test_squared_loss_aims_at_frepos_centred_and_scaled_labels() -> None:
    net = torch.nn.Linear(2, 3)
    images, ids = torch.randn(4, 2), torch.tensor([0, 2, 1, 1])
    target = (torch.eye(3)[ids] - 1 / 3) / 0.3**0.5
    expected = (net(images) - target).square().mean()
    (gradient,) = torch.autograd.grad(expected, net.weight)
    for labels in (ids, 100 * torch.eye(3)[ids]):
        net.zero_grad()
        loss = squared_objective(net, Batch(images, images, labels, torch.arange(4), 0))
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(net.weight.grad, gradient)


def test_an_unknown_protocol_is_answered_with_a_suggestion() -> None:
    with pytest.raises(DstillError, match="did you mean mtt"):
        load_protocol("mt")


def test_training_equals_a_hand_written_loop(tiny_real: RealSet, short: str) -> None:
    protocol = load_protocol(short)
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    images, labels = prepared(tiny_real.train, fitted, torch.device("cpu"))
    test = prepared(tiny_real.test, fitted, torch.device("cpu"))
    network = train_network(
        NET, images[:5], labels[:5], classes=3, protocol=protocol, lr=0.05, augmentation="none",
        generator=seeding.generator(0, "x"),
    )  # fmt: skip
    measured = score_network(network, test, 3)

    generator = seeding.generator(0, "x")
    net = nets.build(NET, 3, 3, (8, 8), generator)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(6):
        if epoch == 3:
            optimiser.param_groups[0]["lr"] = 0.025
        for rows in torch.randperm(5, generator=generator).split(2):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(images[rows]), labels[rows]).backward()
            optimiser.step()
    predicted = net(test[0]).argmax(1)
    assert measured.accuracy == float((predicted == test[1]).double().mean())
    pairs = list(zip(test[1].tolist(), predicted.tolist(), strict=True))
    assert measured.confusion == [[pairs.count((i, j)) for j in range(3)] for i in range(3)]


def test_the_learned_rate_is_used_and_the_protocols_rate_without_one(syn: DistilledSet, tiny_real: RealSet, short: str) -> None:
    test = prepared(tiny_real.test, syn.preprocess, torch.device("cpu"))
    protocol = load_protocol(short)
    assert evaluate_set(syn, test, protocol) == evaluate_set(syn, test, protocol, lr=0.03)
    bare = replace(syn, alpha=None)
    assert evaluate_set(bare, test, protocol) == evaluate_set(bare, test, protocol, lr=0.05)


def test_a_learned_rate_that_nothing_can_be_trained_with_is_a_collapse(
    syn: DistilledSet, tiny_real: RealSet, short: str
) -> None:
    for alpha in (-0.01, 0.0):
        with pytest.raises(CollapseError, match="no network can be trained with the learned α"):
            dstill.evaluate(replace(syn, alpha=alpha), tiny_real, protocol=short)


def test_random_images_choose_their_rate_and_average_over_draws(syn: DistilledSet, tiny_real: RealSet, short: str) -> None:
    result = dstill.evaluate(syn, tiny_real, protocol=short, networks=2)
    assert result.random is not None
    assert result.random.n == RANDOM_DRAWS * 2
    assert result.random.lr in RANDOM_RATES
    assert (result.protocol.name, result.protocol.version) == ("short", 3)


def test_draws_of_random_images_differ_and_are_real(syn: DistilledSet, tiny_real: RealSet) -> None:
    a, b = (random_set(syn, tiny_real.train, seeding.generator(0, i)) for i in range(2))
    assert not torch.equal(a.images, b.images)
    pixels = (a.preprocess.invert(a.images) * 255).round().to(torch.uint8)
    assert all(bool((tiny_real.train.images == one).flatten(1).all(1).any()) for one in pixels)


def test_choices_on_a_holdout_never_see_a_test_image(syn: DistilledSet, tiny_real: RealSet, short: str) -> None:
    held = tiny_real.holdout(0)
    poisoned = replace(tiny_real, test=replace(tiny_real.test, labels=(tiny_real.test.labels + 1) % 3), fingerprint="")
    one, other = (dstill.evaluate(syn, r, protocol=short) for r in (held, poisoned.holdout(0)))
    assert one.measured_on == "validation"
    assert one.random is None
    assert one.accuracy == other.accuracy


def test_several_networks_and_several_sets_are_pooled(syn: DistilledSet, tiny_real: RealSet, short: str) -> None:
    other = replace(syn, seed=1)
    result = dstill.evaluate([syn, other], tiny_real, protocol=short, nets=["convnet", "alexnet"], random=False)
    assert list(result.nets) == ["convnet", "alexnet"]
    assert result.accuracy == result.nets["convnet"]
    assert (result.sets, result.accuracy.n) == (2, 4)


def test_further_protocols_stand_beside_the_result(syn: DistilledSet, tiny_real: RealSet, short: str, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(Path(short).read_text().replace("short", "other").replace("lr: 0.05", "lr: 0.5").replace("6", "9"))
    options = {"networks": 3, "random": False, "seed": 4}
    sets = [replace(syn, alpha=None), replace(syn, alpha=None, images=syn.images.flip(3), seed=1)]
    result = dstill.evaluate(sets, tiny_real, protocol=short, also=[str(other)], **options)
    alone = dstill.evaluate(sets, tiny_real, protocol=str(other), **options)
    assert result.also == {"other v3": alone.accuracy.model_copy(update={"lr": None})}
    assert result.also["other v3"].values != result.accuracy.values
    assert [name for name, _ in result.rows()] == ["mtt", "mtt (protocol other v3)"]
    twice = dstill.evaluate(sets[0], tiny_real, protocol=short, also=[short], **options)
    assert twice.also == {}, "nothing is measured twice"
    one, two = (dstill.evaluate(s, tiny_real, protocol=short, also=[str(other)], **options) for s in sets)
    pooled = Result.pooled([one, two])
    assert pooled.also["other v3"].values == (*one.also["other v3"].values, *two.also["other v3"].values)


def test_random_images_are_measured_anew_for_a_preprocessing_with_other_numbers(
    syn: DistilledSet, tiny_real: RealSet, short: str, tmp_path: Path
) -> None:
    foreign = replace(syn, preprocess=preprocess.Standardise(torch.zeros(3), torch.full((3,), 0.1)))
    for one in (syn, foreign, syn):
        dstill.evaluate(one, tiny_real, protocol=short, networks=1, machine=dstill.Machine(cache=tmp_path))
    assert len(list((tmp_path / "random").iterdir())) == 2


def test_the_whole_set_is_measured_once_and_cached(syn: DistilledSet, tiny_real: RealSet, short: str, tmp_path: Path) -> None:
    options = {"protocol": short, "random": False, "whole": True, "machine": dstill.Machine(cache=tmp_path)}
    first = dstill.evaluate(syn, tiny_real, **options)  # type: ignore[arg-type]
    cached = next((tmp_path / "whole").iterdir())
    cached.write_text(first.whole.model_copy(update={"mean": 0.125}).model_dump_json())  # type: ignore[union-attr]
    again = dstill.evaluate(syn, tiny_real, **options)  # type: ignore[arg-type]
    assert again.whole is not None
    assert again.whole.mean == 0.125


def test_a_set_of_other_classes_or_another_size_is_refused(syn: DistilledSet, tiny_real: RealSet, short: str) -> None:
    with pytest.raises(DstillError, match="has the classes"):
        dstill.evaluate(replace(syn, class_names=("a", "b", "c")), tiny_real, protocol=short)
    with pytest.raises(DstillError, match="pass --image-size"):
        dstill.evaluate(replace(syn, images=syn.images[:, :, :4]), tiny_real, protocol=short)


def test_a_class_of_one_image_leaves_random_images_the_protocols_rate(
    syn: DistilledSet, tiny_real: RealSet, short: str
) -> None:
    rows = torch.cat([torch.tensor([0]), (tiny_real.train.labels != tiny_real.train.labels[0]).nonzero().squeeze(1)])
    scarce = replace(tiny_real, train=tiny_real.train.take(rows), fingerprint="")
    result = dstill.evaluate(syn, scarce, protocol=short, networks=1)
    assert result.random is not None
    assert result.random.lr == 0.05


def test_sets_that_differ_are_not_evaluated_together(syn: DistilledSet, tiny_real: RealSet) -> None:
    with pytest.raises(DstillError, match="only if method, IPC, parts and preprocessing agree"):
        dstill.evaluate([syn, replace(syn, method="dm")], tiny_real)
    # The same kind with other numbers: the test images would be preprocessed with those of the first set.
    other = preprocess.fit("standardise", tiny_real.train.images[:4])
    with pytest.raises(DstillError, match="only if method, IPC, parts and preprocessing agree"):
        dstill.evaluate([syn, replace(syn, preprocess=other)], tiny_real)
    with pytest.raises(DstillError, match="at least one"):
        dstill.evaluate([], tiny_real)


def test_adam_takes_the_protocols_rate_and_says_so(syn: DistilledSet, tiny_real: RealSet, tmp_path: Path) -> None:
    path = tmp_path / "adam.yaml"
    path.write_text(
        "{name: adam, version: 1, passes: 3, batch_size: 8, momentum: 0.0, weight_decay: 0.0, lr: 0.002, networks: 1, "
        "optimiser: adam, loss: squared, schedule: cosine, warmup: 1}"
    )
    result = dstill.evaluate(syn, tiny_real, protocol=str(path), machine=dstill.Machine(cache=tmp_path))
    assert result.random is not None
    assert (result.accuracy.lr, result.random.lr) == (0.002, 0.002)


def test_networks_that_differ_in_an_option_share_no_baseline(
    syn: DistilledSet, tiny_real: RealSet, short: str, tmp_path: Path
) -> None:
    for net in (NetConfig(width=2), NetConfig(depth=2)):
        dstill.evaluate(replace(syn, net=net), tiny_real, protocol=short, networks=1, machine=dstill.Machine(cache=tmp_path))
    assert len(list((tmp_path / "random").iterdir())) == 2


def test_a_set_whose_protocol_stayed_behind_is_measured_by_another(syn: DistilledSet, tiny_real: RealSet, short: str) -> None:
    recipe = dstill.load_recipe("digits/dm-ipc1").model_copy(update={"protocol": "elsewhere.yaml"})
    alone = replace(syn, recipe=recipe)
    with pytest.raises(DstillError, match=r"own protocol .*the protocol file elsewhere.yaml does not exist.*--protocol ast"):
        dstill.evaluate(alone, tiny_real)
    with pytest.raises(DstillError, match=r"^unknown protocol 'shrot'"):
        dstill.evaluate(alone, tiny_real, protocol="shrot")
    assert dstill.evaluate(alone, tiny_real, protocol=short, random=False).protocol.name == "short"


def test_protocols_that_share_a_name_are_not_mixed_up(
    syn: DistilledSet, tiny_real: RealSet, short: str, tmp_path: Path
) -> None:
    text = Path(short).read_text()
    files = [tmp_path / "same.yaml", tmp_path / "other.yaml"]
    for file, passes in zip(files, ("", "1"), strict=True):
        file.write_text(re.sub(r"passes: (\d+)", rf"passes: \g<1>{passes}", text))
    also = dstill.Evaluation(networks=1, random=False, also=(str(files[1]),))
    ask = functools.partial(dstill.evaluate, syn, tiny_real, protocol=short, random=False, networks=1)
    assert ask(also=[str(files[0])]).also == {}, "the same protocol twice"
    with pytest.raises(DstillError, match=r"two different protocols are called short.*change the name or version"):
        ask(also=[str(files[1])])
    with pytest.raises(DstillError, match="two different protocols"):
        dstill.run(
            tiny_real, method="random", recipe="smoke", changes=[f"protocol={short}"], evaluation=also, out=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists(), "before anything is made"
