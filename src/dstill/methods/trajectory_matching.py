"""Trajectory matching (paper Algorithm 2): MTT, TESLA, FTD and AST differ only in its settings."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import Case, Count, DistillConfig, Form, Momentum, Passes, Positive, Precision, Recipe
from dstill.data import siamese
from dstill.data.catalog import Shape
from dstill.derivatives import build as native
from dstill.derivatives.engine import supports
from dstill.errors import DstillError
from dstill.experts.trajectory import Segment, Trajectories
from dstill.methods.alignment import balanced_loss, intermediate_matching, perturb_weights
from dstill.methods.base import Method, Metrics, Problem, State, library_bytes
from dstill.methods.expert_labels import expert_labels, gradient_through_labels, mean_expert_labels
from dstill.methods.guard import Guard
from dstill.methods.initialisation import initial_images
from dstill.nets import networks as nets
from dstill.support.devices import available_memory, sent
from dstill.training.fit import student_batches
from dstill.unrolling.optimisers import Sgd, sgd_step
from dstill.unrolling.student import Student
from dstill.unrolling.types import Step, Targets, Unrolled
from dstill.unrolling.unroll import KEPT_SHARE, unroll

Initialisation = Literal["random", "representative", "representative-released", "classified", "noise"]
SoftLabels = Literal["off", "expert", "expert-differentiated", "learned"]
StartEpochs = Literal["uniform", "growing"]
Mode = Literal["adjoint", "graph", "tesla"]


class MatchingConfig(DistillConfig):
    """How a synthetic set is optimised to reproduce expert segments (paper IV-C, IV-D, Algorithm 2). Defaults are MTT's."""

    optimises_images: ClassVar[bool] = True
    search_factors: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "lr_images": (0.1, 0.3, 1.0, 3.0, 10.0),
        "max_start_epoch": (0.5, 1.0, 2.0),
        "alpha_init": (0.3, 1.0, 3.0, 10.0),
    }

    iterations: Count = 5000
    """Segments matched, each with one update of the images."""
    student_steps: Count = 30
    """N, student steps per segment."""
    expert_epochs: Count = 2
    """M, expert epochs per segment."""
    max_start_epoch: Count = 20
    """T+, exclusive upper end of the start epochs."""
    min_start_epoch: Annotated[int, Field(ge=0)] = 0
    """Lowest start epoch (0 in the paper, except in Fig. 11)."""
    start_epochs: StartEpochs = "uniform"
    """Start epochs are drawn below T+ all the time, or below a limit that grows to T+ (DATM)."""
    first_start_epochs: Count | None = None
    """The growing limit at the start; left out: half of T+."""
    grow_over: Count = 1000
    """Iterations over which the limit grows to T+."""
    batch_syn: Count | None = None
    """Synthetic images per student step; left out: the whole set."""
    lr_images: Positive = 100.0
    """Step size of the images, in preprocessed units squared per unit of matching loss."""
    lr_alpha: Annotated[float, Field(ge=0)] = 1e-5
    """Step size of the student learning rate α."""
    alpha_init: Positive = 0.01
    """α at the start."""
    image_momentum: Momentum = 0.5
    """Momentum of the SGD on images and α."""
    student_momentum: Momentum = 0.0
    """Momentum of the student's inner SGD: 0 in the paper, 0.9 in the released code."""
    initialisation: Initialisation = "random"
    """Real images drawn at random; nearest to K-Means centroids of expert features (paper) or logits (released); that an
    expert classifies correctly (DATM); or noise."""
    feature_epochs: Count | None = None
    """Epochs of the expert whose features are clustered (50 in the paper; if the experts are shorter, one is trained this far);
    left out: the last recorded epoch of the first expert."""
    balanced_loss: Form = "off"
    """ν of Eq. 20: natural logarithm (paper), base 5 (released), or 1 (off)."""
    intermediate_matching: Form = "off"
    """Eq. 22: points after floor(kN/M) steps (paper), k floor(N/M) (released), or only the final match."""
    intermediate_scale: Literal["equal", "ramp"] = "equal"
    """β of the intermediate terms: 1, or k/M for the k-th."""
    perturbation: Form = "off"
    """Eq. 23: one normalised draw per filter, scaled by rho (paper); one per 4-d layer, times the weight (released); or off."""
    rho: Positive = 0.1
    """Relative size of the paper's perturbation."""
    denominator: Literal["perturbed", "unperturbed"] = "perturbed"
    """Whether the denominators of Eq. 22 are measured from the perturbed or the unperturbed start."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the student's starting weights set to zero after the perturbation (Fig. 11)."""
    soft_labels: SoftLabels = "off"
    """Class ids; logits of the target expert on the current images, renewed every iteration and constant in the gradient
    (TESLA); the same with the gradient through the expert (ours); or logits that start as the mean of the experts' and are
    learned (DATM)."""
    lr_labels: Positive = 2.0
    """Step size of learned labels, in squared logits per unit of matching loss."""
    label_momentum: Momentum = 0.9
    """Momentum of the SGD on learned labels."""
    skip_above: Positive | None = None
    """A segment whose matching loss is larger changes nothing (DATM); left out: no limit."""
    image_ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the images, which becomes the result (FTD); left out: the images themselves."""
    gradient: Mode = "adjoint"
    """Exact, with the memory of one step if need be; exact by plain autograd; or TESLA's approximation."""
    memory: Literal["auto", "keep", "recompute"] = "auto"
    """What the adjoint keeps of the forward sweep: as much as fits in half of the free memory, everything, or nothing. The
    numbers are the same; keeping more is faster."""
    precision: Precision = "float32"
    """Exact; bfloat16 convolutions in the backward sweep; or bfloat16 everywhere. The last two are approximations."""
    compile: bool = False
    """torch.compile the student's step where native kernels do not run. It takes about a minute; then steps are faster."""
    guard: Literal["on", "off"] = "on"
    """Skip a step that is not finite or would make α non-positive, and reset the momentum that led to it. Turn this off only to
    study collapse."""
    max_skip_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The run stops with advice once more than this share of the steps, and at least 10, has been skipped."""

    @classmethod
    def expert_defaults(cls) -> dict[str, Any]:
        """Plain SGD."""
        off = dict.fromkeys(("clipped_loss", "gradient_penalty", "lr_step"), "off")
        return {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, **off}

    @model_validator(mode="after")
    def _consistent(self) -> MatchingConfig:
        if self.min_start_epoch >= self.max_start_epoch:
            raise ValueError(f"min_start_epoch {self.min_start_epoch} must be below max_start_epoch {self.max_start_epoch}")
        if self.student_steps < self.expert_epochs:
            raise ValueError(f"student_steps {self.student_steps} must be at least expert_epochs {self.expert_epochs}")
        if self.first_start_epochs is not None and not self.min_start_epoch < self.first_start_epochs <= self.max_start_epoch:
            raise ValueError(
                f"first_start_epochs {self.first_start_epochs} must lie above min_start_epoch {self.min_start_epoch} and not "
                f"above max_start_epoch {self.max_start_epoch}"
            )
        if self.gradient == "graph" and self.precision != "float32":
            raise ValueError(f"gradient graph is plain autograd in float32; precision {self.precision} needs gradient adjoint")
        return self

    @property
    def epochs_needed(self) -> int:
        """Expert epochs that matching reads: T+ + M - 1."""
        return self.max_start_epoch + self.expert_epochs - 1

    def latest_start(self, iteration: int) -> int:
        """The exclusive upper end of the start epochs at an iteration."""
        if self.start_epochs == "uniform":
            return self.max_start_epoch
        half = max(self.min_start_epoch + 1, self.max_start_epoch // 2)
        first = self.first_start_epochs or half
        return first + math.floor((self.max_start_epoch - first) * min(1.0, iteration / self.grow_over))

    @property
    def describing_epochs(self) -> int | None:
        return self.feature_epochs if self.starts_from_representatives else None

    @property
    def starts_from_representatives(self) -> bool:
        return self.initialisation.startswith("representative")

    def fitted(self, case: Case) -> tuple[Self, str]:
        """Reduces N so that the kept vectors fit into memory, and drops a `batch_syn` that covers the whole set."""
        steps = min(self.student_steps, max(self.expert_epochs, self._steps_in_memory(case)))
        whole = case.ipc * self.parts**2 * case.shape.classes
        batch = self.batch_syn if self.batch_syn is not None and self.batch_syn < whole else None
        cut = f"; N cut from {self.student_steps} to {steps} to fit the memory" if steps < self.student_steps else ""
        return self.model_copy(update={"student_steps": steps, "batch_syn": batch}), cut

    def _steps_in_memory(self, case: Case) -> int:
        """The N at which the kept parameter vectors (two per step with momentum) take a quarter of the memory."""
        (channels, size, classes), width, depth = case.shape[:3], case.net.width or 128, case.net.depth or 1
        last = math.prod(max(1, side >> depth) for side in size)
        parameters = 9 * width * (channels + width * (depth - 1)) + 3 * width * depth + (width * last + 1) * classes
        vectors = 2 if self.student_momentum else 1
        return int(min(self.student_steps, 0.25 * case.memory / (4 * parameters * vectors)))

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        batch = min(self.batch_syn or ipc * classes, ipc * classes)
        return [Passes(kind, self.student_steps, batch, precision=self.precision) for kind in ("gradient", "tangent")]

    def scaled(self, factors: Mapping[str, float], longest: int | None) -> Self:
        """T+ stays an integer above the lowest start epoch and within experts of `longest` epochs."""
        last = math.inf if longest is None else longest - self.expert_epochs + 1
        span = math.ceil(self.max_start_epoch * factors["max_start_epoch"])
        start = min(last, max(self.min_start_epoch + 1, span))
        others = {name: getattr(self, name) * factor for name, factor in factors.items()}
        first = self.first_start_epochs and max(self.min_start_epoch + 1, min(int(start), self.first_start_epochs))
        return self.model_copy(update={**others, "max_start_epoch": int(start), "first_start_epochs": first})

    def smoke(self) -> Self:
        small = {"iterations": 5, "student_steps": 6, "max_start_epoch": 2, "min_start_epoch": 0, "expert_epochs": 2}
        return self.model_copy(update={**small, "feature_epochs": None, "first_start_epochs": None})


class TrajectoryMatching(Method):
    """The images and α are optimised so that a student trained on them follows segments of expert trajectories.

    State: `images` and `images.momentum` `[S, C, H, W]`, `alpha` and `alpha.momentum`, `skipped`; `labels` `[S, K]` if they
    are soft, with `labels.momentum` if they are learned; `images.average` and `labels.average` if a moving average is kept.
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
        self.guard = Guard(self.settings.guard == "on", self.settings.max_skip_share)

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
        if self.settings.soft_labels == "learned":
            decoded, ids = self.problem.decoded(images), self.problem.labels()
            state["labels"] = mean_expert_labels(self.student, self.trajectories, decoded, ids)
            state["labels.momentum"] = torch.zeros_like(state["labels"])
        if self.settings.image_ema is not None:
            state |= {f"{name}.average": state[name].clone() for name in self._learned}
        return state

    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        """Matches one segment, and updates the images and α once (paper Algorithm 2, lines 4–18)."""
        settings = self.settings
        segment = self._draw_segment(iteration, generator)
        start = self._perturbed(segment.start, generator)
        follow = functools.partial(
            unroll,
            theta0=start,
            images=self.problem.decoded(state["images"]),
            labels=self._labels(state, segment),
            steps=self._draw_steps(generator),
            alpha=state["alpha"],
            targets=self._targets(segment, start),
            loss_scale=balanced_loss(segment.epoch, settings.max_start_epoch, settings.balanced_loss),
            optimiser=Sgd(settings.student_momentum),
            gradient=settings.gradient,
            memory=settings.memory,
        )
        unrolled = follow(self.student)
        by_images = self._by_images(state, segment, unrolled)
        taken = self._update(state, by_images, unrolled, iteration)
        metrics: Metrics = {"loss": float(unrolled.loss), "alpha": float(state["alpha"])}
        metrics |= segment_metrics(segment, start, unrolled, by_images)
        metrics |= {"skipped": int(state["skipped"]), "taken": int(taken)}
        if iteration == 0 and settings.precision != "float32":
            exact = follow(Student(self.problem.network()))
            metrics["gradient_cosine"] = cosine(unrolled.grads.images, exact.grads.images)
        return metrics

    def result(self, state: State) -> DistilledSet:
        images = state.get("images.average", state["images"])
        labels = state.get("labels.average", state.get("labels", self.problem.labels()))
        return self.problem.result(images, labels, float(state["alpha"]))

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

    def _draw_steps(self, generator: torch.Generator) -> list[Step]:
        """Draws N mini-batches, each with its own augmentation."""
        recipe, settings = self.problem.recipe, self.settings
        count = self.problem.decoded_count
        return [
            Step(sent(rows, self.problem.device), siamese.sample(recipe.augmentation, len(rows), generator))
            for rows in student_batches(count, settings.batch_syn, settings.student_steps, generator)
        ]

    @property
    def _learned(self) -> tuple[str, ...]:
        """What SGD with momentum updates besides α."""
        return ("images", "labels") if self.settings.soft_labels == "learned" else ("images",)

    def _labels(self, state: State, segment: Segment) -> Tensor:
        """Class ids, learned logits, or the target expert's logits on the current images."""
        if self.settings.soft_labels == "off":
            return self.problem.labels()
        if self.settings.soft_labels == "learned":
            return state["labels"]
        state["labels"] = expert_labels(self.student, segment.targets[-1], self.problem.decoded(state["images"]))
        return state["labels"]

    def _by_images(self, state: State, segment: Segment, unrolled: Unrolled) -> Tensor:
        """The gradient by the stored images, including the part through the labels if they are differentiated."""
        if self.settings.soft_labels != "expert-differentiated":
            return self.problem.pulled_back(unrolled.grads.images)
        assert unrolled.grads.labels is not None
        decoded = self.problem.decoded(state["images"])
        through = gradient_through_labels(self.student, segment.targets[-1], decoded, unrolled.grads.labels)
        return self.problem.pulled_back(unrolled.grads.images + through)

    def _update(self, state: State, by_images: Tensor, unrolled: Unrolled, iteration: int) -> bool:
        """One SGD step on images, learned labels and α, unless the guard skips it. Returns whether it was taken."""
        settings = self.settings
        if settings.skip_above is not None and float(unrolled.loss) > settings.skip_above:
            return False
        rules: dict[str, tuple[Tensor | None, float, float]] = {
            "images": (by_images, settings.lr_images, settings.image_momentum),
            "alpha": (unrolled.grads.alpha, settings.lr_alpha, settings.image_momentum),
            "labels": (unrolled.grads.labels, settings.lr_labels, settings.label_momentum),
        }
        after: State = {}
        for name in (*self._learned, "alpha"):
            gradient, lr, momentum = rules[name]
            assert gradient is not None
            buffer = f"{name}.momentum"
            after[name], after[buffer] = sgd_step(state[name], state[buffer], gradient, lr, momentum)
        momenta = [name for name in after if name.endswith(".momentum")]
        if not self.guard.allows(state, iteration, float(unrolled.loss), after["images"], after["alpha"], momenta):
            return False
        state.update(after)
        if settings.image_ema is not None:
            for name in self._learned:
                average = f"{name}.average"
                state[average] = settings.image_ema * state[average] + (1 - settings.image_ema) * state[name]
        return True

    @classmethod
    def peak_bytes(cls, recipe: Recipe, shape: Shape, device: torch.device) -> float:
        """Counts the vectors θ_0 … θ_N, their buffers, and what the unroll keeps of the student's steps."""
        settings = recipe.distill
        assert isinstance(settings, MatchingConfig)
        student = Student(nets.build(recipe.net, shape.channels, shape.classes, shape.size, torch.Generator()))
        count = recipe.decoded_ipc * shape.classes
        batch = min(settings.batch_syn or count, count)
        vectors = (settings.student_steps + settings.expert_epochs + 8) * (2 if settings.student_momentum else 1)
        weights = 4 * student.numel * vectors
        kept = student.kept_bytes(torch.zeros(1), batch)
        if kept is None:
            return weights + library_bytes(recipe.net, batch, shape)
        whole = kept * settings.student_steps
        some = min(whole, max(kept, KEPT_SHARE * available_memory(device)))
        return weights + {"keep": whole, "auto": some, "recompute": kept}[settings.memory]

    @classmethod
    def engine(cls, problem: Problem) -> str:
        settings = problem.settings(MatchingConfig)
        if settings.gradient == "graph":
            engine = "library autograd"
        elif not supports(problem.network()):
            engine = "torch double backward"
        else:
            engine = native.describe(problem.device, compiled=settings.compile)
        exact = settings.gradient != "tesla" and settings.precision == "float32"
        return f"{engine}, {settings.gradient} in {settings.precision}, {'exact' if exact else 'inexact'}"


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
