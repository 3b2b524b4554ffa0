"""The training loop against the same training in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dstill.data import siamese
from dstill.derivatives.engine import derivatives_of
from dstill.support import seeding
from dstill.training.fit import (
    Batch,
    EpochReport,
    accuracy,
    cross_entropy,
    cross_entropy_objective,
    fit,
    predictions,
    shuffled_batches,
    step_at,
    student_batches,
)

DSA = "colour_crop_cutout_flip_scale_rotate"


def small_net(dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(4 * 16, 3))


def data(count: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=generator)
    return torch.randn(count, 1, 4, 4, generator=generator) + labels.view(-1, 1, 1, 1), labels


def fitted(*, seed: int = 0, epochs: int = 3, augmentation: str = "none", soft: bool = False) -> list[Tensor]:
    net = small_net()
    images, labels = data()
    fit(
        net,
        images,
        F.one_hot(labels, 3) * 2.0 if soft else labels,
        epochs=epochs,
        batch_size=4,
        optimiser=torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
        generator=seeding.generator(seed, "fit"),
        augmentation=augmentation,
    )
    return [parameter.detach() for parameter in net.parameters()]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("augmentation", ["none", DSA])
def test_fit_equals_a_hand_written_loop_bit_for_bit(augmentation: str, soft: bool) -> None:
    net, generator = small_net(), seeding.generator(0, "fit")
    images, labels = data()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        order = torch.randperm(11, generator=generator)
        for first in (0, 4, 8):
            rows = order[first : first + 4]
            batch = siamese.apply(images[rows], siamese.sample(augmentation, len(rows), generator))
            logits = net(batch)
            if soft:
                loss = -((F.one_hot(labels[rows], 3) * 2.0).softmax(1) * logits.log_softmax(1)).sum(1).mean()
            else:
                loss = F.cross_entropy(logits, labels[rows])
            sgd.zero_grad()
            loss.backward()
            sgd.step()
    for actual, expected in zip(fitted(augmentation=augmentation, soft=soft), net.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_the_generator_decides_the_weights() -> None:
    first, again, other = (fitted(seed=seed, augmentation=DSA) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def watched(epochs: int = 2, augmentation: str = "none") -> tuple[list[Batch], list[EpochReport]]:
    """The batches that the objective received, and the reports that the observer received."""
    batches: list[Batch] = []
    reports: list[EpochReport] = []

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        batches.append(batch)
        cross_entropy_objective(derivatives_of(net))(net, batch)
        return torch.tensor(float(len(batch.rows)))

    net = small_net()
    images, labels = data()
    fit(
        net,
        images,
        labels,
        epochs=epochs,
        batch_size=4,
        optimiser=torch.optim.SGD(net.parameters(), lr=0.1),
        generator=seeding.generator(0, "fit"),
        objective=objective,
        augmentation=augmentation,
        observer=reports.append,
    )
    return batches, reports


def test_an_objective_sees_every_image_once_a_pass_and_the_number_of_the_pass() -> None:
    batches, _ = watched()
    assert [batch.epoch for batch in batches] == [0, 0, 0, 1, 1, 1]
    for epoch in (0, 1):
        rows = torch.cat([batch.rows for batch in batches if batch.epoch == epoch])
        assert rows.sort().values.tolist() == list(range(11))


def test_an_objective_sees_images_before_and_after_augmentation_with_their_labels() -> None:
    images, labels = data()
    batches, _ = watched(augmentation="colour")
    for batch in batches:
        assert torch.equal(batch.raw, images[batch.rows])
        assert torch.equal(batch.labels, labels[batch.rows])
        assert not torch.equal(batch.images, batch.raw)


def test_the_observer_is_called_after_every_pass_with_the_mean_loss_an_image() -> None:
    _, reports = watched(epochs=3)
    assert [report.epochs_done for report in reports] == [1, 2, 3]
    # The objective's losses are the sizes of its batches, 4, 4 and 3.
    assert [report.loss for report in reports] == pytest.approx([(4 * 4 + 4 * 4 + 3 * 3) / 11] * 3)
    assert all(report.images_per_second > 0 for report in reports)


def test_training_lowers_the_loss() -> None:
    net = small_net()
    images, labels = data()
    losses: list[float] = []
    fit(
        net,
        images,
        labels,
        epochs=15,
        batch_size=4,
        optimiser=torch.optim.SGD(net.parameters(), lr=0.05),
        generator=seeding.generator(0, "fit"),
        observer=lambda report: losses.append(report.loss),
    )
    assert losses[-1] < 0.5 * losses[0]


def test_fit_trains_in_training_mode() -> None:
    modes: list[bool] = []

    def objective(net: nn.Module, batch: Batch) -> Tensor:
        modes.append(net.training)
        return cross_entropy_objective(derivatives_of(net))(net, batch)

    net = small_net().eval()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    generator = seeding.generator(0, "fit")
    fit(net, *data(), epochs=1, batch_size=4, optimiser=sgd, generator=generator, objective=objective)
    assert modes == [True] * 3


@pytest.mark.parametrize("size", [1, 4, 11, 50])
def test_shuffled_batches_cover_every_row_once(size: int) -> None:
    batches = list(shuffled_batches(11, size, seeding.generator(0, "batches")))
    assert sorted(torch.cat(batches).tolist()) == list(range(11))
    assert all(len(batch) == min(size, 11) for batch in batches[:-1])


@pytest.mark.parametrize(("size", "steps"), [(None, 3), (4, 7), (4, 2), (50, 2)])
def test_a_student_uses_every_image_once_before_any_twice(size: int | None, steps: int) -> None:
    batches = list(student_batches(11, size, steps, seeding.generator(0, "batches")))
    assert len(batches) == steps
    of_a_pass = [min(size or 11, 11 - start) for start in range(0, 11, size or 11)]
    assert [len(batch) for batch in batches] == (of_a_pass * steps)[:steps]
    rows = torch.cat(batches).tolist()
    passes = [rows[start : start + 11] for start in range(0, len(rows), 11)]
    assert all(len(set(one)) == len(one) for one in passes)
    assert len(passes) < 2 or passes[0] != passes[1], "a fresh permutation each time"


def scores(seed: int, count: int) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_soft_cross_entropy_equals_hard_with_nearly_one_hot_labels() -> None:
    logits, labels = scores(0, 6), torch.tensor([0, 2, 1, 1, 0, 2])
    hard = cross_entropy(logits, labels)
    soft = cross_entropy(logits, 100.0 * F.one_hot(labels, 3).double())
    torch.testing.assert_close(soft, hard, rtol=1e-12, atol=0)
    torch.testing.assert_close(hard, F.cross_entropy(logits, labels))


def test_soft_labels_are_logits_whose_softmax_is_the_target() -> None:
    logits, targets = scores(0, 5), scores(1, 5).softmax(1)
    expected = sum(-float(p) * float(q) for p, q in zip(targets.flatten(), logits.log_softmax(1).flatten(), strict=True)) / 5
    assert float(cross_entropy(logits, targets.log())) == pytest.approx(expected, rel=1e-12)


def rates(epoch: int, *, reset: bool = False, passes: int = 6) -> tuple[list[float], list[bool]]:
    """Learning rate of every pass, and whether there was momentum at its start."""
    net = small_net()
    sgd = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    schedule = step_at(epoch, 0.1, reset=reset)
    seen: list[float] = []
    momentum: list[bool] = []

    def watch(optimiser: torch.optim.Optimizer, current: int) -> None:
        schedule(optimiser, current)
        seen.append(optimiser.param_groups[0]["lr"])
        momentum.append(bool(optimiser.state))

    generator = seeding.generator(0, "fit")
    fit(net, *data(), epochs=passes, batch_size=4, optimiser=sgd, generator=generator, schedule=watch)
    return seen, momentum


def test_the_learning_rate_steps_once_before_the_pass_of_that_number() -> None:
    seen, momentum = rates(4)
    assert seen == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.05, 0.05])
    assert momentum == [False, True, True, True, True, True]


def test_a_reset_forgets_the_momentum_at_the_step_alone() -> None:
    assert rates(4, reset=True)[1] == [False, True, True, True, False, True]


def test_a_step_beyond_the_last_pass_never_comes() -> None:
    assert rates(6)[0] == [0.5] * 6


def test_predictions_are_those_of_evaluation_mode_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    net = small_net(dropout=0.9)
    images, _ = data()
    expected = net.eval()(images).argmax(1)
    net.train()
    for size in (1, 4, 512):
        monkeypatch.setattr("dstill.training.fit._BLOCK", size)
        assert torch.equal(predictions(net, images), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_predicting_and_measuring_restore_the_networks_mode(mode: bool) -> None:
    net = small_net().train(mode)
    predictions(net, data()[0])
    assert net.training == mode
    accuracy(net, *data())
    assert net.training == mode


def test_the_mode_is_restored_also_when_the_network_fails() -> None:
    net = small_net().train()
    with pytest.raises(RuntimeError):
        predictions(net, torch.zeros(2, 5, 4, 4))
    assert net.training


def test_predictions_carry_no_graph() -> None:
    class Scores(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            return images.flatten(1)

    assert predictions(Scores(), torch.eye(3).view(3, 1, 1, 3)).tolist() == [0, 1, 2]


def test_accuracy_is_the_share_of_images_whose_class_is_predicted() -> None:
    images = torch.eye(4).view(4, 1, 2, 2)
    assert accuracy(nn.Flatten(), images, torch.tensor([0, 1, 2, 0])) == 0.75
