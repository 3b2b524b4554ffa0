"""DATM's parts: learned labels, start epochs that grow, classified initial images, skipped segments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import vector_to_parameters

from dstill.data.real import RealSet, Split
from dstill.errors import CollapseError
from dstill.experts.trajectory import Trajectories
from dstill.methods import initialisation
from dstill.methods.base import Problem, State
from dstill.methods.datm import DatmConfig
from dstill.methods.drawing import Drawn, Told
from dstill.methods.expert_labels import last_weights, mean_expert_labels
from dstill.methods.matching_config import MatchingConfig
from dstill.methods.trajectory_matching import TrajectoryMatching
from dstill.support import seeding
from dstill.unrolling.student import Student

MakeProblem = Callable[..., Problem]


def started(problem: Problem) -> tuple[TrajectoryMatching, State]:
    method = TrajectoryMatching()
    method.start(problem)
    return method, method.initialise(seeding.generator(0, "initialise"))


def logits_of(problem: Problem, trajectories: Trajectories, expert: int, images: Tensor) -> Tensor:
    net = problem.network()
    vector_to_parameters(trajectories.rows(expert, 5, 6)[0], net.parameters())
    return net(images).detach()


def test_learned_labels_start_as_the_mean_of_the_experts_that_are_right(
    make_problem: MakeProblem, trajectories: Trajectories
) -> None:
    problem = make_problem()
    images, student = torch.randn(30, 3, 8, 8, generator=torch.Generator().manual_seed(0)), Student(problem.network())
    each = [logits_of(problem, trajectories, expert, images) for expert in range(2)]
    # Labels for which both, one of the two, or no expert is right.
    labels = torch.stack([each[i % 2].argmax(1)[i] if i % 3 else each[0].argmin(1)[i] for i in range(30)])
    found = mean_expert_labels(student, trajectories, images, labels)
    for i, label in enumerate(labels.tolist()):
        right = [logits[i] for logits in each if int(logits[i].argmax()) == label] or [logits[i] for logits in each]
        torch.testing.assert_close(found[i], torch.stack(right).mean(0), rtol=1e-4, atol=1e-5)
    agree = (each[0].argmax(1) == each[1].argmax(1)).float().mean()
    assert 0 < agree < 1, "the experts must differ somewhere, or the test proves nothing"
    assert torch.equal(last_weights(trajectories, 1), trajectories.rows(1, 5, 6)[0])


def test_learned_labels_take_sgd_steps_with_momentum_along_the_exact_gradient(
    make_problem: MakeProblem, trajectories: Trajectories
) -> None:
    experts = Trajectories(trajectories.folder, 1)
    problem = make_problem(
        ipc=2, experts=experts, max_start_epoch=1, soft_labels="learned", lr_labels=3.0, label_momentum=0.8, lr_alpha=0.0
    )
    method, state = started(problem)
    rows, net = experts.rows(0, 0, 4), problem.network()
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)
    labels = state["labels"].clone()
    buffer = torch.zeros_like(labels)
    for i in range(2):
        live, images, theta = labels.clone().requires_grad_(), state["images"].clone(), rows[0].clone().requires_grad_()
        for _ in range(5):
            parts = theta.split([shape.numel() for shape in shapes])
            weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
            inner = F.cross_entropy(functional_call(net, weights, (images,)), live.softmax(1))
            theta = theta - 0.1 * torch.autograd.grad(inner, theta, create_graph=True)[0]
        loss = (theta - rows[3]).square().sum() / (rows[0] - rows[3]).square().sum()
        buffer = 0.8 * buffer + torch.autograd.grad(loss, live)[0]
        labels = labels - 3.0 * buffer
        method.step(state, i, seeding.generator(0, "step", i))
        torch.testing.assert_close(state["labels"], labels, rtol=1e-3, atol=1e-4)
    assert torch.equal(method.result(state).labels, state["labels"])


def test_the_average_of_learned_labels_is_the_result(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(soft_labels="learned", image_ema=0.75, lr_labels=5.0))
    average = state["labels"].clone()
    for i in range(3):
        method.step(state, i, seeding.generator(0, "step", i))
        average = 0.75 * average + 0.25 * state["labels"]
    torch.testing.assert_close(method.result(state).labels, average)
    assert (average - state["labels"]).abs().max() > 1e-4


def test_the_limit_of_the_start_epochs_grows_to_t_plus() -> None:
    growing = MatchingConfig(start_epochs="growing", first_start_epochs=10, max_start_epoch=20, grow_over=1000)
    assert [growing.latest_start(i) for i in (0, 99, 100, 500, 1000, 5000)] == [10, 10, 11, 15, 20, 20]
    assert MatchingConfig(start_epochs="growing", max_start_epoch=20, min_start_epoch=12).latest_start(0) == 13
    assert MatchingConfig(start_epochs="growing", max_start_epoch=20).latest_start(0) == 10
    assert MatchingConfig(max_start_epoch=20).latest_start(0) == 20
    for wrong in (0, 21):
        with pytest.raises(ValueError, match=r"first_start_epochs|greater than"):
            MatchingConfig(first_start_epochs=wrong, max_start_epoch=20)


def test_start_epochs_are_drawn_below_the_growing_limit(make_problem: MakeProblem) -> None:
    settings = {"max_start_epoch": 3, "first_start_epochs": 1, "grow_over": 10, "start_epochs": "growing"}
    method, _ = started(make_problem(**settings))
    drawn = [{method._draw_segment(i, torch.Generator().manual_seed(k)).epoch for k in range(40)} for i in (0, 5, 10)]
    assert drawn == [{0}, {0, 1}, {0, 1, 2}]


def test_a_segment_with_a_large_loss_changes_nothing(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(skip_above=1e-6, soft_labels="learned", image_ema=0.9))
    before = {name: tensor.clone() for name, tensor in state.items()}
    row = method.step(state, 0, seeding.generator(0, "step"))
    assert row["loss"] > 1e-6 and (row["taken"], row["skipped"]) == (0, 0)
    assert int(state.pop("passed_over")) == 1 + int(before.pop("passed_over"))
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    taking, state = started(make_problem(skip_above=1e6))
    assert taking.step(state, 0, seeding.generator(0, "step"))["taken"] == 1


def with_loss(loss: float) -> Told:
    return Told.of(0, Told.parcel(Drawn({"images": torch.ones(2)}, {"loss": loss})), torch.device("cpu"))


def test_a_run_in_which_every_segment_is_passed_over_ends_with_advice(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(skip_above=1e-6))
    with pytest.raises(CollapseError, match=r"each of the first 100 segments had a loss above distill\.skip_above 1e-06"):
        for i in range(101):
            method.guard.usable(state, i, [with_loss(2.0)])
    assert int(state["passed_over"]) == 100
    method, state = started(make_problem(skip_above=1e-6))
    with pytest.raises(CollapseError, match=r"each of the first 100 segments had a loss above .*, or none that is finite"):
        for i in range(101):
            method.guard.usable(state, i, [with_loss(float("inf") if i == 3 else 2.0)])
    one_taken, state = started(make_problem(skip_above=1.0))
    assert one_taken.guard.usable(state, 0, [with_loss(0.5)])
    for i in range(1, 150):
        assert not one_taken.guard.usable(state, i, [with_loss(2.0)])


def test_an_infinite_loss_is_a_fault_and_not_passed_over(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(skip_above=1.0))
    assert not method.guard.usable(state, 0, [with_loss(float("inf"))])
    assert (int(state["skipped"]), int(state["passed_over"])) == (1, 0)
    method, state = started(make_problem(skip_above=1.0, guard="off"))
    with pytest.raises(CollapseError, match="the guard is off"):
        method.guard.usable(state, 0, [with_loss(float("inf"))])


def test_classified_images_are_those_that_an_expert_gets_right(
    make_problem: MakeProblem, trajectories: Trajectories, tiny_real: RealSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialisation, "_FEW", 3)
    # The experts know the true classes. Half of the images are given the next class instead.
    wrong = torch.arange(len(tiny_real.train)) % 2 == 1
    labels = torch.where(wrong, (tiny_real.train.labels + 1) % 3, tiny_real.train.labels)
    problem = make_problem(ipc=4, real=replace(tiny_real, train=Split(tiny_real.train.images, labels), fingerprint=""))
    rows = initialisation.classified_rows(problem, torch.Generator().manual_seed(0))
    assert labels[rows].tolist() == [c for c in range(3) for _ in range(4)] and len(set(rows.tolist())) == 12
    images = problem.prepared(rows)
    assert bool((logits_of(problem, trajectories, 0, images).argmax(1) == labels[rows]).all())
    # Ten images of a class are classified correctly, by either expert; five more are taken, and none twice.
    many = initialisation.classified_rows(make_problem(ipc=15, real=problem.real), torch.Generator().manual_seed(0))
    assert len(set(many.tolist())) == 45
    # All images of a class are taken where too few are classified correctly.
    every = initialisation.classified_rows(make_problem(ipc=20), torch.Generator().manual_seed(0))
    assert sorted(every.tolist()) == list(range(len(tiny_real.train)))
    again = initialisation.classified_rows(problem, torch.Generator().manual_seed(1))
    assert set(again.tolist()) != set(rows.tolist())


def test_the_defaults_are_the_papers() -> None:
    settings = DatmConfig()
    assert (settings.student_steps, settings.start_epochs, settings.initialisation) == (80, "growing", "classified")
    assert (settings.soft_labels, settings.skip_above, settings.lr_labels, settings.label_momentum) == (
        "learned",
        1.0,
        2.0,
        0.9,
    )
    assert DatmConfig.expert_defaults()["gsam"] == {}
