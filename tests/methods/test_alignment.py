"""The parts of student alignment, compared with the paper's formulas."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dstill.config.settings import Form
from dstill.experts.trajectory import Segment
from dstill.methods.alignment import balance_factor, balanced_loss, intermediate_matching, matching_points, perturb_weights
from dstill.support import seeding


@pytest.mark.parametrize("max_start", [1, 15, 40])
def test_the_balance_factor_is_equation_20(max_start: int) -> None:
    middle, whole = max_start / 2, max_start // 2
    for t in range(max_start):
        paper = math.log(t - middle + 8) if t >= middle else 1 / math.log(middle - t + 8)
        released = math.log(t - whole + 8, 5) if t >= whole else 1 / math.log(whole - t + 8, 5)
        assert balanced_loss(t, max_start, "paper") == pytest.approx(paper, rel=1e-12)
        assert balanced_loss(t, max_start, "released") == pytest.approx(released, rel=1e-12)
        assert abs(paper - released) > 0.05 * paper


def test_the_balance_factor_is_below_one_before_the_middle_and_above_it_after() -> None:
    factors = [balanced_loss(t, 40, "paper") for t in range(40)]
    assert max(factors[:20]) < 1 < min(factors[20:])
    assert factors == sorted(factors[:20]) + sorted(factors[20:])


def test_balancing_that_is_off_leaves_the_loss_alone() -> None:
    assert {balanced_loss(t, 40, "off") for t in range(40)} == {1.0}


def test_a_start_outside_the_range_is_refused() -> None:
    for start in (-1, 40):
        with pytest.raises(ValueError, match=r"outside \[0, 40\)"):
            balance_factor(start, 40)


def test_an_offset_that_could_make_the_factor_negative_is_refused() -> None:
    with pytest.raises(ValueError, match="offset must be above 1"):
        balance_factor(0, 40, offset=1.0)


@pytest.mark.parametrize(
    ("form", "expected"),
    [("paper", {6: 1, 13: 2, 20: 3}), ("released", {6: 1, 12: 2, 20: 3}), ("off", {20: 3})],
)
def test_matching_points_of_twenty_steps_over_three_epochs(form: Form, expected: dict[int, int]) -> None:
    assert matching_points(20, 3, form) == expected


@given(st.integers(1, 12), st.integers(0, 100), st.sampled_from(["paper", "released"]))
def test_matching_points_rise_together_and_end_at_the_last_step(epochs: int, extra: int, form: Form) -> None:
    steps = epochs + extra
    points = matching_points(steps, epochs, form)
    assert list(points.values()) == list(range(1, epochs + 1))
    assert list(points) == sorted(points)
    assert min(points) >= 1
    assert points[steps] == epochs


@given(st.integers(1, 12), st.integers(0, 100))
def test_the_papers_points_divide_the_segment_evenly_to_one_step(epochs: int, extra: int) -> None:
    steps = epochs + extra
    for at, ahead in matching_points(steps, epochs, "paper").items():
        assert 0 <= ahead * steps / epochs - at < 1


def segment(seed: int = 0, span: int = 3, numel: int = 9) -> Segment:
    generator = torch.Generator().manual_seed(seed)
    return Segment(0, 2, torch.randn(numel, generator=generator), torch.randn(span, numel, generator=generator))


def squared_distance(a: Tensor, b: Tensor) -> float:
    return sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("scale", "betas"), [("equal", [1, 1, 1]), ("ramp", [1 / 3, 2 / 3, 1])])
@pytest.mark.parametrize("perturbed", [False, True])
def test_matching_weights_are_equation_22(scale: Literal["equal", "ramp"], betas: list[float], perturbed: bool) -> None:
    rows = segment()
    start = rows.start + 0.5 if perturbed else rows.start
    targets = intermediate_matching(rows, start, 20, "paper", scale)
    assert list(targets) == [6, 13, 20]
    for (target, weight), beta, expected in zip(targets.values(), betas, rows.targets, strict=True):
        assert torch.equal(target, expected)
        assert weight == pytest.approx(beta / squared_distance(start, expected), rel=1e-5)


def test_perturbed_and_unperturbed_denominators_differ() -> None:
    rows = segment()
    weights = [
        intermediate_matching(rows, start, 20, "off", "equal")[20][1] for start in (rows.start, rows.start + torch.ones(9))
    ]
    assert abs(weights[0] - weights[1]) > 0.1 * weights[0]


def test_a_student_that_stays_at_its_start_loses_one_at_every_point() -> None:
    rows = segment()
    for target, weight in intermediate_matching(rows, rows.start, 20, "paper", "equal").values():
        assert weight * squared_distance(rows.start, target) == pytest.approx(1, rel=1e-5)


def test_the_final_match_alone_is_to_the_last_target_at_full_weight() -> None:
    rows = segment()
    targets = intermediate_matching(rows, rows.start, 20, "off", "ramp")
    assert list(targets) == [20]
    assert torch.equal(targets[20][0], rows.targets[-1])
    assert targets[20][1] * squared_distance(rows.start, rows.targets[-1]) == pytest.approx(1, rel=1e-5)


def weights() -> list[Tensor]:
    """A convolution, its bias, and a linear layer; filters of very different size."""
    generator = torch.Generator().manual_seed(7)
    conv = torch.randn(5, 3, 3, 3, generator=generator) * torch.logspace(-2, 2, 5).view(5, 1, 1, 1)
    return [conv, torch.randn(5, generator=generator), torch.randn(4, 20, generator=generator)]


def moved(form: Form, rho: float = 0.1, seed: int = 0) -> list[Tensor]:
    before = weights()
    after = perturb_weights(before, form, rho, seeding.generator(seed, "perturb"))
    return [a - b for a, b in zip(after, before, strict=True)]


@pytest.mark.parametrize("rho", [0.1, 0.5])
def test_the_papers_perturbation_moves_every_filter_by_rho_times_its_norm(rho: float) -> None:
    conv, bias, linear = moved("paper", rho)
    for step, weight in ((conv, weights()[0]), (linear, weights()[2])):
        for filter_step, filter_weight in zip(step, weight, strict=True):
            assert float(filter_step.norm()) == pytest.approx(rho * float(filter_weight.norm()), rel=1e-4)
    assert not bias.any()


def test_the_papers_perturbation_has_a_direction_of_its_own_for_every_filter() -> None:
    conv = moved("paper")[0].flatten(1)
    directions = conv / conv.norm(dim=1, keepdim=True)
    cosines = directions @ directions.t() - torch.eye(5)
    assert cosines.abs().max() < 0.8
    own = torch.cosine_similarity(conv, weights()[0].flatten(1))
    assert own.abs().max() < 0.8


def test_the_papers_perturbation_draws_normal_numbers() -> None:
    (after,) = perturb_weights([torch.ones(1, 40_000)], "paper", 1.0, seeding.generator(0, "perturb"))
    draw = (after - 1).flatten()  # normalised to the filter's norm 200, so entries have variance 1
    assert abs(float(draw.mean())) < 0.03
    assert float((draw**4).mean()) == pytest.approx(3, rel=0.1)


def test_the_released_perturbation_is_one_normalised_draw_a_layer_times_the_weight() -> None:
    conv, bias, linear = moved("released")
    assert float((conv / weights()[0]).norm()) == pytest.approx(1, rel=1e-3)
    assert not bias.any()
    assert not linear.any()
    noise = torch.randn(5, 3, 3, 3, generator=seeding.generator(0, "perturb"))
    torch.testing.assert_close(conv, noise / noise.norm() * weights()[0], rtol=1e-3, atol=1e-6)


def test_the_released_perturbation_takes_no_rho() -> None:
    assert torch.equal(moved("released", 0.1)[0], moved("released", 0.9)[0])


def test_the_released_perturbation_is_about_forty_times_weaker_on_a_published_layer() -> None:
    layer = torch.randn(128, 128, 3, 3, generator=torch.Generator().manual_seed(0))
    paper, released = (
        float((perturb_weights([layer], form, 0.1, seeding.generator(0, "perturb"))[0] - layer).norm())
        for form in ("paper", "released")
    )
    assert 36 < paper / released < 41  # 0.1 sqrt(128 * 128 * 9) = 38.4


def test_a_perturbation_that_is_off_changes_and_draws_nothing() -> None:
    generator = seeding.generator(0, "perturb")
    before = weights()
    after = perturb_weights(before, "off", 0.1, generator)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert torch.equal(generator.get_state(), seeding.generator(0, "perturb").get_state())


@pytest.mark.parametrize("form", ["paper", "released"])
def test_a_perturbation_leaves_its_argument_alone_and_follows_its_generator(form: Form) -> None:
    before, kept = weights(), weights()
    perturb_weights(before, form, 0.1, seeding.generator(0, "perturb"))
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    assert torch.equal(moved(form, seed=1)[0], moved(form, seed=1)[0])
    assert not torch.equal(moved(form, seed=1)[0], moved(form, seed=2)[0])
