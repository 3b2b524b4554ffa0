"""Settings of trajectory matching: what MTT, TESLA, FTD, DATM and AST choose differently."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from dstill.config.settings import Case, Count, Form, Momentum, Passes, Positive
from dstill.methods.unrolled_config import UnrolledConfig

Initialisation = Literal["random", "representative", "representative-released", "classified", "noise"]
SoftLabels = Literal["off", "expert", "expert-differentiated", "learned"]
StartEpochs = Literal["uniform", "growing"]
Mode = Literal["adjoint", "graph", "tesla"]


class MatchingConfig(UnrolledConfig):
    """How a synthetic set is optimised to reproduce expert segments (paper IV-C, IV-D, Algorithm 2). Defaults are MTT's."""

    late: ClassVar[frozenset[str]] = UnrolledConfig.late | {
        *("start_epochs", "first_start_epochs", "grow_over", "lr_labels", "label_momentum", "skip_above")
    }
    worthwhile: ClassVar[int] = 200
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
    gradient: Mode = "adjoint"
    """Exact, with the memory of one step if need be; exact by plain autograd; or TESLA's approximation."""
    guard: Literal["on", "off"] = "on"
    """Skip a step that is not finite or would make α non-positive, and reset the momentum that led to it. Turn this off only to
    study collapse."""

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
        cut = f"; N cut from {self.student_steps} to {steps} to fit the memory" if steps < self.student_steps else ""
        return self.model_copy(update={"student_steps": steps, "batch_syn": self.batch_below(case)}), cut

    def _steps_in_memory(self, case: Case) -> int:
        """The N at which the kept parameter vectors (two per step with momentum) take a quarter of the memory."""
        return case.steps_in_memory(self.student_steps, vectors=2 if self.student_momentum else 1)

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        batch = self.student_batch(ipc * classes)
        return [Passes(kind, self.student_steps, batch, precision=self.precision) for kind in ("gradient", "tangent")]

    def quicker(self, ipc: int) -> Self | None:
        """Experts no longer than matching needs; then half as long ones."""
        if self.describing_epochs is not None:
            return self.model_copy(update={"feature_epochs": None})
        start = self.max_start_epoch // 2
        if start <= max(1, self.min_start_epoch):
            return None
        return self.model_copy(update={"max_start_epoch": start, "first_start_epochs": None})

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
