"""Trajectory matching (paper Algorithm 2): MTT, TESLA, FTD, DATM and AST differ only in its settings."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import Recipe
from dstill.data.catalog import Shape
from dstill.derivatives import engine
from dstill.errors import DstillError
from dstill.experts.trajectory import Segment, Trajectories
from dstill.methods.alignment import balanced_loss, intermediate_matching, perturb_weights
from dstill.methods.base import Metrics, Problem, State, library_bytes
from dstill.methods.batches import draw_steps
from dstill.methods.drawing import Drawn, Mean, Told, averaged, move_averages, with_averages
from dstill.methods.expert_labels import expert_labels, gradient_through_labels, mean_expert_labels
from dstill.methods.guard import Guard
from dstill.methods.initialisation import initial_images
from dstill.methods.matching_config import MatchingConfig
from dstill.methods.unrolling_method import UnrollingMethod
from dstill.nets import networks as nets
from dstill.unrolling.optimisers import Sgd, sgd_step
from dstill.unrolling.student import Student
from dstill.unrolling.types import Targets, Unrolled
from dstill.unrolling.unroll import unroll, unrolled_bytes


class TrajectoryMatching(UnrollingMethod):
    """The images and α are optimised so that a student trained on them follows segments of expert trajectories.

    State: `images` and `images.momentum` `[S, C, H, W]`, `alpha` and `alpha.momentum`, `skipped`; `labels` `[S, K]` if they
    are soft, with `labels.momentum` if they are learned; `images.average` and `labels.average` if a moving average is kept;
    `passed_over` if segments with a large loss change nothing. A draw is one segment.
    """

    Settings = MatchingConfig

    @classmethod
    def check(cls, recipe: Recipe, network: nn.Module) -> None:
        settings = recipe.distill
        assert isinstance(settings, MatchingConfig)
        Student(network, precision=settings.precision)
        Student(network, precision=recipe.expert_config.precision)

    def start(self, problem: Problem) -> None:
        super().start(problem)
        if problem.trajectories is None:
            raise DstillError(f"method {problem.recipe.method!r} needs expert trajectories")
        self.settings = problem.settings(MatchingConfig)
        self.trajectories: Trajectories = problem.trajectories
        self.student = Student(problem.network(), precision=self.settings.precision, compiled=self.settings.compile)
        self.trajectories.check_fits(self.student.numel, self.settings.epochs_needed)
        on, share = self.settings.guard == "on", self.settings.max_skip_share
        self.guard = Guard(on, share, self.settings.draws, skip_above=self.settings.skip_above)

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
        if self.settings.skip_above is not None:
            state["passed_over"] = torch.zeros((), dtype=torch.int64)
        if self.settings.soft_labels == "learned":
            decoded, ids = self.problem.decoded(images), self.problem.labels()
            state["labels"] = mean_expert_labels(self.student, self.trajectories, decoded, ids)
            state["labels.momentum"] = torch.zeros_like(state["labels"])
        return with_averages(state, self._learned, self.settings.image_ema)

    def draw(self, state: State, iteration: int, number: int, generator: torch.Generator) -> Iterator[Drawn]:
        """Matches one segment (paper Algorithm 2, lines 4–17)."""
        settings = self.settings
        segment = self._draw_segment(iteration, generator)
        start = self._perturbed(segment.start, generator)
        labels = self._labels(state, segment)
        follow = functools.partial(
            unroll,
            theta0=start,
            images=self.problem.decoded(state["images"]),
            labels=labels,
            steps=draw_steps(self.problem, settings.batch_syn, settings.student_steps, generator),
            alpha=state["alpha"],
            targets=self._targets(segment, start),
            loss_scale=balanced_loss(segment.epoch, settings.max_start_epoch, settings.balanced_loss),
            optimiser=Sgd(settings.student_momentum),
            gradient=settings.gradient,
            memory=settings.memory,
            sharers=self.sharers,
        )
        unrolled = follow(self.student)
        gradients = {"images": self._by_images(state, segment, unrolled), "alpha": unrolled.grads.alpha}
        if settings.soft_labels == "learned":
            assert unrolled.grads.labels is not None
            gradients["labels"] = unrolled.grads.labels
        metrics: Metrics = {"loss": float(unrolled.loss)} | segment_metrics(segment, start, unrolled, gradients["images"])
        if iteration == number == 0 and settings.precision != "float32":
            exact = follow(Student(self.problem.network()))
            metrics["gradient_cosine"] = cosine(unrolled.grads.images, exact.grads.images)
        yield Drawn(gradients, metrics, {} if "labels" in gradients or not labels.is_floating_point() else {"labels": labels})

    def update(self, state: State, iteration: int, drawn: Sequence[Told], mean: Mean) -> Metrics:
        """Updates the images, learned labels and α once (paper Algorithm 2, line 18), unless the guard skips it."""
        if "labels" in drawn[0].kept:
            state["labels"] = torch.stack([one.kept["labels"] for one in drawn]).mean(0)
        usable = self.guard.usable(state, iteration, drawn, self._momenta)
        taken = bool(usable) and self._stepped(state, iteration, usable, mean(usable))
        return {"alpha": float(state["alpha"]), "skipped": int(state["skipped"]), "taken": int(taken)}

    def result(self, state: State) -> DistilledSet:
        labels = averaged(state, "labels") if "labels" in state else self.problem.labels()
        return self.problem.result(averaged(state, "images"), labels, float(state["alpha"]))

    def _draw_segment(self, iteration: int, generator: torch.Generator) -> Segment:
        """Draws an expert and a start epoch uniformly, and reads the weights from there to M epochs later."""
        settings = self.settings
        expert = int(torch.randint(len(self.trajectories), (), generator=generator))
        epoch = int(torch.randint(settings.min_start_epoch, settings.latest_start(iteration), (), generator=generator))
        segment = self.trajectories.segment(expert, epoch, settings.expert_epochs)
        device = self.problem.device
        return Segment(expert, epoch, segment.start.to(device), segment.targets.to(device))

    def _perturbed(self, theta: Tensor, generator: torch.Generator) -> Tensor:
        """The student's start: the expert's weights, perturbed (Eq. 23), and with dropout if it is set (Fig. 11)."""
        settings = self.settings
        weights = perturb_weights(self.student.split(theta), settings.perturbation, settings.rho, generator)
        start = torch.cat([weight.reshape(-1) for weight in weights])
        if settings.dropout:
            kept = torch.rand(len(start), generator=generator).to(start) >= settings.dropout
            start = start * kept / (1 - settings.dropout)
        return start

    def _targets(self, segment: Segment, start: Tensor) -> Targets:
        """The target weights, and the student steps after which they are compared (Eq. 22)."""
        settings = self.settings
        origin = start if settings.denominator == "perturbed" else segment.start
        return intermediate_matching(
            segment, origin, settings.student_steps, settings.intermediate_matching, settings.intermediate_scale
        )

    @property
    def _learned(self) -> tuple[str, ...]:
        """What SGD with momentum updates besides α."""
        return ("images", "labels") if self.settings.soft_labels == "learned" else ("images",)

    @property
    def _momenta(self) -> list[str]:
        return [f"{name}.momentum" for name in (*self._learned, "alpha")]

    def _labels(self, state: State, segment: Segment) -> Tensor:
        """Class ids, learned logits, or the target expert's logits on the current images."""
        if self.settings.soft_labels == "off":
            return self.problem.labels()
        if self.settings.soft_labels == "learned":
            return state["labels"]
        return expert_labels(self.student, segment.targets[-1], self.problem.decoded(state["images"]))

    def _by_images(self, state: State, segment: Segment, unrolled: Unrolled) -> Tensor:
        """The gradient by the stored images, including the part through the labels if they are differentiated."""
        if self.settings.soft_labels != "expert-differentiated":
            return self.problem.pulled_back(unrolled.grads.images)
        assert unrolled.grads.labels is not None
        decoded = self.problem.decoded(state["images"])
        through = gradient_through_labels(self.student, segment.targets[-1], decoded, unrolled.grads.labels)
        return self.problem.pulled_back(unrolled.grads.images + through)

    def _stepped(self, state: State, iteration: int, drawn: Sequence[Told], gradients: Mapping[str, Tensor]) -> bool:
        """One SGD step along the mean gradients of some draws. Returns whether the guard has allowed it."""
        settings = self.settings
        rules = {
            "images": (settings.lr_images, settings.image_momentum),
            "alpha": (settings.lr_alpha, settings.image_momentum),
            "labels": (settings.lr_labels, settings.label_momentum),
        }
        after: State = {}
        for name in (*self._learned, "alpha"):
            (lr, momentum), buffer = rules[name], f"{name}.momentum"
            lr *= settings.draw_factor
            after[name], after[buffer] = sgd_step(state[name], state[buffer], gradients[name], lr, momentum)
        if not self.guard.allows(state, iteration, drawn, (after["images"],), after["alpha"], self._momenta):
            return False
        state.update(after)
        move_averages(state, settings.image_ema)
        return True

    @classmethod
    def peak_bytes(cls, recipe: Recipe, shape: Shape, device: torch.device, students: int = 1) -> float:
        """Counts the vectors θ_0 … θ_N, their buffers, and what the unroll keeps of the student's steps."""
        settings = recipe.distill
        assert isinstance(settings, MatchingConfig)
        student = Student(nets.build(recipe.net, shape.channels, shape.classes, shape.size, torch.Generator()))
        count = recipe.decoded_ipc * shape.classes
        batch = settings.student_batch(count)
        vectors = (settings.student_steps + settings.expert_epochs + 8) * (2 if settings.student_momentum else 1)
        weights = 4 * student.numel * vectors
        kept = unrolled_bytes(student, settings.student_steps, batch, settings.memory, device, students)
        return students * weights + (library_bytes(recipe.net, batch, shape) if kept is None else kept)

    @classmethod
    def engine(cls, problem: Problem) -> str:
        settings = problem.settings(MatchingConfig)
        by = "library autograd"
        if settings.gradient != "graph":
            by = engine.describe(problem.network(), problem.device, settings.precision, compiled=settings.compile)
        exact = settings.gradient != "tesla" and settings.precision == "float32"
        return f"{by}, {settings.gradient} in {settings.precision}, {'exact' if exact else 'inexact'}"


def matching_settings(distilled: DistilledSet) -> MatchingConfig:
    """The settings that a set was distilled with by trajectory matching.

    Raises:
        DstillError: the set was made by another method.
    """
    settings = distilled.recipe.distill if distilled.recipe else None
    if not isinstance(settings, MatchingConfig) or distilled.alpha is None:
        raise DstillError(f"only sets of trajectory matching follow an expert; this one was made by {distilled.method}")
    return settings


def segment_metrics(segment: Segment, start: Tensor, unrolled: Unrolled, by_images: Tensor) -> Metrics:
    """Diagnostics of a segment that are logged beside the loss and α. They change nothing."""
    span = (segment.start - segment.targets[-1]).norm()
    return {
        "start_epoch": segment.epoch,
        "expert": segment.expert,
        "inner_loss_first": float(unrolled.trace.inner_losses[0]),
        "inner_loss_last": float(unrolled.trace.inner_losses[-1]),
        "perturbation_ratio": float((start - segment.start).norm() / span),
        "image_gradient_norm": float(by_images.norm()),
    }


def cosine(a: Tensor, b: Tensor) -> float:
    """The cosine of the angle between two gradients, computed in float64."""
    a, b = a.cpu().double(), b.cpu().double()
    return float((a * b).sum() / (a.norm() * b.norm()))
