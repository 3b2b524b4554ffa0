"""The scores of DD-Ranking against numbers computed by hand, and the accuracies behind them against those of a judgement."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.listening import Listener

import dstill
from dstill import DistilledSet, DstillError, Leaderboard
from dstill.api.judge import Judged, Judgement
from dstill.api.leaderboard import Rated, robust_score
from dstill.artifacts.result import ProtocolId, Result, Score
from dstill.config.settings import NetConfig, TrainingConfig
from dstill.data import preprocess
from dstill.data.preprocess import Standardise
from dstill.data.real import RealSet
from dstill.evaluation.baselines import RANDOM_DRAWS, random_set
from dstill.evaluation.networks import measure, prepared, trials_of
from dstill.evaluation.protocols import load_protocol
from dstill.experts.trained import NetworkTask, labeller, trained_network
from dstill.nets import networks as nets
from dstill.support import seeding

PROTOCOL = "{name: tiny, version: 1, passes: 4, batch_size: 8, momentum: 0.9, weight_decay: 5e-4, lr: 0.05, networks: 2}"
CPU = torch.device("cpu")


def row(labels: str, augmentation: str, accuracy: Score, random: Score | None = None, whole: Score | None = None) -> Judged:
    fields: dict[str, Any] = {
        **{"method": "dm", "data": "tiny", "data_fingerprint": "0" * 16, "ipc": 1, "sets": 1, "measured_on": "test"},
        **{"protocol": ProtocolId(name="ast", version=1), "accuracy": accuracy, "nets": {"convnet": accuracy}},
        **{"stored_bytes": 2048, "whole_bytes": 10**6, "seconds": 1.0, "alpha": None, "labels": labels, "dstill": "0"},
        **{"random": random, "whole": whole, "stages": {}},
    }
    return Judged(net="convnet", labels=labels, augmentation=augmentation, result=Result(**fields))


def once(*values: float) -> Score:
    return Score.of([values])


def judgement(*rows: Judged) -> Judgement:
    return Judgement(rows=rows, stored_bytes=2048)


SOFT = (
    row("soft", "flip", once(0.7), random=once(0.1)),
    row("hard", "flip", once(0.6), random=once(0.2), whole=once(0.9)),
    row("soft", "none", once(0.5), random=once(0.3)),
)
DRAWN = {"flip": once(0.45), "none": once(0.4)}


def test_the_scores_are_those_of_the_paper() -> None:
    """exp(-0.025) is 0.975310, exp(0.175) is 1.191246; 1/e is 0.367879 and e - 1/e is 2.350402."""
    found = Leaderboard.of(judgement(*SOFT), "flip", DRAWN)
    # HLR = 0.9 - 0.6, IOR = 0.7 - 0.45, so α = 0.5 · 0.25 - 0.5 · 0.3; β = 0.5 · 0.25 + 0.5 · (0.5 - 0.4).
    assert found.hard_label_recovery == pytest.approx(0.3) and found.improvement_over_random == pytest.approx(0.25)
    assert found.improvement_without_augmentation == pytest.approx(0.1)
    assert found.label_robust.score == pytest.approx((0.975310 - 0.367879) / 2.350402, abs=1e-6)
    assert found.augmentation_robust.score == pytest.approx((1.191246 - 0.367879) / 2.350402, abs=1e-6)
    assert found.label_robust.error is None and found.augmentation_robust.error is None, "everything was measured once"


def test_the_weights_weigh() -> None:
    """exp(0.8 · 0.25 - 0.2 · 0.3) is 1.150274, exp(0.3 · 0.25 + 0.7 · 0.1) is 1.156040."""
    found = Leaderboard.of(judgement(*SOFT), "flip", DRAWN, label_weight=0.8, augmentation_weight=0.3)
    assert found.label_robust.score == pytest.approx((1.150274 - 0.367879) / 2.350402, abs=1e-6)
    assert found.augmentation_robust.score == pytest.approx((1.156040 - 0.367879) / 2.350402, abs=1e-6)


def test_hard_labels_are_their_own_and_random_images_have_them() -> None:
    rows = (row("hard", "flip", once(0.6), once(0.2), once(0.9)), row("hard", "none", once(0.5), once(0.3)))
    found = Leaderboard.of(judgement(*rows), "flip")
    assert (found.own, found.hard, found.random, found.plain_random) == (once(0.6), once(0.6), once(0.2), once(0.3))
    assert found.label_robust.score == pytest.approx(robust_score(0.5 * 0.4 - 0.5 * 0.3))


def test_a_set_without_augmentation_has_one_lead() -> None:
    found = Leaderboard.of(judgement(row("hard", "none", once(0.6), once(0.2), once(0.9))), "none")
    assert found.augmentation_robust.score == pytest.approx(robust_score(0.4))


def test_the_ends_of_the_scale() -> None:
    same = once(0.4)
    nothing = Leaderboard.of(judgement(row("hard", "none", same, same, same)), "none")
    assert (
        nothing.label_robust.score == nothing.augmentation_robust.score == pytest.approx((1 - 1 / math.e) / 2.350402, abs=1e-6)
    )
    best = Leaderboard.of(judgement(row("hard", "none", once(1.0), once(0.0), once(0.0))), "none")
    worst = Leaderboard.of(judgement(row("hard", "none", once(0.0), once(1.0), once(1.0))), "none")
    assert (best.label_robust.score, best.augmentation_robust.score) == (1.0, 1.0)
    assert (worst.label_robust.score, worst.augmentation_robust.score) == (0.0, 0.0)


def test_the_error_of_a_score_is_that_of_means_drawn_again_and_again() -> None:
    generator = torch.Generator().manual_seed(0)
    accuracies = {"a": once(0.5, 0.56, 0.53), "b": once(0.2, 0.24), "c": once(0.1)}
    weights = {"a": 1.0, "b": -0.5, "c": -0.5}
    noise = {name: one.std / one.n**0.5 * torch.randn(20_000, generator=generator) for name, one in accuracies.items()}
    balance = sum(weights[name] * (one.mean + noise[name].double()) for name, one in accuracies.items())
    drawn = [robust_score(float(value)) for value in balance]  # type: ignore[union-attr]
    rated = Rated.of(weights, accuracies)
    assert rated.error == pytest.approx(statistics.stdev(drawn), rel=0.03)
    assert rated.score == pytest.approx(statistics.fmean(drawn), abs=1e-3)


def test_what_is_measured_once_has_its_error_counted_once() -> None:
    """The accuracy of a hard set counts in HLR and in IOR: its weight in α is 0.5 + 0.5."""
    own, random, whole = once(0.5, 0.6), once(0.2, 0.3), once(0.9)
    rated = Leaderboard.of(judgement(row("hard", "none", own, random, whole)), "none")
    error = 0.05  # of each of the two means: 0.0707 / √2
    alpha, beta = 0.5 * 0.3 - 0.5 * 0.35, 0.3
    assert rated.label_robust.error == pytest.approx(math.exp(alpha) / 2.350402 * math.hypot(error, 0.5 * error), rel=1e-6)
    assert rated.augmentation_robust.error == pytest.approx(math.exp(beta) / 2.350402 * math.hypot(error, error), rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "random", "options", "sentence"),
    [
        (SOFT, None, {}, "need random images with soft labels, which this judgement has not measured"),
        (SOFT[:2], DRAWN, {}, "no row with soft labels and augmentation none"),
        (SOFT[::2], DRAWN, {}, "no row with hard labels and augmentation flip"),
        (
            (SOFT[0], row("hard", "flip", once(0.6)), SOFT[2]),
            DRAWN,
            {},
            "need the whole training set",
        ),
        (SOFT, DRAWN, {"label_weight": 1.5}, "the label weight is a share from 0 to 1, got 1.5"),
        (SOFT, DRAWN, {"augmentation_weight": -0.1}, "the augmentation weight is a share from 0 to 1, got -0.1"),
        ((*SOFT, SOFT[0].model_copy(update={"net": "vgg11"})), DRAWN, {}, "of one network, the judgement has convnet, vgg11"),
    ],
)
def test_what_is_missing_is_said(rows: tuple[Judged, ...], random: Any, options: dict[str, float], sentence: str) -> None:
    with pytest.raises(DstillError, match=sentence):
        Leaderboard.of(judgement(*rows), "flip", random, **options)


def test_the_files_and_the_table_hold_what_was_found(tmp_path: Path) -> None:
    found = Leaderboard.of(judgement(*SOFT), "flip", DRAWN | {"none": once(0.3, 0.5)})
    found.save(tmp_path)
    assert Leaderboard.model_validate_json((tmp_path / "leaderboard.json").read_text()) == found
    table = (tmp_path / "leaderboard.md").read_text()
    assert table.startswith("dm, 1 image(s) per class of tiny, convnet, protocol ast v1\n")
    for line in (
        "| label-robust score (LRS) | 25.8 |  |",
        "| augmentation-robust score (ARS) | 35.0 ± 2.5 |  |",
        "| hard label recovery (HLR) | 30.0 |  |",
        "| improvement over random (IOR) | +25.0 |  |",
        "| improvement without augmentation | +10.0 |  |",
        "| whole training set, hard labels | 90.0 | 1 |",
        "| random images, soft labels, no augmentation | 40.0 ± 14.1 | 2 |",
    ):
        assert line in table, line
    assert "w = 0.5 for IOR against HLR" in table


# --- measured ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    return {"protocol": str(tmp_path / "tiny.yaml"), "machine": dstill.Machine(cache=tmp_path / "cache"), "seed": 3}


@pytest.fixture
def one(tiny_real: RealSet) -> DistilledSet:
    rows = torch.cat([rows[:2] for rows in tiny_real.train.by_class(tiny_real.classes)])
    made = DistilledSet.from_tensors(
        tiny_real.train.images[rows], tiny_real.train.labels[rows], real=tiny_real, augmentation="flip"
    )
    return made.with_net(NetConfig(width=4, depth=2))


def test_the_accuracies_of_a_hard_set_are_those_of_its_judgement(
    one: DistilledSet, tiny_real: RealSet, options: dict[str, Any], tmp_path: Path
) -> None:
    found = dstill.leaderboard(one, tiny_real, out=tmp_path / "out", **options)
    assert found == Leaderboard.of(dstill.judge(one, tiny_real, **options), "flip")
    assert found == Leaderboard.model_validate_json((tmp_path / "out" / "leaderboard.json").read_text())
    assert (found.labels, found.augmentation, found.protocol.name, found.net) == ("hard", "flip", "tiny", "convnet")
    assert (found.own.n, found.random.n, found.whole.n) == (2, 2 * RANDOM_DRAWS, 1)
    weighed = dstill.leaderboard(one, tiny_real, label_weight=1.0, augmentation_weight=0.0, **options)
    assert weighed.label_robust.score == pytest.approx(robust_score(found.improvement_over_random))
    assert weighed.augmentation_robust.score == pytest.approx(robust_score(found.improvement_without_augmentation))


def test_random_images_of_a_soft_set_get_the_labels_of_a_network_trained_on_the_real_images(
    one: DistilledSet, tiny_real: RealSet, options: dict[str, Any], tmp_path: Path
) -> None:
    logits = torch.nn.functional.one_hot(one.labels, 3).float() + 0.2 * torch.randn(6, 3, generator=torch.Generator())
    soft, notes, again = replace(one, labels=logits), Listener(), Listener()
    found = dstill.leaderboard(soft, tiny_real, networks=1, progress=notes, **options)
    assert "random images get soft labels of a convnet that is trained on tiny: 30 passes" in notes.notes
    assert "network epochs" in notes.stages
    judged = {(row.labels, row.augmentation): row.result for row in dstill.judge(soft, tiny_real, networks=1, **options).rows}
    assert (found.labels, found.own) == ("soft", judged["soft", "flip"].accuracy)
    assert (found.hard, found.plain) == (judged["hard", "flip"].accuracy, judged["soft", "none"].accuracy)
    assert found.whole == judged["hard", "flip"].whole
    assert found.random != judged["soft", "flip"].random, "those of a judgement have hard labels"

    task = NetworkTask(tiny_real, preprocess.fit("standardise", tiny_real.train.images), one.net, TrainingConfig(), 3)
    trained = trained_network(task, tmp_path / "cache" / "networks", CPU)
    teacher = labeller(task, trained, CPU)
    drawn = [random_set(soft, tiny_real.train, seeding.generator(3, "random-draw", k), teacher) for k in range(RANDOM_DRAWS)]
    test, protocol = prepared(tiny_real.test, soft.preprocess, CPU), load_protocol(options["protocol"])
    for score, strategy in ((found.random, "flip"), (found.plain_random, "none")):
        ways = [draw.with_augmentation(strategy) for draw in drawn]
        trials = [trials_of(way, 1, lr=score.lr, seed=3, stream=("random", k))[0] for k, way in enumerate(ways)]
        assert [one.accuracy for one in measure(trials, test, protocol)] == list(score.values)

    assert dstill.leaderboard(soft, tiny_real, networks=1, progress=again, **options) == found
    assert not again.stages & {"network epochs", "random images", "whole set"}, "all of these are in the cache"


def test_a_labeller_answers_as_its_network_does(one: DistilledSet, tiny_real: RealSet, tmp_path: Path) -> None:
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    task = NetworkTask(tiny_real, fitted, one.net, TrainingConfig(epochs=3), 5)
    trained = trained_network(task, tmp_path, CPU)
    teacher = labeller(task, trained, CPU)
    assert teacher.name == task.fingerprint()
    net = nets.build(one.net, 3, 3, (8, 8), torch.Generator())
    torch.nn.utils.vector_to_parameters(trained.weights, net.parameters())
    expected = net(fitted.forward(tiny_real.train.images.float() / 255))
    torch.testing.assert_close(teacher(tiny_real.train.images), expected, rtol=1e-4, atol=1e-5)

    other = replace(one, preprocess=Standardise(torch.zeros(3), torch.ones(3)))
    drawn = random_set(other, tiny_real.train, torch.Generator().manual_seed(0), teacher)
    plain = random_set(other, tiny_real.train, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.images, plain.images)
    torch.testing.assert_close(drawn.labels, teacher((drawn.images * 255).round().byte()))


def test_a_network_that_cannot_label_is_refused_before_anything_is_measured(
    one: DistilledSet, tiny_real: RealSet, options: dict[str, Any]
) -> None:
    soft, notes = replace(one, labels=torch.rand(6, 3), net=NetConfig(width=4, depth=2, norm="batch")), Listener()
    with pytest.raises(DstillError, match="running statistics"):
        dstill.leaderboard(soft, tiny_real, progress=notes, **options)
    assert notes.stages == set()
    assert dstill.leaderboard(replace(soft, labels=one.labels), tiny_real, networks=1, **options).labels == "hard"


def test_a_file_does_not_decide_what_labels(one: DistilledSet, tiny_real: RealSet, options: dict[str, Any]) -> None:
    soft = replace(one, labels=torch.rand(6, 3), net=NetConfig(name="nowhere_at_all:Net"))
    with pytest.raises(DstillError, match="pass --net nowhere_at_all:Net"):
        dstill.leaderboard(soft, tiny_real, **options)
    found = dstill.leaderboard(
        one.with_net(NetConfig(name="nowhere_at_all:Net")), tiny_real, net="convnet", networks=1, **options
    )
    assert found.net == "convnet"


@pytest.mark.parametrize("weights", [{"label_weight": 2.0}, {"augmentation_weight": -1.0}])
def test_a_weight_out_of_range_is_refused_before_anything_is_measured(
    one: DistilledSet, tiny_real: RealSet, options: dict[str, Any], weights: dict[str, float]
) -> None:
    notes = Listener()
    with pytest.raises(DstillError, match="share from 0 to 1"):
        dstill.leaderboard(one, tiny_real, progress=notes, **weights, **options)
    assert notes.notes == []


def test_a_validation_part_is_no_test_set(one: DistilledSet, tiny_real: RealSet, options: dict[str, Any]) -> None:
    notes = Listener()
    with pytest.raises(DstillError, match="those of a test set, and tiny is judged on its validation part"):
        dstill.leaderboard(one, tiny_real.holdout(0), progress=notes, **options)
    assert notes.stages == set()
