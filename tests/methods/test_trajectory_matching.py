"""Trajectory matching on tiny experts: one step against plain PyTorch, every switch, and what the guard does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils import vector_to_parameters

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import NetConfig
from dstill.distillation.loop import run_method
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories
from dstill.methods.base import Metrics, Problem, State
from dstill.methods.batches import draw_steps
from dstill.methods.trajectory_matching import TrajectoryMatching
from dstill.support import seeding
from dstill.unrolling.types import Step

MakeProblem = Callable[..., Problem]
DSA = "colour_crop_cutout_flip_scale_rotate"
# Without random draws that matter: one start epoch, the whole set at each step, no augmentation.
CERTAIN = {"max_start_epoch": 1}
# With this, α would fall far below zero at every step.
HOPELESS = {"alpha_init": 5.0, "lr_alpha": 1e6}
# Every part of AST in the paper's form.
AST = {
    "initialisation": "representative",
    "balanced_loss": "paper",
    "intermediate_matching": "paper",
    "perturbation": "paper",
}


def started(problem: Problem) -> tuple[TrajectoryMatching, State]:
    method = TrajectoryMatching()
    method.start(problem)
    return method, method.initialise(seeding.generator(0, "initialise"))


def steps(method: TrajectoryMatching, state: State, count: int) -> list[Metrics]:
    return [method.step(state, i, seeding.generator(0, "step", i)) for i in range(count)]


def drawn_steps(method: TrajectoryMatching) -> list[Step]:
    settings = method.settings
    return draw_steps(method.problem, settings.batch_syn, settings.student_steps, seeding.generator(0, "batches"))


def copied(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def by_hand(
    problem: Problem,
    images: Tensor,
    alpha: Tensor,
    points: dict[int, int],
    *,
    scale: float,
    momentum: float,
    soft: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matching loss of expert 0 from epoch 0, and its gradients by images and α: plain autograd through all steps.

    `soft`: labels are the expert's logits on the images after epoch 3, and the gradient passes through them as well.
    """
    assert problem.trajectories is not None
    rows = problem.trajectories.rows(0, 0, 4)
    net = problem.network()
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)
    images, alpha = images.clone().requires_grad_(), alpha.clone().requires_grad_()
    theta, buffer = rows[0].clone().requires_grad_(), torch.zeros_like(rows[0])
    loss, labels = torch.zeros(()), problem.labels()
    if soft:
        expert = {n: p.view(s) for n, p, s in zip(names, rows[3].split([s.numel() for s in shapes]), shapes, strict=True)}
        labels = functional_call(net, expert, (images,)).softmax(1)
    for n in range(1, 6):
        parts = theta.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        inner = scale * F.cross_entropy(functional_call(net, weights, (images,)), labels)
        (gradient,) = torch.autograd.grad(inner, theta, create_graph=True)
        buffer = momentum * buffer + gradient
        theta = theta - alpha * buffer
        if n in points:
            target = rows[points[n]]
            loss = loss + (theta - target).square().sum() / (rows[0] - target).square().sum()
    by_images, by_alpha = torch.autograd.grad(loss, [images, alpha])
    return loss.detach(), by_images, by_alpha


@pytest.mark.parametrize("settings", [{"lr_alpha": 0.0}, {}, {"lr_alpha": 1e-4, "initialisation": "noise"}], ids=str)
def test_the_matching_loss_falls(make_problem: MakeProblem, settings: dict[str, Any]) -> None:
    losses = [row["loss"] for row in steps(*started(make_problem(**settings)), 20)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize(
    ("settings", "points", "scale", "momentum"),
    [
        ({}, {5: 3}, 1.0, 0.0),
        # T+ = 1: the start epoch lies half an epoch before the middle, so ν = 1 / ln(8.5) = 0.467.
        ({"balanced_loss": "paper", "intermediate_matching": "paper"}, {1: 1, 3: 2, 5: 3}, 0.46727, 0.0),
        ({"intermediate_matching": "released", "student_momentum": 0.9}, {1: 1, 2: 2, 5: 3}, 1.0, 0.9),
    ],
)
def test_two_steps_equal_plain_autograd_and_sgd_with_momentum(
    make_problem: MakeProblem,
    trajectories: Trajectories,
    settings: dict[str, Any],
    points: dict[int, int],
    scale: float,
    momentum: float,
) -> None:
    problem = make_problem(ipc=2, experts=Trajectories(trajectories.folder, 1), **CERTAIN, **settings)
    method, state = started(problem)
    images, alpha = (torch.nn.Parameter(state[name].clone()) for name in ("images", "alpha"))
    sgd = torch.optim.SGD([{"params": [images], "lr": 10.0}, {"params": [alpha], "lr": 1e-3}], lr=1.0, momentum=0.5)
    for row in steps(method, state, 2):
        loss, images.grad, alpha.grad = by_hand(
            problem, images.detach(), alpha.detach(), points, scale=scale, momentum=momentum
        )
        sgd.step()
        assert row["loss"] == pytest.approx(float(loss), rel=1e-4)
    torch.testing.assert_close(state["images"], images.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state["alpha"], alpha.detach(), rtol=1e-5, atol=1e-7)


def test_the_adjoint_takes_the_step_of_plain_autograd_with_all_parts_on(make_problem: MakeProblem) -> None:
    ends: list[State] = []
    for gradient in ("adjoint", "graph"):
        method, state = started(make_problem(ipc=3, batch_syn=4, augmentation=DSA, gradient=gradient, **AST))
        steps(method, state, 1)
        ends.append(state)
    torch.testing.assert_close(ends[0]["images"], ends[1]["images"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ends[0]["alpha"], ends[1]["alpha"], rtol=1e-5, atol=1e-7)


def test_every_switch_and_form_leads_to_a_set_of_its_own(make_problem: MakeProblem) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"balanced_loss": "off"},
        {"balanced_loss": "released"},
        {"intermediate_matching": "off"},
        {"intermediate_matching": "released"},
        {"intermediate_scale": "ramp"},
        {"perturbation": "off"},
        {"perturbation": "released"},
        {"rho": 0.2},
        {"denominator": "unperturbed"},
        {"dropout": 0.2},
        {"student_momentum": 0.9},
        {"initialisation": "random"},
        {"initialisation": "representative-released"},
        {"initialisation": "noise"},
        {"batch_syn": 4},
        {"soft_labels": "expert"},
        {"gradient": "tesla"},
        {"image_ema": 0.9},
        {"image_momentum": 0.0},
        {"lr_images": 20.0},
        {"alpha_init": 0.2},
        {"student_steps": 6},
        {"min_start_epoch": 1},
    ]
    ends = [run_method(make_problem(ipc=3, **{**AST, **change})).images for change in changes]
    same = [(a, b) for (a, x), (b, y) in combinations(zip(changes, ends, strict=True), 2) if (x - y).abs().max() < 1e-5]
    assert not same


def test_the_perturbed_start_lies_rho_times_the_filters_norms_away(
    make_problem: MakeProblem, trajectories: Trajectories
) -> None:
    problem = make_problem(experts=Trajectories(trajectories.folder, 1), perturbation="paper", rho=0.2, **CERTAIN)
    method, state = started(problem)
    rows = trajectories.rows(0, 0, 4)
    filters = torch.cat([weight.flatten() for weight in method.student.split(rows[0]) if weight.ndim > 1])
    (row,) = steps(method, state, 1)
    assert row["perturbation_ratio"] == pytest.approx(0.2 * float(filters.norm() / (rows[0] - rows[3]).norm()), rel=1e-4)


def test_dropout_zeroes_its_share_of_the_start_and_scales_up_the_rest(make_problem: MakeProblem) -> None:
    method, _ = started(make_problem(dropout=0.25))
    segment = method.trajectories.segment(0, 1, 3)
    start = method._perturbed(segment.start, seeding.generator(0, "perturb"))
    kept = start != 0
    torch.testing.assert_close(start[kept], segment.start[kept] / 0.75)
    assert float(kept.float().mean()) == pytest.approx(0.75 * float((segment.start != 0).float().mean()), abs=0.1)


def test_a_small_batch_uses_every_image_once_before_any_twice(make_problem: MakeProblem) -> None:
    method, _ = started(make_problem(ipc=10, batch_syn=7, student_steps=23, augmentation=DSA))
    uses = torch.zeros(30, dtype=torch.int64)
    drawn = drawn_steps(method)
    assert len(drawn) == 23
    for step in drawn:
        assert 1 <= len(step.rows) <= 7
        assert step.augmentation is not None
        assert len(step.augmentation.values) == len(step.rows)
        uses[step.rows] += 1
        assert uses.max() - uses.min() <= 1
    assert uses.min() >= 4


def test_each_pass_over_the_set_has_an_order_of_its_own(make_problem: MakeProblem) -> None:
    method, _ = started(make_problem(ipc=10, batch_syn=10, student_steps=6))
    rows = torch.cat([step.rows for step in drawn_steps(method)])
    assert not torch.equal(rows[:30], rows[30:])


@pytest.mark.parametrize("batch_syn", [None, 30, 500])
def test_without_a_smaller_batch_every_step_sees_the_whole_set(make_problem: MakeProblem, batch_syn: int | None) -> None:
    method, _ = started(make_problem(ipc=10, batch_syn=batch_syn))
    for step in drawn_steps(method):
        assert step.rows.sort().values.tolist() == list(range(30))


def test_segments_start_at_every_epoch_of_the_range_and_come_from_every_expert(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(min_start_epoch=1, max_start_epoch=3))
    rows = steps(method, state, 24)
    assert {(row["expert"], row["start_epoch"]) for row in rows} == {(0, 1), (0, 2), (1, 1), (1, 2)}


def test_the_seed_decides_the_set(make_problem: MakeProblem) -> None:
    settings = {"ipc": 2, "batch_syn": 4, "augmentation": DSA, **AST}
    first, again, other = (run_method(make_problem(seed=seed, **settings)) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert first.alpha == again.alpha
    assert not torch.equal(first.images, other.images)


def test_a_step_is_decided_by_its_generator_not_by_torchs_global_one(make_problem: MakeProblem) -> None:
    ends: list[Tensor] = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        ends.append(run_method(make_problem(augmentation=DSA, dropout=0.1, **AST)).images)
    assert torch.equal(*ends)


def test_the_set_holds_ipc_images_a_class_and_the_learned_rate(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(ipc=2))
    steps(method, state, 1)
    distilled = method.result(state)
    assert distilled.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(distilled.images, state["images"])
    assert distilled.alpha == float(state["alpha"]) != pytest.approx(0.1, rel=1e-6)


def test_a_result_does_not_follow_later_steps(make_problem: MakeProblem) -> None:
    method, state = started(make_problem())
    distilled = method.result(state)
    kept = distilled.images.clone()
    steps(method, state, 1)
    assert torch.equal(distilled.images, kept)


def test_a_step_that_would_make_alpha_non_positive_is_skipped_and_counted(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(image_ema=0.9, **HOPELESS))
    before = copied(state)
    first, second = steps(method, state, 2)
    assert (first["taken"], first["skipped"], second["skipped"]) == (0, 1, 2)
    assert int(state.pop("skipped")) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())


def test_the_momentum_that_led_to_a_skipped_step_does_not_lead_to_another(make_problem: MakeProblem) -> None:
    method, state = started(make_problem())
    state["alpha.momentum"] = torch.tensor(1e6)  # as after a step that took α almost to zero
    assert [row["taken"] for row in steps(method, state, 3)] == [0, 1, 1]


def test_a_step_to_non_finite_images_is_skipped(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(lr_images=1e300))
    before = state["images"].clone()
    (row,) = steps(method, state, 1)
    assert (row["taken"], row["skipped"]) == (0, 1)
    assert torch.equal(state["images"], before)


def test_a_step_that_is_taken_says_so(make_problem: MakeProblem) -> None:
    (row,) = steps(*started(make_problem()), 1)
    assert (row["taken"], row["skipped"]) == (1, 0)


def test_too_many_skips_stop_the_run_with_advice(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(**HOPELESS))
    steps(method, state, 9)
    with pytest.raises(DstillError, match=r"10 of 10 steps .* more than the 20% allowed: lower distill\.lr_images or lr_alpha"):
        method.step(state, 9, seeding.generator(0, "step", 9))


def test_few_skips_among_many_steps_are_forgiven(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(**HOPELESS))
    state["skipped"] = torch.tensor(18)
    method.step(state, 99, seeding.generator(0, "step", 99))  # 19 of 100
    method.step(state, 99, seeding.generator(0, "step", 99))  # 20 of 100
    with pytest.raises(DstillError, match="21 of 100"):
        method.step(state, 99, seeding.generator(0, "step", 99))


def test_without_the_guard_a_collapse_ends_the_run(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(guard="off", lr_images=1e300))
    with pytest.raises(DstillError, match="the run collapsed at iteration 0"):
        steps(method, state, 1)


def test_without_the_guard_alpha_may_turn_negative(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(guard="off", **HOPELESS))
    (row,) = steps(method, state, 1)
    assert row["alpha"] < 0
    assert (row["taken"], row["skipped"]) == (1, 0)


def test_the_moving_average_of_the_images_is_the_result(make_problem: MakeProblem) -> None:
    method, state = started(make_problem(image_ema=0.75))
    average = state["images"].clone()
    for i in range(4):
        method.step(state, i, seeding.generator(0, "step", i))
        average = 0.75 * average + 0.25 * state["images"]
    result = method.result(state).images
    torch.testing.assert_close(result, average)
    assert (result - state["images"]).abs().max() > 1e-4


def test_the_moving_average_does_not_change_the_images_being_optimised(make_problem: MakeProblem) -> None:
    ends: list[Tensor] = []
    for ema in (None, 0.75):
        method, state = started(make_problem(image_ema=ema))
        steps(method, state, 3)
        ends.append(state["images"])
    assert torch.equal(*ends)


def test_soft_labels_are_the_target_experts_logits_on_the_current_images_and_are_stored(
    make_problem: MakeProblem, trajectories: Trajectories, tmp_path: Path
) -> None:
    experts = Trajectories(trajectories.folder, 1)
    problem = make_problem(ipc=2, experts=experts, gradient="tesla", soft_labels="expert", **CERTAIN)
    method, state = started(problem)
    steps(method, state, 2)
    images = state["images"].clone()
    method.step(state, 2, seeding.generator(0, "step", 2))
    net = problem.network()
    vector_to_parameters(experts.rows(0, 3, 4)[0], net.parameters())
    torch.testing.assert_close(state["labels"], net(images).detach(), rtol=1e-4, atol=1e-5)

    stored = DistilledSet.load(method.result(state).save(tmp_path))
    assert stored.labels.shape == (6, 3)
    assert torch.equal(stored.labels, state["labels"])


@pytest.mark.parametrize("block", [4, 256])
def test_differentiated_labels_equal_plain_autograd(
    make_problem: MakeProblem, trajectories: Trajectories, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstill.methods.expert_labels._BLOCK", block)  # of 6 images
    experts = Trajectories(trajectories.folder, 1)
    problem = make_problem(ipc=2, experts=experts, soft_labels="expert-differentiated", image_momentum=0.0, **CERTAIN)
    method, state = started(problem)
    before = copied(state)
    (row,) = steps(method, state, 1)
    loss, by_images, by_alpha = by_hand(problem, before["images"], before["alpha"], {5: 3}, scale=1.0, momentum=0.0, soft=True)
    assert row["loss"] == pytest.approx(float(loss), rel=1e-4)
    torch.testing.assert_close(state["images"], before["images"] - 10.0 * by_images, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(state["alpha"], before["alpha"] - 1e-3 * by_alpha, rtol=1e-3, atol=1e-6)


def test_experts_that_are_too_short_are_refused_with_the_remedy(make_problem: MakeProblem) -> None:
    started(make_problem(max_start_epoch=3))  # 5 epochs: just enough
    with pytest.raises(DstillError, match=r"trained for 5 epochs, matching needs 6 .*lower distill\.max_start_epoch"):
        started(make_problem(max_start_epoch=4))


def test_experts_of_another_network_are_refused(make_problem: MakeProblem) -> None:
    with pytest.raises(DstillError, match=r"have 327 parameters, the recipe's network \d+"):
        started(make_problem(net=NetConfig(width=5, depth=2)))


def test_experts_are_required(make_problem: MakeProblem) -> None:
    with pytest.raises(DstillError, match="needs expert trajectories"):
        started(make_problem(experts=None))
