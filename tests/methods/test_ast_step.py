"""Whole steps of AST against Algorithm 2 (lines 4-18) and Eqs. 20-23, written out in plain autograd and float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from dstill.data import siamese
from dstill.experts.trajectory import Trajectories
from dstill.methods.base import Metrics, Problem
from dstill.methods.trajectory_matching import TrajectoryMatching
from dstill.support import seeding

DSA = "colour_crop_cutout_flip_scale_rotate"
N, M, LAST = 8, 3, 3  # student steps, expert epochs of a segment, T+
IPC, CLASSES, BATCH = 3, 3, 4
LR_IMAGES, LR_ALPHA, MOMENTUM = 10.0, 1e-4, 0.5
RHO = 0.3
POINTS = {"paper": {2: 1, 5: 2, 8: 3}, "released": {2: 1, 4: 2, 8: 3}}


class Doubles(Trajectories):
    """Experts read in double precision, in which the whole step is then computed."""

    def rows(self, expert: int, start: int, stop: int) -> Tensor:
        return super().rows(expert, start, stop).double()


class Reference:
    """One step of Algorithm 2 by the paper's formulas. Draws in the documented order, from a generator of its own."""

    def __init__(self, problem: Problem, options: dict[str, Any]) -> None:
        assert problem.trajectories is not None
        self.problem, self.trajectories, self.options = problem, problem.trajectories, options
        self.net = problem.network()
        self.shapes = {name: parameter.shape for name, parameter in self.net.named_parameters()}

    def weights(self, theta: Tensor) -> dict[str, Tensor]:
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}

    def perturbed(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """Eq. 23; or the released form, once for each convolution."""
        parts: list[Tensor] = []
        for weight in self.weights(theta).values():
            if weight.ndim == 4 or (weight.ndim == 2 and self.options["perturbation"] == "paper"):
                d = torch.randn(weight.shape, generator=generator).double()
                if self.options["perturbation"] == "released":
                    weight = weight + d / d.norm() * weight
                else:
                    weight = torch.stack([w + RHO * e / e.norm() * w.norm() for w, e in zip(weight, d, strict=True)])
            parts.append(weight.flatten())
        theta = torch.cat(parts)
        share = self.options.get("dropout", 0.0)
        return theta * (torch.rand(len(theta), generator=generator) >= share) / (1 - share) if share else theta

    def balance(self, t: int) -> float:
        """Eq. 20."""
        base = {"paper": math.e, "released": 5.0}[self.options["balanced_loss"]]
        middle = LAST // 2 if self.options["balanced_loss"] == "released" else LAST / 2
        return math.log(abs(t - middle) + 8, base) if t >= middle else 1 / math.log(abs(middle - t) + 8, base)

    def step(self, images: Tensor, alpha: Tensor, generator: torch.Generator) -> tuple[Metrics, Tensor, Tensor]:
        """What is logged, and the gradients by the images and α."""
        expert = int(torch.randint(len(self.trajectories), (), generator=generator))  # line 4
        t = int(torch.randint(0, LAST, (), generator=generator))  # line 5
        experts = self.trajectories.rows(expert, t, t + M + 1)
        start = self.perturbed(experts[0], generator)  # line 6
        origin = start if self.options.get("denominator", "perturbed") == "perturbed" else experts[0]
        images, alpha = images.clone().requires_grad_(), alpha.clone().requires_grad_()
        soft = self.options.get("soft_labels", "off")
        labels = torch.arange(CLASSES).repeat_interleave(IPC)
        if soft != "off":
            labels = functional_call(self.net, self.weights(experts[M]), (images,)).softmax(1)
            labels = labels if soft == "expert-differentiated" else labels.detach()
        theta, velocity = start.clone().requires_grad_(), torch.zeros_like(start)
        queue, inner, total = list[int](), list[float](), torch.zeros((), dtype=torch.float64)
        for n in range(1, N + 1):  # lines 8-16
            queue = queue or torch.randperm(IPC * CLASSES, generator=generator).tolist()
            rows, queue = queue[:BATCH], queue[BATCH:]
            batch = siamese.apply(images[rows], siamese.sample(DSA, len(rows), generator))
            logits = functional_call(self.net, self.weights(theta), (batch,))
            loss = self.balance(t) * F.cross_entropy(logits, labels[rows])  # Eq. 21
            velocity = self.options["student_momentum"] * velocity + torch.autograd.grad(loss, theta, create_graph=True)[0]
            theta = theta - alpha * velocity
            inner.append(float(loss.detach()))
            if (k := POINTS[self.options["intermediate_matching"]].get(n)) is not None:  # Eq. 22
                beta = k / M if self.options.get("intermediate_scale") == "ramp" else 1.0
                total = total + beta * (theta - experts[k]).square().sum() / (origin - experts[k]).square().sum()
        by_images, by_alpha = torch.autograd.grad(total, [images, alpha])
        logged = {
            "loss": float(total.detach()),
            "start_epoch": t,
            "expert": expert,
            "inner_loss_first": inner[0],
            "inner_loss_last": inner[-1],
            "perturbation_ratio": float((start - experts[0]).norm() / (experts[0] - experts[M]).norm()),
            "image_gradient_norm": float(by_images.norm()),
        }
        return logged, by_images, by_alpha


PAPER = {"balanced_loss": "paper", "intermediate_matching": "paper", "perturbation": "paper", "student_momentum": 0.0}
RELEASED = dict.fromkeys(("balanced_loss", "intermediate_matching", "perturbation"), "released") | {"student_momentum": 0.9}
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper, plain autograd": {**PAPER, "gradient": "graph"},
    "paper, unperturbed denominators": {**PAPER, "denominator": "unperturbed"},
    "paper, ramp and dropout": {**PAPER, "intermediate_scale": "ramp", "dropout": 0.1},
    "paper, labels of the expert": {**PAPER, "soft_labels": "expert", "student_momentum": 0.5},
    "paper, labels that are differentiated": {**PAPER, "soft_labels": "expert-differentiated"},
    "released": RELEASED,
    "released, unperturbed denominators": {**RELEASED, "denominator": "unperturbed"},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_consecutive_steps_are_those_of_algorithm_2(
    make_problem: Callable[..., Problem], trajectories: Trajectories, options: dict[str, Any]
) -> None:
    problem = make_problem(
        ipc=IPC,
        experts=Doubles(trajectories.folder),
        augmentation=DSA,
        student_steps=N,
        expert_epochs=M,
        max_start_epoch=LAST,
        batch_syn=BATCH,
        rho=RHO,
        lr_images=LR_IMAGES,
        lr_alpha=LR_ALPHA,
        image_momentum=MOMENTUM,
        **options,
    )
    method = TrajectoryMatching()
    method.start(problem)
    state = method.initialise(seeding.generator(0, "initialise"))
    state.update({name: tensor.double() for name, tensor in state.items() if tensor.is_floating_point()})
    reference = Reference(problem, options)
    images, alpha = (torch.nn.Parameter(state[name].clone()) for name in ("images", "alpha"))
    rates = [{"params": [images], "lr": LR_IMAGES}, {"params": [alpha], "lr": LR_ALPHA}]
    optimiser = torch.optim.SGD(rates, momentum=MOMENTUM)
    drawn: set[tuple[float, float]] = set()
    for iteration in range(2):
        row = method.step(state, iteration, seeding.generator(15, "step", iteration))
        logged, images.grad, alpha.grad = reference.step(
            images.detach(), alpha.detach(), seeding.generator(15, "step", iteration)
        )
        optimiser.step()
        assert row == pytest.approx({**logged, "alpha": float(alpha.detach()), "skipped": 0, "taken": 1}, rel=1e-9)
        for name, parameter in (("images", images), ("alpha", alpha)):
            momentum = optimiser.state[parameter]["momentum_buffer"]
            torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(state[f"{name}.momentum"], momentum, rtol=1e-9, atol=1e-12)
        drawn.add((row["expert"], row["start_epoch"]))
    # Both experts, and an early and a late start: a mistake in the draws or in their weight would show.
    assert {expert for expert, _ in drawn} == {0, 1}
    assert {epoch for _, epoch in drawn} == {0, 2}
