"""Stored images that hold several: steps equal plain autograd through decoding, they start from real images, costs count what
networks see, and methods that take images as they are refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from dstill.artifacts.distilled import DistilledSet
from dstill.config import recipes
from dstill.config.registry import methods
from dstill.config.settings import DistillConfig, NetConfig, Recipe, canonical, settings_class
from dstill.data import preprocess
from dstill.data.catalog import Shape
from dstill.data.formation import decode, encode
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories
from dstill.methods.base import Problem, State, method_class
from dstill.methods.batches import ClassBatches, train_on_synthetic
from dstill.methods.distribution_matching import DistributionMatchingConfig
from dstill.methods.gradient_matching import GradientMatchingConfig
from dstill.methods.initialisation import classified_rows, initial_images, random_rows, representative_rows
from dstill.methods.trajectory_matching import TrajectoryMatching
from dstill.support import seeding

MakeProblem = Callable[..., Problem]
STEPPING = [name for name in sorted(methods()) if methods()[name].family != "selection"]
SELECTING = [name for name in sorted(methods()) if methods()[name].family == "selection"]
SHAPE = Shape(3, (8, 8), 3, 60, 30)
CPU = torch.device("cpu")


def cut_and_enlarged(images: Tensor, parts: int) -> Tensor:
    """Decoding in torch's own terms, for autograd."""
    cells = [cell for band in images.tensor_split(parts, 2) for cell in band.tensor_split(parts, 3)]
    return torch.stack([F.interpolate(cell, size=images.shape[2:], mode="bilinear") for cell in cells], 1).flatten(0, 1)


def by_hand(problem: Problem, state: State, soft: bool) -> tuple[Tensor, Tensor]:
    """Matching loss of five steps from expert 0's start to its epoch 3, and its gradient by the stored images."""
    assert problem.trajectories is not None
    rows, net = problem.trajectories.rows(0, 0, 4), problem.network()
    names, shapes = zip(*((name, p.shape) for name, p in net.named_parameters()), strict=True)

    def weights(theta: Tensor) -> dict[str, Tensor]:
        pieces = theta.split([shape.numel() for shape in shapes])
        return {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}

    stored = state["images"].clone().requires_grad_()
    images = cut_and_enlarged(stored, problem.recipe.distill.parts)
    labels = torch.arange(3).repeat_interleave(len(images) // 3)
    targets = functional_call(net, weights(rows[3]), (images,)).softmax(1) if soft else labels
    theta = rows[0].clone().requires_grad_()
    for _ in range(5):
        inner = F.cross_entropy(functional_call(net, weights(theta), (images,)), targets)
        theta = theta - state["alpha"] * torch.autograd.grad(inner, theta, create_graph=True)[0]
    loss = (theta - rows[3]).square().sum() / (rows[0] - rows[3]).square().sum()
    return loss.detach(), torch.autograd.grad(loss, stored)[0]


@pytest.mark.parametrize("soft_labels", ["off", "expert-differentiated"])
@pytest.mark.parametrize("parts", [2, 3])
def test_a_step_of_matching_equals_plain_autograd_through_decoding(
    make_problem: MakeProblem, trajectories: Trajectories, parts: int, soft_labels: str
) -> None:
    one = Trajectories(trajectories.folder, 1)
    problem = make_problem(ipc=2, experts=one, max_start_epoch=1, parts=parts, soft_labels=soft_labels)
    method = TrajectoryMatching()
    method.start(problem)
    state = method.initialise(seeding.generator(0, "initialise"))
    loss, gradient = by_hand(problem, state, soft_labels != "off")
    expected = state["images"] - 10.0 * gradient
    row = method.step(state, 0, seeding.generator(0, "step", 0))
    assert row["loss"] == pytest.approx(float(loss), rel=1e-4)
    assert row["image_gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-3)
    torch.testing.assert_close(state["images"], expected, rtol=1e-4, atol=1e-4)


def test_batches_of_a_class_hold_what_its_stored_images_hold_and_lead_back_to_them(make_problem: MakeProblem) -> None:
    problem = make_problem(ipc=2, parts=2)
    batches = ClassBatches(problem, DistributionMatchingConfig(augment=False))
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = batches.draw(1, images, torch.Generator().manual_seed(0))
    assert batch.rows.tolist() == [2, 3]
    torch.testing.assert_close(batch.synthetic, decode(images[2:4], 2))
    (gradient,) = torch.autograd.grad(batch.synthetic.sum(), batch.source)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 4.0), msg="each pixel weighs four enlarged ones")


def test_networks_between_updates_are_trained_on_what_the_images_hold(make_problem: MakeProblem) -> None:
    images, weights = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), list[Tensor]()
    for problem, given in ((make_problem(ipc=2, parts=2), images), (make_problem(ipc=8), decode(images, 2))):
        settings = GradientMatchingConfig(lr_net=0.1, batch_train=5)
        net = problem.fresh_network(torch.Generator().manual_seed(1))
        batches = ClassBatches(problem, settings)
        train_on_synthetic(net, given, batches, settings, 2, torch.Generator().manual_seed(2))
        weights.append(torch.nn.utils.parameters_to_vector(net.parameters()))
    assert torch.equal(*weights)


def test_the_start_is_made_of_real_images_shrunk_into_the_parts(make_problem: MakeProblem, tiny_real: RealSet) -> None:
    problem = make_problem(ipc=2, parts=2)
    stored = initial_images(problem, "random", seeding.generator(3, "start"))
    rows = random_rows(tiny_real.train, 3, 8, seeding.generator(3, "start"))
    assert len(set(rows.tolist())) == 24
    torch.testing.assert_close(stored, encode(problem.prepared(rows), 2))
    assert problem.labels().tolist() == [c for c in range(3) for _ in range(8)]
    for chosen in (
        representative_rows(problem, seeding.generator(3, "start"), released=False),
        classified_rows(problem, seeding.generator(3, "start")),
    ):
        assert tiny_real.train.labels[chosen].tolist() == problem.labels().tolist()
        assert len(set(chosen.tolist())) == 24
    assert initial_images(problem, "noise", seeding.generator(3, "start")).shape == (6, 3, 8, 8)


def started_from(problem: Problem, initial: DistilledSet) -> Tensor:
    return initial_images(replace(problem, initial=initial), "noise", torch.Generator())


def test_another_set_is_taken_as_it_is_stored_or_as_networks_see_it(make_problem: MakeProblem, tiny_real: RealSet) -> None:
    problem, plain = make_problem(parts=2), make_problem(ipc=4)
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    of_parts = problem.result(images, problem.labels(), None)
    assert torch.equal(started_from(problem, of_parts), images)
    assert torch.equal(started_from(plain, of_parts), decode(images, 2)), "four images of a class from one of 2x2"
    assert torch.equal(started_from(problem, of_parts.decoded), encode(decode(images, 2), 2)), "and one from four"
    soft = replace(of_parts, labels=torch.zeros(12, 3))
    assert torch.equal(started_from(problem, soft), images)
    whitened = replace(of_parts, preprocess=preprocess.fit("zca", tiny_real.train.images))
    seen = problem.preprocess.forward(whitened.preprocess.invert(decode(images, 2)))
    torch.testing.assert_close(started_from(problem, whitened), encode(seen, 2), msg="whitening is undone image by image")
    with pytest.raises(DstillError, match="2 of"):
        started_from(make_problem(ipc=2), of_parts)


@pytest.mark.parametrize("method", STEPPING)
def test_memory_is_that_of_as_many_images_as_networks_see(method: str) -> None:
    fields = settings_class(method).model_fields
    changes = ["net.width=8", "net.depth=2", *(["distill.batch_real=2"] if "batch_real" in fields else [])]
    changes += ["distill.memory=keep"] if "memory" in fields else []
    base, _ = recipes.resolve("smoke", "tiny", SHAPE, method=method, ipc=1, changes=changes)

    def peak(ipc: int, parts: int) -> float:
        recipe = base.model_copy(update={"ipc": ipc, "distill": base.distill.model_copy(update={"parts": parts})})
        return method_class(method).peak_bytes(recipe, SHAPE, CPU)

    assert peak(ipc=1, parts=1) < peak(ipc=1, parts=3) == peak(ipc=9, parts=1)


def test_gradient_matching_keeps_the_loops_of_the_stored_ipc() -> None:
    one, four = settings_class("dsa")(batch_train=1), settings_class("dsa")(parts=2, batch_train=1)  # type: ignore[call-arg]
    times = [[passes.times for passes in each.work(ipc=ipc, classes=3)] for each, ipc in ((one, 10), (four, 40))]
    assert times[0][:3] == times[1][:3] and times[1][3] == 4 * times[0][3]


@pytest.mark.parametrize("method", SELECTING)
def test_methods_that_take_images_as_they_are_refuse(method: str) -> None:
    with pytest.raises(DstillError, match=r"parts is for methods that optimise images.*leave it at 1"):
        recipes.resolve("smoke", "tiny", SHAPE, method=method, ipc=1, changes=["distill.parts=2"])
    found, _ = recipes.resolve("smoke", "tiny", SHAPE, method=method, ipc=1, changes=["distill.parts=1"])
    assert found.decoded_ipc == 1


def test_a_method_of_another_package_has_to_say_that_it_decodes() -> None:
    class Theirs(DistillConfig):
        pass

    class Ours(DistillConfig):
        optimises_images = True

    assert Ours(parts=2).parts == 2
    with pytest.raises(ValueError, match="leave it at 1"):
        Theirs(parts=2)


def test_settings_without_parts_are_written_as_before_there_were_any() -> None:
    def recipe(**settings: Any) -> Recipe:
        return Recipe(data="tiny", method="mtt", ipc=1, net=NetConfig(width=4), distill=settings)  # type: ignore[arg-type]

    assert "parts" not in canonical(recipe())["distill"] and "parts" not in canonical(recipe(parts=1))["distill"]
    two = recipe(parts=2)
    assert canonical(two)["distill"] == {**canonical(recipe())["distill"], "parts": 2}
    assert Recipe.model_validate(canonical(two)) == two and two.decoded_ipc == 4
    assert recipes.changed(two, ["distill.parts=1"], "here") == recipe()
