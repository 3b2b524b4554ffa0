"""One step of each method that uses batches of real images, against the same step in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dstill.config.settings import Recipe
from dstill.data import preprocess as preprocessing
from dstill.data import siamese
from dstill.data.real import RealSet
from dstill.distillation.loop import make_method
from dstill.methods.base import Problem, State
from dstill.methods.batches import ClassBatches
from dstill.methods.cafe import Cafe, CafeConfig
from dstill.nets import networks as nets

DSA = "colour_crop_cutout_flip_scale_rotate"
CLASSES, EACH = 3, 20  # of `tiny_real`; batches are larger, so that every real image is in every batch


STEP: dict[str, Any] = {"lr_images": 0.5, "image_momentum": 0.0, "initialisation": "random"}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem_of(real: RealSet, method: str, ipc: int = 2, **settings: Any) -> Problem:
    recipe = Recipe.model_validate(
        {
            "data": "tiny",
            "method": method,
            "ipc": ipc,
            "augmentation": DSA,
            "net": {"width": 4, "depth": 2},
            "distill": settings,
        }
    )
    return Problem(real, preprocessing.fit("standardise", real.train.images), recipe, None, torch.device("cpu"), 0)


def real_images(problem: Problem, c: int) -> Tensor:
    train = problem.real.train
    return problem.preprocess.forward(train.images[train.labels == c].float() / 255)


def drawn(problem: Problem, c: int, images: Tensor, draws: torch.Generator, strategy: str = DSA) -> tuple[Tensor, Tensor]:
    """All real and synthetic images of a class, augmented by one draw."""
    ipc = problem.recipe.ipc
    torch.randperm(EACH, generator=draws)
    params = siamese.sample(strategy, ipc, draws, shared=True)
    return siamese.apply(real_images(problem, c), params), siamese.apply(images[c * ipc : (c + 1) * ipc], params)


def assert_moved(state: State, before: Tensor, gradient: Tensor, lr: float = 0.5) -> None:
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(state["images"], before - lr * gradient, rtol=1e-3, atol=1e-5)


def test_dm_moves_mean_features_of_a_new_network_every_time_under_one_augmentation(tiny_real: RealSet) -> None:
    problem = problem_of(tiny_real, "dm", **STEP)
    method = make_method(problem)
    state = method.initialise(generator(0))
    for iteration in range(3):
        before = state["images"].clone().requires_grad_()
        row = method.step(state, iteration, generator(iteration))
        draws = generator(iteration)
        net = problem.fresh_network(draws).eval()
        loss = torch.zeros(())
        for c in range(CLASSES):
            real, synthetic = drawn(problem, c, before, draws)
            loss = loss + (nets.features(net, real).mean(0) - nets.features(net, synthetic).mean(0)).square().sum()
        assert row["loss"] == pytest.approx(float(loss.detach()) / CLASSES, rel=1e-3)
        assert_moved(state, before.detach(), torch.autograd.grad(loss, before)[0])


def row_distance(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    pairs = [(a.flatten(1), b.flatten(1)) for a, b in zip(ours, theirs, strict=True) if a.dim() > 1]
    return torch.stack([(1 - F.cosine_similarity(a, b, dim=1)).sum() for a, b in pairs]).sum()


@pytest.mark.parametrize(("method", "strategy"), [("dsa", DSA), ("dc", "none")])
def test_gradients_are_matched_along_the_training_of_the_network(tiny_real: RealSet, method: str, strategy: str) -> None:
    problem = problem_of(tiny_real, method, **STEP, outer_steps=2, inner_epochs=1, lr_net=0.5)
    running = make_method(problem)
    state = running.initialise(generator(0))
    images = state["images"].clone()
    row = running.step(state, 0, generator(7))

    draws, distances = generator(7), list[float]()
    net = problem.fresh_network(draws)
    parameters = list(net.parameters())
    for k in range(2):
        leaf, total = images.clone().requires_grad_(), torch.zeros(())
        for c in range(CLASSES):
            batches = drawn(problem, c, leaf, draws, strategy)
            losses = [F.cross_entropy(net(batch), torch.full((len(batch),), c)) for batch in batches]
            of_real, of_synthetic = (list(torch.autograd.grad(loss, parameters, create_graph=True)) for loss in losses)
            total = total + row_distance(of_synthetic, [g.detach() for g in of_real])
        distances.append(float(total.detach()) / CLASSES)
        images = images - 0.5 * torch.autograd.grad(total, leaf)[0]
        if k == 0:
            rows = torch.randperm(len(images), generator=draws)
            some = siamese.apply(images[rows], siamese.sample(strategy, len(rows), draws))
            gradients = torch.autograd.grad(F.cross_entropy(net(some), problem.labels()[rows]), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.5 * gradient
    assert [row["loss_first"], row["loss_last"]] == pytest.approx(distances, rel=1e-3)
    torch.testing.assert_close(state["images"], images, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("iteration", "halvings"), [(0, 0), (5, 1), (9, 2)])
def test_cafe_aligns_every_layer_by_its_weight_and_discriminates(tiny_real: RealSet, iteration: int, halvings: int) -> None:
    settings = {**STEP, "iterations": 10, "halve_at": (0.5, 0.9), "max_outer": 1, "augment": True, "lr_images": 0.02}
    weights = {"deep_weight": 0.7, "shallow_weight": 0.2, "discrimination": 0.05}
    problem = problem_of(tiny_real, "cafe", **settings, **weights)
    method = make_method(problem)
    state = method.initialise(generator(0))
    before = state["images"].clone().requires_grad_()
    row = method.step(state, iteration, generator(3))

    draws = generator(3)
    net, features, centres = problem.fresh_network(draws), list[Tensor](), list[Tensor]()
    loss = torch.zeros(())
    for c in range(CLASSES):
        real, synthetic = (nets.layers(net, batch) for batch in drawn(problem, c, before, draws))
        gaps = [(a.detach().mean(0) - b.mean(0)).square().sum() for a, b in zip(real, synthetic, strict=True)]
        first, last, flat = gaps
        loss = loss + 0.2 * first + 0.7 * last + 0.7 * flat + flat
        features.append(real[-1].detach())
        centres.append(synthetic[-1].mean(0))
    products = torch.cat(features) @ torch.stack(centres).t()
    wanted = torch.arange(CLASSES).repeat_interleave(EACH)
    loss = loss + 0.05 * F.cross_entropy(products, wanted, reduction="sum")
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-3)
    assert_moved(state, before.detach(), torch.autograd.grad(loss, before)[0], 0.02 * 0.5**halvings)


def test_cafe_goes_on_to_another_network_once_the_query_has_settled(tiny_real: RealSet) -> None:
    settings = {"lr_images": 0.02, "window": 3, "max_outer": 6, "max_inner": 3}
    for settled, updates in ((1.1, 3), (1e-9, 6)):
        method = make_method(problem_of(tiny_real, "cafe", lr_net=0.5, settled=settled, **settings))
        assert method.step(method.initialise(generator(0)), 0, generator(3))["updates"] == updates


def test_cafe_trains_its_network_until_the_query_has_moved(tiny_real: RealSet, monkeypatch: pytest.MonkeyPatch) -> None:
    # Accuracy after the first update; after each pass of the training, which moves with the fourth; after the second update.
    said = iter([0.5, 0.5, 0.6, 0.5, 0.9, 0.5])
    monkeypatch.setattr(Cafe, "_query", lambda *_: next(said))
    settings = {"lr_images": 0.02, "window": 2, "moved": 0.3, "settled": 1.1, "max_outer": 5, "max_inner": 10}
    method = make_method(problem_of(tiny_real, "cafe", **settings))
    assert method.step(method.initialise(generator(0)), 0, generator(3))["updates"] == 2
    assert next(said, None) is None


@pytest.mark.parametrize("method", ["dm", "dsa", "cafe"])
def test_images_keep_their_momentum_from_step_to_step(tiny_real: RealSet, method: str) -> None:
    once = {"dm": {}, "dsa": {"outer_steps": 1}, "cafe": {"max_outer": 1}}[method]
    with_it, without = (
        make_method(problem_of(tiny_real, method, **{**STEP, "lr_images": 0.1, **once, "image_momentum": momentum}))
        for momentum in (0.75, 0.0)
    )
    state = with_it.initialise(generator(0))
    images = [state["images"].clone()]
    for iteration in range(2):
        plain = {"images": images[-1].clone(), "images.momentum": torch.zeros_like(images[-1])}
        without.step(plain, iteration, generator(iteration))
        with_it.step(state, iteration, generator(iteration))
        carried = 0.75 * (images[-1] - images[-2]) if iteration else 0.0
        torch.testing.assert_close(state["images"], plain["images"] + carried, rtol=1e-4, atol=1e-5)
        images.append(state["images"].clone())
    assert (images[1] - images[0]).abs().max() > 1e-3


def test_batches_of_a_class_are_distinct_images_as_many_as_are_asked_for(tiny_real: RealSet) -> None:
    problem = problem_of(tiny_real, "cafe", batch_real=8)
    batches = ClassBatches(problem, problem.settings(CafeConfig))
    for size, count in ((None, 8), (5, 5), (12, 12), (100, EACH)):
        batch = batches.real(1, generator(0), size)
        assert len(batch.flatten(1).unique(dim=0)) == len(batch) == count
        assert all(bool((real_images(problem, 1) == one).flatten(1).all(1).any()) for one in batch)


def frepo(real: RealSet, **settings: Any) -> Problem:
    net = {"name": "convnet", "width": 4, "depth": 2, "norm": "none"}
    pool = {"pool": 2, "max_age": 4, "net": net, "lr_net": 0.01}
    return problem_of(real, "frepo", batch_real=30, lr=0.1, **{**pool, **settings})


def member(problem: Problem, weights: Tensor) -> nn.Module:
    net = problem.fresh_network(generator(0), problem.recipe.distill.net)  # type: ignore[attr-defined]
    nn.utils.vector_to_parameters(weights.clone(), net.parameters())
    return net


@pytest.mark.parametrize(("flip", "certainty"), [(False, 1.0), (True, 1.0), (False, 0.1)])
def test_frepo_regresses_real_labels_on_features_of_the_pool_and_trains_it(
    tiny_real: RealSet, flip: bool, certainty: float
) -> None:
    """The margin asks for nothing where labels are certain; so some are not."""
    problem = frepo(tiny_real, flip=flip)
    method = make_method(problem)
    state = method.initialise(generator(0))
    state["labels"] = certainty * state["labels"]
    assert state["pool.age"].tolist() == [0, 2], "one starts trained, as if it were older"
    before = {name: tensor.clone() for name, tensor in state.items()}
    row = method.step(state, 0, generator(3))

    draws = generator(3)
    i = int(torch.randint(2, (), generator=draws))
    assert i == 0, "a fresh member, without moments of Adam yet"
    rows = torch.randint(CLASSES * EACH, (30,), generator=draws)
    net = member(problem, before["pool.weights"][i])
    images, labels = (before[name].clone().requires_grad_() for name in ("images", "labels"))
    real = nets.features(net, problem.preprocess.forward(tiny_real.train.images[rows].float() / 255)).detach().double()
    shown, told = (torch.cat([images, images.flip(3)]), torch.cat([labels, labels])) if flip else (images, labels)
    features = nets.features(net, shown).double()
    kernel = features @ features.t()
    kernel = kernel + 1e-6 * kernel.diagonal().mean() * torch.eye(len(kernel))
    predicted = real @ features.t() @ torch.linalg.solve(kernel, told.double())
    targets = F.one_hot(tiny_real.train.labels[rows], CLASSES) - 1 / CLASSES
    error = (predicted - targets).square().mean()
    top = labels.topk(2, dim=1).values
    margin = -(top[:, 0] - top[:, 1]).clamp_max(1 / CLASSES).mean()
    assert (row["loss"], row["margin"]) == pytest.approx((float(error.detach()), float(margin.detach())), rel=1e-3)
    for name, gradient in zip(("images", "labels"), torch.autograd.grad(error + margin, (images, labels)), strict=True):
        torch.testing.assert_close(state[f"{name}.first"], 0.1 * gradient, rtol=2e-2, atol=1e-5)
        assert not torch.equal(state[name], before[name])

    torch.randperm(len(images), generator=draws)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    (net(state["images"]) - state["labels"]).square().mean().backward()
    optimiser.step()
    trained = nn.utils.parameters_to_vector(net.parameters()).detach()
    torch.testing.assert_close(state["pool.weights"][i], trained, rtol=1e-3, atol=1e-4)
    assert state["pool.age"][i] == before["pool.age"][i] + 1
    assert torch.equal(state["pool.weights"][1 - i], before["pool.weights"][1 - i])


def test_frepo_replaces_a_member_that_is_too_old(tiny_real: RealSet) -> None:
    method = make_method(frepo(tiny_real, pool=1))
    state = method.initialise(generator(0))
    ages = [method.step(state, k, generator(k))["age"] for k in range(7)]
    assert ages == [0, 1, 2, 3, 4, 5, 0]
