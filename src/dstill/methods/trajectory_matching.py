"""Trajectory matching, once: MTT, TESLA, FTD and AST are settings of it (paper Algorithm 2)."""

from __future__ import annotations

import functools
import math
from typing import final

import torch
from torch import Tensor

from dstill.artifacts.distilled import DistilledSet
from dstill.data import siamese
from dstill.errors import CollapseError, DstillError
from dstill.experts.trajectory import Segment, Trajectories
from dstill.methods.alignment import balanced_loss, intermediate_matching, perturb_weights
from dstill.methods.base import Metrics, Problem, State
from dstill.methods.initialisation import initial_images
from dstill.methods.settings import MatchingConfig
from dstill.support.devices import full_precision, sent
from dstill.training.fit import student_batches
from dstill.unrolling.student import Student, sgd_step
from dstill.unrolling.types import Step, Unrolled
from dstill.unrolling.unroll import unroll

_MIN_SKIPS = 10
_BLOCK = 256  # images whose labels are worked out at once: no more memory than a step needs


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.cpu().double(), b.cpu().double()
    return float((a * b).sum() / (a.norm() * b.norm()))


@final
class TrajectoryMatching:
    """The images and α are optimised so that a student trained on them follows segments of expert trajectories.

    State: `images` and `images.momentum` `[S, C, H, W]`, `alpha` and `alpha.momentum`, `skipped`; `labels` where they are
    soft, `images.average` where a moving average is kept.
    """

    def start(self, problem: Problem) -> None:
        if problem.trajectories is None:
            raise DstillError(f"method {problem.recipe.method!r} needs expert trajectories")
        self.problem = problem
        self.settings = problem.settings(MatchingConfig)
        self.trajectories: Trajectories = problem.trajectories
        self.student = Student(problem.network(), precision=self.settings.precision, compiled=self.settings.compile)
        self.trajectories.check_fits(self.student.numel, self.settings.epochs_needed)

    def iterations(self) -> int:
        return self.settings.iterations

    def initialise(self, generator: torch.Generator) -> State:
        images = initial_images(self.problem, self.settings.initialisation, generator)
        alpha = torch.tensor(self.settings.alpha_init, device=self.problem.device)
        state = {
            "images": images,
            "images.momentum": torch.zeros_like(images),
            "alpha": alpha,
            "alpha.momentum": torch.zeros_like(alpha),
            "skipped": torch.zeros((), dtype=torch.int64),
        }
        if self.settings.image_ema is not None:
            state["images.average"] = images.clone()
        return state

    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        settings = self.settings
        segment = self._draw_segment(generator)
        start = self._perturbed_start(segment, generator)
        origin = start if settings.denominator == "perturbed" else segment.start
        targets = intermediate_matching(
            segment, origin, settings.student_steps, settings.intermediate_matching, settings.intermediate_scale
        )
        differentiate = functools.partial(
            unroll,
            theta0=start,
            images=state["images"],
            labels=self._labels(state, segment),
            steps=self._draw_steps(generator),
            alpha=state["alpha"],
            targets=targets,
            loss_scale=balanced_loss(segment.epoch, settings.max_start_epoch, settings.balanced_loss),
            momentum=settings.student_momentum,
            gradient=settings.gradient,
            memory=settings.memory,
        )
        unrolled = differentiate(self.student)
        extra: Metrics = {}
        if iteration == 0 and settings.precision != "float32":
            exact = differentiate(Student(self.problem.network()))
            extra["gradient_cosine"] = _cosine(unrolled.grads.images, exact.grads.images)
        by_images = unrolled.grads.images
        if settings.soft_labels == "expert-differentiated":
            by_images = by_images + self._through_labels(state["images"], segment, unrolled)
        taken = self._update(state, unrolled, by_images, iteration)
        span = (segment.start - segment.targets[-1]).norm()
        return {
            "loss": float(unrolled.loss),
            "alpha": float(state["alpha"]),
            "start_epoch": segment.epoch,
            "expert": segment.expert,
            "inner_loss_first": float(unrolled.trace.inner_losses[0]),
            "inner_loss_last": float(unrolled.trace.inner_losses[-1]),
            "perturbation_ratio": float((start - segment.start).norm() / span),
            "image_gradient_norm": float(by_images.norm()),
            "skipped": int(state["skipped"]),
            "taken": int(taken),
            **extra,
        }

    def result(self, state: State) -> DistilledSet:
        images = state.get("images.average", state["images"])
        return self.problem.result(images, state.get("labels", self.problem.labels()), float(state["alpha"]))

    def _draw_segment(self, generator: torch.Generator) -> Segment:
        settings = self.settings
        expert = int(torch.randint(len(self.trajectories), (), generator=generator))
        epoch = int(torch.randint(settings.min_start_epoch, settings.max_start_epoch, (), generator=generator))
        segment = self.trajectories.segment(expert, epoch, settings.expert_epochs)
        device = self.problem.device
        return Segment(expert, epoch, segment.start.to(device), segment.targets.to(device))

    def _perturbed_start(self, segment: Segment, generator: torch.Generator) -> Tensor:
        settings = self.settings
        weights = perturb_weights(self.student.split(segment.start), settings.perturbation, settings.rho, generator)
        start = torch.cat([weight.reshape(-1) for weight in weights])
        if settings.dropout:
            kept = torch.rand(len(start), generator=generator).to(start) >= settings.dropout
            start = start * kept / (1 - settings.dropout)
        return start

    def _draw_steps(self, generator: torch.Generator) -> list[Step]:
        """N mini-batches, each with its draw of the augmentation."""
        recipe, settings = self.problem.recipe, self.settings
        count = self.problem.real.classes * recipe.ipc
        return [
            Step(sent(rows, self.problem.device), siamese.sample(recipe.augmentation, len(rows), generator))
            for rows in student_batches(count, settings.batch_syn, settings.student_steps, generator)
        ]

    @torch.no_grad()
    @full_precision()
    def _labels(self, state: State, segment: Segment) -> Tensor:
        if self.settings.soft_labels == "off":
            return self.problem.labels()
        target = segment.targets[-1]
        state["labels"] = torch.cat([self.student.logits(target, block) for block in state["images"].split(_BLOCK)])
        return state["labels"]

    @full_precision()
    def _through_labels(self, images: Tensor, segment: Segment, unrolled: Unrolled) -> Tensor:
        """What the labels' dependence on the images adds to the gradient: labels are the target expert's logits."""
        assert unrolled.grads.labels is not None
        parts = list[Tensor]()
        for block, by_labels in zip(images.split(_BLOCK), unrolled.grads.labels.split(_BLOCK), strict=True):
            block = block.detach().requires_grad_()
            with torch.enable_grad():
                labels = self.student.logits(segment.targets[-1], block)
            parts.append(torch.autograd.grad(labels, block, by_labels)[0])
        return torch.cat(parts)

    def _update(self, state: State, unrolled: Unrolled, by_images: Tensor, iteration: int) -> bool:
        """One SGD step on images and α; returns whether it was taken."""
        settings, grads = self.settings, unrolled.grads
        images, images_momentum = sgd_step(
            state["images"], state["images.momentum"], by_images, settings.lr_images, settings.image_momentum
        )
        alpha, alpha_momentum = sgd_step(
            state["alpha"], state["alpha.momentum"], grads.alpha, settings.lr_alpha, settings.image_momentum
        )
        finite = math.isfinite(float(unrolled.loss)) and bool(torch.isfinite(images).all()) and math.isfinite(float(alpha))
        if settings.guard == "off" and not finite:
            raise CollapseError(
                f"the run collapsed at iteration {iteration} (loss {float(unrolled.loss):.3g}, α {float(state['alpha']):.3g}); "
                "the guard is off, and the curves up to here are in metrics.jsonl"
            )
        if settings.guard == "on" and not (finite and float(alpha) > 0):
            state["skipped"] = state["skipped"] + 1
            for name in ("images.momentum", "alpha.momentum"):  # what led here would lead here again
                state[name] = torch.zeros_like(state[name])
            self._stop_if_hopeless(int(state["skipped"]), iteration)
            return False
        state["images"], state["images.momentum"] = images, images_momentum
        state["alpha"], state["alpha.momentum"] = alpha, alpha_momentum
        if settings.image_ema is not None:
            state["images.average"] = settings.image_ema * state["images.average"] + (1 - settings.image_ema) * images
        return True

    def _stop_if_hopeless(self, skipped: int, iteration: int) -> None:
        if skipped >= _MIN_SKIPS and skipped > self.settings.max_skip_share * (iteration + 1):
            raise CollapseError(
                f"the run collapsed: {skipped} of {iteration + 1} steps were not finite or would have made α non-positive, "
                f"more than the {self.settings.max_skip_share:.0%} allowed: lower distill.lr_images or lr_alpha, or use "
                "smoother experts"
            )
