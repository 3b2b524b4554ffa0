"""Back-propagation through training against plain autograd, and every setting of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dstill.config.settings import NetConfig, Recipe
from dstill.data import preprocess as preprocessing
from dstill.data import siamese
from dstill.data.catalog import Shape
from dstill.data.real import RealSet
from dstill.errors import CollapseError
from dstill.methods.base import Problem, State
from dstill.methods.batches import RealBatches
from dstill.methods.bptt import Bptt, BpttConfig, real_loss
from dstill.methods.drawing import Drawn, Told
from dstill.methods.learned_labels import label_logits, one_hot_start, through_logits
from dstill.methods.rat_bptt import RatBpttConfig
from dstill.support import seeding
from dstill.unrolling.student import Student

SMALL = {"iterations": 10, "total_steps": 5, "window": 3, "batch_real": 12, "alpha_init": 0.05, "lr_images": 0.01}


def problem_of(real: RealSet, *, method: str = "bptt", ipc: int = 2, augmentation: str = "flip", **settings: Any) -> Problem:
    kind = RatBpttConfig if method == "rat-bptt" else BpttConfig
    recipe = Recipe(
        data="tiny",
        method=method,
        ipc=ipc,
        net=NetConfig(width=4, depth=2),
        augmentation=augmentation,
        distill=kind(**{**SMALL, **settings}),
    )
    return Problem(real, preprocessing.fit("standardise", real.train.images), recipe, None, torch.device("cpu"), 0)


def started(problem: Problem) -> tuple[Bptt, State]:
    method = Bptt()
    method.start(problem)
    return method, method.initialise(seeding.generator(0, "initialise"))


def updated(method: Bptt, state: State, iteration: int, gradients: dict[str, Tensor]) -> dict[str, float]:
    """An update by one draw with these gradients."""
    told = Told.of(0, Told.parcel(Drawn(gradients, {"loss": 1.0})), torch.device("cpu"))
    return method.update(state, iteration, [told], lambda drawn: gradients)


def naive_draw(problem: Problem, state: State, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """The outer loss of one training and its gradients, by a loop that keeps every step's graph."""
    settings = problem.settings(BpttConfig)
    start = settings.total_steps - settings.differentiated
    if settings.window_start == "random":
        start = int(torch.randint(start + 1, (), generator=generator))
    net = problem.fresh_network(generator)
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()

    def loss_of(theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(net, weights, (images,)), labels)

    learned = {name: state[name].clone().requires_grad_() for name in ("images", "labels", "log_alpha") if name in state}
    targets = problem.labels()
    if "labels" in learned:
        # At 0 the derivative is that at 1e-4, so that a label can leave 0.
        positive = learned["labels"] + (learned["labels"].clamp_min(1e-4) - learned["labels"]).detach()
        targets = positive / positive.sum(1, keepdim=True)
    first, second = torch.zeros_like(theta), torch.zeros_like(theta)
    draws = []
    while len(draws) < start + settings.differentiated:
        order = torch.randperm(len(state["images"]), generator=generator)
        for rows in order.split(settings.batch_syn or len(order))[: start + settings.differentiated - len(draws)]:
            draws.append((rows, siamese.sample(problem.recipe.augmentation, len(rows), generator)))
    for n, (rows, params) in enumerate(draws, 1):
        theta = theta if theta.requires_grad else theta.requires_grad_()
        loss = loss_of(theta, siamese.apply(learned["images"][rows], params), targets[rows])
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
        alpha = torch.tensor(settings.alpha_init)
        if "log_alpha" in learned:
            alpha = (learned["log_alpha"] if learned["log_alpha"].ndim == 0 else learned["log_alpha"][n - 1]).exp()
        if settings.optimiser == "sgd":
            first = settings.student_momentum * first + gradient + settings.student_weight_decay * theta
            theta = theta - alpha * first
        else:
            theta = theta * (1 - alpha * settings.student_weight_decay)
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            # The conv biases' gradients are zero up to rounding, which the square root would turn into infinite slopes.
            root = torch.where(second > 1e-18, second, 1e-18).sqrt() / math.sqrt(1 - 0.999**n)
            theta = theta - alpha / (1 - 0.9**n) * torch.where(second > 1e-18, first, 0) / (root + 1e-8)
        if n <= start:
            theta, first, second = theta.detach(), first.detach(), second.detach()
    images, labels = RealBatches(problem, settings.batch_real).draw(generator)
    real = siamese.apply(images, siamese.sample(problem.recipe.augmentation, len(images), generator))
    outer = loss_of(theta, real, labels)
    gradients = torch.autograd.grad(outer, list(learned.values()), materialize_grads=True)
    return outer.detach(), dict(zip(learned, gradients, strict=True))


SETTINGS: list[dict[str, Any]] = [
    {"learn_alpha": "off"},
    {"learn_alpha": "each", "window": None},
    {"learn_alpha": "one", "window_start": "random", "soft_labels": "learned"},
    {"optimiser": "adam", "learn_alpha": "off", "alpha_init": 0.01, "window_start": "random"},
    {"learn_alpha": "each", "draws": 3, "draw_scaling": "none", "clip": 2.0, "batch_syn": 4},
    {"learn_alpha": "one", "student_momentum": 0.9, "student_weight_decay": 0.1},
    {"optimiser": "adamw", "student_weight_decay": 0.1, "learn_alpha": "off", "alpha_init": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_equals_adam_on_the_gradients_of_a_naive_loop(tiny_real: RealSet, settings: dict[str, Any]) -> None:
    problem = problem_of(tiny_real, **settings)
    config = problem.settings(BpttConfig)
    method, state = started(problem)
    before = {name: tensor.clone() for name, tensor in state.items()}
    row = method.step(state, 0, seeding.generator(0, "step"))
    generators = [seeding.generator(0, "step"), *(seeding.generator(0, "step", 0, k) for k in range(1, config.draws))]
    draws = [naive_draw(problem, before, generator) for generator in generators]
    assert row["loss"] == pytest.approx(sum(float(loss) for loss, _ in draws) / len(draws), rel=1e-5)
    sizes = {"images": config.lr_images, "labels": config.lr_labels, "log_alpha": config.lr_alpha}
    for name in draws[0][1]:
        gradient = torch.stack([by[name] for _, by in draws]).mean(0)
        torch.testing.assert_close(state[f"{name}.first"], 0.1 * gradient, rtol=1e-3, atol=2e-4 * float(gradient.abs().max()))
        stepped = before[name].clone()
        adam = torch.optim.Adam([stepped], lr=sizes[name])
        stepped.grad = state[f"{name}.first"] / 0.1
        adam.step()
        torch.testing.assert_close(state[name], stepped.clamp_min(0) if name == "labels" else stepped, rtol=1e-4, atol=1e-5)


def test_rates_before_the_window_get_no_gradient(tiny_real: RealSet) -> None:
    method, state = started(problem_of(tiny_real, learn_alpha="each"))
    method.step(state, 0, seeding.generator(1, "step"))
    assert [n for n in range(5) if float(state["log_alpha.first"][n]) != 0] == [2, 3, 4]


def test_settings_that_would_have_no_effect_or_hurt_are_refused() -> None:
    for wrong, message in (
        ({"window": 40}, "must not exceed total_steps"),
        ({"grow_over": 10}, "set a window below total_steps"),
        ({"window": 5, "window_start": "random"}, "learn_alpha each"),
        ({"window": 5, "grow_over": 10}, "learn_alpha each"),
        ({"optimiser": "adam", "student_momentum": 0.9}, "adam has its own"),
    ):
        with pytest.raises(ValueError, match=message):
            BpttConfig(**wrong)


def test_labels_and_rates_shrink_with_the_gradient_of_the_images(tiny_real: RealSet) -> None:
    method, state = started(problem_of(tiny_real, clip=1.5, learn_alpha="one", soft_labels="learned"))
    for scale, factor in ((1.0, 1.0), (10.0, 0.15)):
        before = {name: state[f"{name}.first"].clone() for name in ("images", "labels", "log_alpha")}
        gradients = {name: torch.full_like(state[name], scale) for name in before}
        assert updated(method, state, 0, gradients)["taken"]
        for name, first in before.items():
            entered = (state[f"{name}.first"] - 0.9 * first) / 0.1
            torch.testing.assert_close(entered, torch.full_like(entered, scale * factor), rtol=1e-4, atol=0)


def test_the_window_starts_everywhere_and_training_grows(tiny_real: RealSet) -> None:
    method, _ = started(problem_of(tiny_real, window_start="random", total_steps=9, grow_over=10, learn_alpha="off"))
    starts = [{method._window_start(i, torch.Generator().manual_seed(k)) for k in range(60)} for i in (0, 5, 10, 99)]
    assert starts == [{0}, set(range(4)), set(range(7)), set(range(7))]
    last, _ = started(problem_of(tiny_real, total_steps=9))
    assert {last._window_start(0, torch.Generator().manual_seed(k)) for k in range(9)} == {6}


def test_gradients_are_clipped_by_their_running_norm(tiny_real: RealSet) -> None:
    method, state = started(problem_of(tiny_real, clip=1.5, learn_alpha="off"))
    gradient = torch.ones_like(state["images"])
    size = float(gradient.norm())
    for scale, norm, running in ((1.0, 1.0, 1.0), (4.0, 1.5, 1.05), (0.5, 0.5, 0.995)):
        first = state["images.first"].clone()
        gradients = {"images": scale * gradient}
        assert updated(method, state, 0, gradients)["taken"]
        entered = (state["images.first"] - 0.9 * first) / 0.1
        assert float(entered.norm()) == pytest.approx(norm * size, rel=1e-4)
        assert float(state["norm"]) == pytest.approx(running * size, rel=1e-4)


def test_the_cosine_ends_at_a_hundredth_and_the_average_follows_the_images(tiny_real: RealSet) -> None:
    method, state = started(problem_of(tiny_real, schedule="cosine", image_ema=0.75, learn_alpha="off"))
    start = state["images"].clone()
    assert [round(method._slowed(i), 4) for i in (0, 5, 10)] == [1.0, 0.505, 0.01]
    method.step(state, 5, seeding.generator(0, "step"))
    assert float((state["images"] - start).abs().max()) == pytest.approx(0.00505, rel=1e-2)
    torch.testing.assert_close(state["images.average"], 0.75 * start + 0.25 * state["images"])
    assert torch.equal(method.result(state).images, state["images.average"])
    constant, _ = started(problem_of(tiny_real))
    assert constant._slowed(10) == 1.0


def test_a_step_that_is_not_finite_is_skipped_and_too_many_end_the_run(tiny_real: RealSet) -> None:
    method, state = started(problem_of(tiny_real, learn_alpha="off", max_skip_share=0.5))
    method.step(state, 0, seeding.generator(0, "step"))
    before = {name: tensor.clone() for name, tensor in state.items()}
    bad = {"images": torch.full_like(state["images"], math.nan)}
    assert not updated(method, state, 1, bad)["taken"]
    assert int(state["skipped"]) == 1
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items() if name != "skipped")
    with pytest.raises(
        CollapseError, match=r"were not finite, more than the 50% allowed: lower distill\.lr_images or alpha_init"
    ):
        for i in range(2, 30):
            updated(method, state, i, bad)
    assert int(state["skipped"]) == 10


def test_no_learned_quantity_is_ruined_by_one_that_is_not_finite(tiny_real: RealSet) -> None:
    method, state = started(problem_of(tiny_real, learn_alpha="one", clip=2.0))
    for images, rate in ((1.0, math.inf), (1e30, 1.0)):
        gradients = {"images": torch.full_like(state["images"], images), "log_alpha": torch.tensor(rate)}
        assert not updated(method, state, 0, gradients)["taken"]
    assert torch.isfinite(state["images"]).all() and torch.isfinite(state["norm"])


def test_the_average_of_learned_labels_is_the_result(tiny_real: RealSet) -> None:
    method, state = started(problem_of(tiny_real, soft_labels="learned", image_ema=0.75, learn_alpha="off", lr_labels=0.1))
    before = state["labels"].clone()
    method.step(state, 0, seeding.generator(0, "step"))
    average = 0.75 * before + 0.25 * state["labels"]
    torch.testing.assert_close(method.result(state).labels, label_logits(average))


def test_the_memory_of_prepared_images_and_blocks_is_counted(tiny_real: RealSet) -> None:
    recipe, shape = problem_of(tiny_real, window=1).recipe, Shape(3, (8, 8), 3, 10**6)
    device = torch.device("cpu")
    few, many = (Bptt.peak_bytes(recipe, shape._replace(train=n), device) for n in (1000, 2000))
    assert many - few == 2 * 4 * 3 * 8 * 8 * 1000
    more = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"batch_real": 1012})})
    grown = Bptt.peak_bytes(more, shape._replace(train=1000), device) - few
    kept = Student(problem_of(tiny_real).network()).kept_bytes(torch.zeros(1), 1)
    assert kept is not None and grown == 1000 * 2 * 4 * 3 * 8 * 8 + (1000 - 12) * 2 * kept


def test_the_learned_rate_is_the_sets_own_only_if_networks_can_use_it(tiny_real: RealSet) -> None:
    for optimiser, alpha in (("sgd", 0.05), ("adam", None)):
        method, state = started(problem_of(tiny_real, optimiser=optimiser, learn_alpha="off"))
        assert method.result(state).alpha == alpha
    method, state = started(problem_of(tiny_real, learn_alpha="each"))
    state["log_alpha"] = torch.log(torch.tensor([0.1, 0.1, 0.1, 0.1, 1e-4]))
    assert method.result(state).alpha == pytest.approx(0.1 ** (4 / 5) * 1e-4 ** (1 / 5))


def test_real_images_in_blocks_give_the_loss_of_all(tiny_real: RealSet, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(tiny_real)
    student, images, labels = Student(problem.network()), problem.prepared(torch.arange(20)), tiny_real.train.labels[:20]
    theta = nn.utils.parameters_to_vector(problem.network().parameters()).detach()
    whole = real_loss(student, images, labels)(theta)
    monkeypatch.setattr("dstill.methods.bptt._BLOCK", 7)
    for some, all_ in zip(real_loss(student, images, labels)(theta), whole, strict=True):
        torch.testing.assert_close(some, all_, rtol=1e-5, atol=1e-7)
    assert float(whole[0]) == pytest.approx(float(student.loss(theta, images, labels)), rel=1e-5)


def test_batches_are_the_same_whether_or_not_all_images_fit_into_memory(
    tiny_real: RealSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = problem_of(tiny_real)
    kept = RealBatches(problem, 10)
    monkeypatch.setattr("dstill.methods.batches.total_memory", lambda device: 1.0)
    read = RealBatches(problem, 10)
    assert kept.prepared is not None and read.prepared is None
    (images, labels), (same, ids) = (batches.draw(seeding.generator(3, "real")) for batches in (kept, read))
    assert torch.equal(images, same) and torch.equal(labels, ids) and len(labels) == 10
    assert sorted(torch.bincount(labels).tolist()) == [3, 3, 4], "each class has its share"
    others = {tuple(kept.draw(torch.Generator().manual_seed(k))[0].flatten().tolist()) for k in range(5)}
    assert len(others) == 5
    assert len(RealBatches(problem, 10**6).draw(torch.Generator())[1]) == len(tiny_real.train)


def test_shares_follow_the_sizes_of_the_classes_and_no_image_comes_twice(tiny_real: RealSet) -> None:
    kept = torch.cat([rows[:count] for rows, count in zip(tiny_real.train.by_class(3), (4, 8, 20), strict=True)])
    real = replace(tiny_real, train=tiny_real.train.take(kept), fingerprint="")
    batches = RealBatches(problem_of(real), 16)
    seen = torch.zeros(3)
    for k in range(20):
        images, labels = batches.draw(torch.Generator().manual_seed(k))
        counts = torch.bincount(labels, minlength=3)
        assert (counts - torch.tensor([2, 4, 10])).abs().max() <= 1
        assert len({tuple(image.flatten().tolist()) for image in images}) == 16
        seen += counts
    torch.testing.assert_close(seen / seen.sum(), torch.tensor([0.125, 0.25, 0.625]), rtol=0.1, atol=0)


def test_unit_noise_has_norm_one_in_every_image(tiny_real: RealSet) -> None:
    _, state = started(problem_of(tiny_real, initialisation="unit-noise"))
    torch.testing.assert_close(state["images"].flatten(1).norm(dim=1), torch.ones(6))


def test_learned_labels_are_normalised_and_their_gradient_is_that_of_the_probabilities() -> None:
    labels = torch.tensor([[3.0, 1.0, 0.0], [0.2, 0.2, 0.4]], dtype=torch.float64)
    torch.testing.assert_close(label_logits(labels).softmax(1)[1], torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))
    inside = labels.clamp_min(1e-4).requires_grad_()
    weights = torch.tensor([[1.0, -2.0, 0.5], [0.3, 2.0, -1.0]], dtype=torch.float64)
    (direct,) = torch.autograd.grad((weights * inside / inside.sum(1, keepdim=True)).sum(), inside)
    logits = label_logits(labels).requires_grad_()
    (by_logits,) = torch.autograd.grad((weights * logits.softmax(1)).sum(), logits)
    torch.testing.assert_close(through_logits(labels, by_logits), direct)
    assert one_hot_start(torch.tensor([1, 0]), 2).tolist() == [[0.0, 1.0], [1.0, 0.0]]


def test_rat_bptt_has_the_published_settings() -> None:
    settings = RatBpttConfig()
    assert (settings.total_steps, settings.window, settings.window_start) == (200, 60, "random")
    assert (settings.optimiser, settings.alpha_init, settings.lr_images, settings.clip) == ("adam", 1e-3, 1e-3, 2.0)
    assert (settings.batch_real, settings.initialisation, settings.learn_alpha) == (5000, "unit-noise", "off")


def test_quicker_forms_start_where_little_time_goes_furthest() -> None:
    published = RatBpttConfig()
    one, ten = published.quicker(1), published.quicker(10)
    assert one is not None
    assert ten is not None
    assert (one.total_steps, one.window, one.batch_real, one.soft_labels) == (40, 20, 1024, "off")
    assert (one.initialisation, one.lr_images) == ("unit-noise", 5e-3)
    assert (ten.initialisation, ten.lr_images) == ("random", 3e-2)
    forms = [one]
    while (quicker := forms[-1].quicker(1)) is not None:
        forms.append(quicker)
    assert [(form.total_steps, form.window, form.batch_real) for form in forms] == [(40, 20, 1024), (20, 10, 512), (10, 5, 256)]
    assert all(type(form).model_validate(form.model_dump()) == form for form in forms), "each is a form that a recipe may have"
