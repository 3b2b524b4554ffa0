"""Back-propagation through training: BPTT (Wang et al. 2018) and RaT-BPTT (Feng et al. 2024) differ only in its settings.

A fresh network is trained on the synthetic set S, and the cross-entropy of real images under the trained weights is
differentiated through the last W steps of that training:

    θ_{n+1} = step(θ_n, ∇CE(A(S_n); θ_n)), n = 0 … s + W - 1      L(S) = CE(A'(real batch); θ_{s+W})

The gradient by S is the sweep of the unrolled student (`dstill.unrolling.adjoint`), started with ∂L/∂θ_{s+W} in place of a
matching term. There are no experts and nothing is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import Case, Count, Momentum, Passes, Positive, Recipe
from dstill.data import siamese
from dstill.data.catalog import Shape
from dstill.derivatives import engine
from dstill.methods.base import Metrics, Problem, State, library_bytes
from dstill.methods.batches import RealBatches, draw_steps
from dstill.methods.drawing import Drawn, Mean, Told, averaged, move_averages, with_averages
from dstill.methods.guard import Guard
from dstill.methods.initialisation import initial_images
from dstill.methods.learned_labels import label_logits, one_hot_start, through_logits
from dstill.methods.unrolled_config import UnrolledConfig
from dstill.methods.unrolling_method import UnrollingMethod
from dstill.nets import networks as nets
from dstill.unrolling.optimisers import Adam, optimiser
from dstill.unrolling.student import Student
from dstill.unrolling.types import FinalLoss, Gradients
from dstill.unrolling.unroll import unroll, unrolled_bytes

_BLOCK = 1000  # real images at a time
_NORM_DECAY = 0.9  # of the running norm that gradients are clipped by
_SHORT: Mapping[str, Any] = {  # chosen at width 32 on the validation part of CIFAR-10
    "total_steps": 40,
    "window": 20,
    "batch_real": 1024,
    "schedule": "cosine",
    "clip": 1.5,
    "soft_labels": "off",
}
_FROM_NOISE, _FROM_REAL = (
    {"initialisation": "unit-noise", "lr_images": 5e-3},
    {"initialisation": "random", "lr_images": 3e-2},
)
_MANY = 5  # images per class, from which on trainings in little time start from real ones
_SHORTEST = 10  # steps of the shortest trainings
_SLOWEST = 0.01  # share of the step size at the end of the cosine


class BpttConfig(UnrolledConfig):
    """How a synthetic set is optimised through the training of a network on it. Defaults are those of Wang et al."""

    late: ClassVar[frozenset[str]] = UnrolledConfig.late - {"draws"}  # an older setting here
    worthwhile: ClassVar[int] = 2000
    fewest: ClassVar[int] = 60
    search_factors: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "lr_images": (0.3, 1.0, 3.0),
        "alpha_init": (0.3, 1.0, 3.0),
    }

    iterations: Count = 2000
    """Updates of the images, each with fresh networks."""
    total_steps: Count = 30
    """T, the longest training of the student, in steps."""
    window: Count | None = None
    """W, the last steps of a training that are differentiated; left out: all T."""
    window_start: Literal["random", "last"] = "last"
    """Where the window begins: uniformly drawn from 0 … T - W each time (RaT-BPTT), or at T - W."""
    grow_over: Annotated[int, Field(ge=0)] = 0
    """Iterations over which T grows from W to its value; 0: it is at its value from the start."""
    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    """The student's optimiser."""
    student_momentum: Momentum = 0.0
    """Momentum of the student's SGD."""
    student_weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of the student's optimiser."""
    alpha_init: Positive = 0.02
    """α, the student's learning rate, at the start."""
    learn_alpha: Literal["off", "one", "each"] = "each"
    """Whether α is fixed, learned, or learned for each step by itself."""
    lr_alpha: Annotated[float, Field(ge=0)] = 1e-3
    """Step size of Adam on ln α."""
    batch_real: Count = 1024
    """Real images of the outer loss, of all classes."""
    lr_images: Positive = 1e-2
    """Step size of Adam on the images, in preprocessed units."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Whether the step sizes stay or fall to a hundredth along half a cosine."""
    clip: Positive | None = None
    """The norm of the images' gradient is limited to this multiple of its running mean, and those of labels and rates shrink
    with it; left out: no limit."""
    initialisation: Literal["random", "noise", "unit-noise"] = "noise"
    """Real images drawn at random; standard normal noise in preprocessed units; or such noise, each image of norm 1."""
    soft_labels: Literal["off", "learned"] = "off"
    """Class ids; or non-negative labels that start one-hot and are learned."""
    lr_labels: Positive = 1e-3
    """Step size of Adam on learned labels."""

    @model_validator(mode="after")
    def _consistent(self) -> BpttConfig:
        if self.window is not None and self.window > self.total_steps:
            raise ValueError(f"window {self.window} must not exceed total_steps {self.total_steps}")
        if self.grow_over and self.differentiated == self.total_steps:
            raise ValueError("grow_over lets T grow from window to total_steps: set a window below total_steps")
        if self.learn_alpha == "each" and (self.window_start == "random" or self.grow_over):
            raise ValueError("learn_alpha each needs a window in one place: set window_start to last and grow_over to 0")
        if self.student_momentum and self.optimiser != "sgd":
            raise ValueError(f"student_momentum is for sgd, and {self.optimiser} has its own: leave it at 0")
        return self

    @property
    def differentiated(self) -> int:
        """W."""
        return self.window or self.total_steps

    def longest(self, iteration: int) -> int:
        """T at an iteration."""
        if not self.grow_over:
            return self.total_steps
        share = min(1.0, iteration / self.grow_over)
        return self.differentiated + round(share * (self.total_steps - self.differentiated))

    def fitted(self, case: Case) -> tuple[Self, str]:
        """Reduces W so that the kept vectors fit into memory, and drops a `batch_syn` that covers the whole set."""
        vectors = optimiser(self.optimiser, momentum=self.student_momentum).vectors
        window, asked = max(1, case.steps_in_memory(self.differentiated, vectors)), self.differentiated
        cut = f"; W cut from {asked} to {window} to fit the memory" if window < asked else ""
        return self.model_copy(update={"batch_syn": self.batch_below(case), "window": window if cut else self.window}), cut

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        batch = self.student_batch(ipc * classes)
        spare = self.total_steps - self.differentiated
        steps = self.differentiated + (spare / 2 if self.window_start == "random" else spare)
        return [
            Passes("gradient", steps, batch, precision=self.precision),
            Passes("tangent", self.differentiated, batch, precision=self.precision),
            Passes("gradient", 1, self.batch_real, precision=self.precision),
        ]

    def quicker(self, ipc: int) -> Self | None:
        """Short trainings on fewer real images, with larger steps that fall along a cosine; then half as long ones.

        In little time, one image of each class becomes better from noise, and ten from real images (`results/frontier`).
        """
        if self.total_steps > _SHORT["total_steps"]:
            return self.model_copy(update={**_SHORT, **(_FROM_REAL if ipc >= _MANY else _FROM_NOISE)})
        if self.total_steps < 2 * _SHORTEST:
            return None
        halved = {"total_steps": self.total_steps // 2, "batch_real": max(1, self.batch_real // 2)}
        return self.model_copy(update={**halved, "window": max(1, self.differentiated // 2)})

    def smoke(self) -> Self:
        small = {"iterations": 5, "total_steps": 6, "window": 4, "batch_real": min(self.batch_real, 64)}
        return self.model_copy(update={**small, "grow_over": min(self.grow_over, 2)})


def real_loss(student: Student, images: Tensor, labels: Tensor) -> FinalLoss:
    """The outer loss: the mean cross-entropy of real images under θ, and its gradient, a block of images at a time.

    Args:
        student: the network as pure functions.
        images: augmented real images `[B, C, H, W]`.
        labels: class ids `[B]`.
    """

    def loss(theta: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = torch.zeros((), device=theta.device), torch.zeros_like(theta)
        count = math.ceil(len(images) / _BLOCK)  # blocks of one size, or nearly
        for block, of_block in zip(images.tensor_split(count), labels.tensor_split(count), strict=True):
            share = len(block) / len(images)
            one, by_theta, _ = student.gradient(theta, block, of_block)
            value, gradient = value + share * one, gradient + share * by_theta
        return value, gradient

    return loss


class Bptt(UnrollingMethod):
    """State: `images` with Adam's moments, `images.first` and `images.second` `[S, C, H, W]`, likewise `log_alpha` if it is
    learned and `labels` `[S, K]` if they are; `norm`, the running norm of the gradient; `taken` and `skipped`, numbers of
    steps; `images.average` and `labels.average` if a moving average is kept. A draw is one training of a fresh network, with a
    real batch of its own.
    """

    Settings = BpttConfig

    @classmethod
    def check(cls, recipe: Recipe, network: nn.Module) -> None:
        settings = recipe.distill
        assert isinstance(settings, BpttConfig)
        Student(network, precision=settings.precision)

    def start(self, problem: Problem) -> None:
        super().start(problem)
        settings = self.settings = problem.settings(BpttConfig)
        self.student = Student(problem.network(), precision=settings.precision, compiled=settings.compile)
        self.optimiser = optimiser(
            settings.optimiser, momentum=settings.student_momentum, weight_decay=settings.student_weight_decay
        )
        self.real = RealBatches(problem, settings.batch_real)
        advice = "lower distill.lr_images or alpha_init, or set distill.clip"
        self.guard = Guard(True, settings.max_skip_share, settings.draws, bad="were not finite", advice=advice)

    def initialise(self, generator: torch.Generator) -> State:
        settings, device = self.settings, self.problem.device
        state = {"images": initial_images(self.problem, settings.initialisation, generator)}
        if settings.learn_alpha != "off":
            shape = (settings.total_steps,) if settings.learn_alpha == "each" else ()
            state["log_alpha"] = torch.full(shape, math.log(settings.alpha_init), device=device)
        if settings.soft_labels == "learned":
            state["labels"] = one_hot_start(self.problem.labels(), self.problem.real.classes)
        for name in tuple(state):
            state |= {f"{name}.{moment}": torch.zeros_like(state[name]) for moment in ("first", "second")}
        state = with_averages(state, [name for name in ("images", "labels") if name in state], settings.image_ema)
        counts = {name: torch.zeros((), dtype=torch.int64) for name in ("taken", "skipped")}
        return {**state, **counts, "norm": torch.zeros((), device=device)}

    def update(self, state: State, iteration: int, drawn: Sequence[Told], mean: Mean) -> Metrics:
        """Updates the images, learned labels and learned rates once, unless nothing finite was drawn."""
        usable, metrics = self.guard.usable(state, iteration, drawn), Metrics()
        if usable:
            gradients = mean(usable)
            metrics["image_gradient_norm"] = float(gradients["images"].norm())
            self._stepped(state, iteration, gradients)
        if "log_alpha" in state:
            metrics["alpha"] = float(state["log_alpha"].mean().exp())
        return {**metrics, "skipped": int(state["skipped"]), "taken": int(bool(usable))}

    def result(self, state: State) -> DistilledSet:
        labels = label_logits(averaged(state, "labels")) if "labels" in state else self.problem.labels()
        alpha = float(state["log_alpha"].mean().exp()) if "log_alpha" in state else self.settings.alpha_init
        return self.problem.result(averaged(state, "images"), labels, alpha if self.settings.optimiser == "sgd" else None)

    def draw(self, state: State, iteration: int, number: int, generator: torch.Generator) -> Iterator[Drawn]:
        """The outer loss of one training, and its gradients by what is learned."""
        settings, problem = self.settings, self.problem
        start = self._window_start(iteration, generator)
        theta = nn.utils.parameters_to_vector(problem.fresh_network(generator).parameters()).detach()
        steps = draw_steps(problem, settings.batch_syn, start + settings.differentiated, generator)
        images, labels = self.real.draw(generator)
        augmented = siamese.apply(images, siamese.sample(problem.recipe.augmentation, len(images), generator))
        rates = self._rates(state)
        unrolled = unroll(
            self.student,
            theta,
            problem.decoded(state["images"]),
            label_logits(state["labels"]) if "labels" in state else problem.labels(),
            steps,
            rates if rates.ndim == 0 else rates[: len(steps)],
            real_loss(self.student, augmented, labels),
            optimiser=self.optimiser,
            burn_in=start,
            memory=settings.memory,
            sharers=self.sharers,
        )
        yield Drawn(self._by_name(state, unrolled.grads, rates), {"loss": float(unrolled.loss)})

    def _by_name(self, state: State, grads: Gradients, rates: Tensor) -> dict[str, Tensor]:
        """The gradients by what is learned, in the state's terms: ln α and non-negative labels."""
        gradients = {"images": self.problem.pulled_back(grads.images)}
        if "log_alpha" in state:
            by_alpha = grads.alpha if rates.ndim == 0 else nn.functional.pad(grads.alpha, (0, len(rates) - len(grads.alpha)))
            gradients["log_alpha"] = by_alpha * rates
        if "labels" in state:
            assert grads.labels is not None
            gradients["labels"] = through_logits(state["labels"], grads.labels)
        return gradients

    def _rates(self, state: State) -> Tensor:
        """α, or α of each step."""
        if "log_alpha" in state:
            return state["log_alpha"].exp()
        return torch.tensor(self.settings.alpha_init, device=self.problem.device)

    def _window_start(self, iteration: int, generator: torch.Generator) -> int:
        """The number of steps before the window."""
        last = self.settings.longest(iteration) - self.settings.differentiated
        return int(torch.randint(last + 1, (), generator=generator)) if self.settings.window_start == "random" else last

    def _stepped(self, state: State, iteration: int, gradients: dict[str, Tensor]) -> None:
        """One Adam step on all that is learned."""
        settings, norm = self.settings, gradients["images"].norm()
        state["taken"] = state["taken"] + 1
        if settings.clip is not None:
            shrunk = self._clipped(state, norm) / norm.clamp_min(1e-30)
            gradients = {name: shrunk * gradient for name, gradient in gradients.items()}
        factor = settings.draw_factor * self._slowed(iteration)
        sizes = {"images": settings.lr_images, "log_alpha": settings.lr_alpha, "labels": settings.lr_labels}
        for name, gradient in gradients.items():
            self._adam(state, name, gradient, factor * sizes[name])
        if "labels" in state:
            state["labels"] = state["labels"].clamp_min(0)
        move_averages(state, settings.image_ema)

    def _clipped(self, state: State, norm: Tensor) -> Tensor:
        """The norm that a gradient of this norm is shrunk to; updates the running mean of these."""
        assert self.settings.clip is not None
        first = int(state["taken"]) == 1
        clipped = norm if first else torch.minimum(norm, self.settings.clip * state["norm"])
        state["norm"] = clipped if first else _NORM_DECAY * state["norm"] + (1 - _NORM_DECAY) * clipped
        return clipped

    def _slowed(self, iteration: int) -> float:
        """The factor on the step sizes."""
        if self.settings.schedule == "constant":
            return 1.0
        return _SLOWEST + (1 - _SLOWEST) * 0.5 * (1 + math.cos(math.pi * iteration / self.settings.iterations))

    @staticmethod
    @torch.no_grad()
    def _adam(state: State, name: str, gradient: Tensor, lr: float) -> None:
        moments = state[f"{name}.first"], state[f"{name}.second"]
        rate = torch.tensor(lr, device=gradient.device)
        state[name], (first, second), _ = Adam().step(state[name], moments, gradient, rate, int(state["taken"]))
        state[f"{name}.first"], state[f"{name}.second"] = first, second

    @classmethod
    def peak_bytes(cls, recipe: Recipe, shape: Shape, device: torch.device, students: int = 1) -> float:
        """Counts the vectors of the differentiated steps, what the unroll keeps of them, and a block of real images."""
        settings = recipe.distill
        assert isinstance(settings, BpttConfig)
        student = Student(nets.build(recipe.net, shape.channels, shape.classes, shape.size, torch.Generator()))
        count = recipe.decoded_ipc * shape.classes
        batch = settings.student_batch(count)
        vectors = optimiser(settings.optimiser, momentum=settings.student_momentum).vectors
        weights = 4 * student.numel * (settings.differentiated * vectors + 8)
        block = min(_BLOCK, settings.batch_real)
        real = RealBatches.peak_bytes(shape, students * settings.batch_real, device)
        kept = unrolled_bytes(student, settings.differentiated, batch, settings.memory, device, students)
        of_block = student.kept_bytes(torch.zeros(1), block)
        if kept is None or of_block is None:
            return students * weights + real + library_bytes(recipe.net, max(batch, block), shape)
        return students * (weights + 2 * of_block) + real + kept  # a block's first-order pass, forward and back

    @classmethod
    def engine(cls, problem: Problem) -> str:
        settings = problem.settings(BpttConfig)
        by = engine.describe(problem.network(), problem.device, settings.precision, compiled=settings.compile)
        return f"{by}, {settings.precision}, {'exact' if settings.precision == 'float32' else 'inexact'}"
