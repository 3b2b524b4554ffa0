"""Settings of the methods: the section `distill` of a recipe. Nothing here imports torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dstill.config.settings import Count, DistillConfig, Form, NetConfig, Passes, Positive, TrainingConfig

Momentum = Annotated[float, Field(ge=0, lt=1)]
Initialisation = Literal["random", "representative", "representative-released", "noise"]
SoftLabels = Literal["off", "expert", "expert-differentiated"]
Mode = Literal["adjoint", "graph", "tesla"]


class SelectionConfig(DistillConfig):
    """Selection by a trained network (Herding, Forgetting)."""

    training: TrainingConfig = TrainingConfig()
    """How the recipe's network is trained before it is asked."""

    def smoke(self) -> Self:
        return self.model_copy(update={"training": self.training.model_copy(update={"epochs": 2})})


class ImageConfig(DistillConfig):
    """What every method has that improves images by SGD against batches of real ones."""

    iterations: Count = 1000
    """Updates, each with a network of its own."""
    batch_real: Count = 256
    """Real images of a class in a batch; all of them where a class has fewer."""
    lr_images: Positive = 0.1
    """Step size of the images, in preprocessed units squared per unit of the objective."""
    image_momentum: Momentum = 0.5
    """Momentum of the SGD on images."""
    initialisation: Literal["random", "noise"] = "random"
    """Real images drawn at random, or standard normal noise in preprocessed units."""
    augment: bool = True
    """Whether real and synthetic images of a class are augmented by one and the same draw of the recipe's augmentation."""

    def smoke(self) -> Self:
        return self.model_copy(update={"iterations": 5, "batch_real": min(self.batch_real, 16)})


class InnerConfig(ImageConfig):
    """What is added where a network is trained on the synthetic set between updates."""

    lr_net: Positive = 0.01
    """Learning rate of its SGD, which has no momentum."""
    batch_train: Count = 256
    """Synthetic images a step of its training."""

    def training(self, images: int) -> Passes:
        """One pass over a synthetic set of so many images."""
        return Passes("gradient", math.ceil(images / self.batch_train), min(images, self.batch_train))


class GradientMatchingConfig(InnerConfig):
    """Gradient matching. Defaults are DSA's."""

    outer_steps: Count | None = None
    """K_o, updates of the images along one network's training; left out: the published table by IPC, see `loops`."""
    inner_epochs: Annotated[int, Field(ge=0)] | None = None
    """K_i, passes over the synthetic set between updates; left out: the table."""

    def smoke(self) -> Self:
        return super().smoke().model_copy(update={"outer_steps": 2, "inner_epochs": 2})

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        outer, inner = self.loops(ipc)
        real = Passes("gradient", outer * classes, self.batch_real)
        synthetic = [Passes(kind, outer * classes, ipc) for kind in ("gradient", "tangent")]
        training = self.training(ipc * classes)
        return [real, *synthetic, training._replace(times=training.times * outer * inner)]

    def loops(self, ipc: int) -> tuple[int, int]:
        """(K_o, K_i). Published: (1, 1), (10, 50), (20, 25), (30, 20), (40, 15), (50, 10) for IPC 1, 10 ... 50.

        Our extension between and beyond: K_o = IPC up to 50, and K_i by linear interpolation.
        """
        known = ((1, 1), (10, 50), (20, 25), (30, 20), (40, 15), (50, 10))
        low = max(pair for pair in known if pair[0] <= ipc)
        high = min((pair for pair in known if pair[0] >= ipc), default=known[-1])
        share = (ipc - low[0]) / (high[0] - low[0]) if high[0] > low[0] else 0.0
        inner = round(low[1] + share * (high[1] - low[1]))
        return self.outer_steps or min(ipc, 50), inner if self.inner_epochs is None else self.inner_epochs


class DcConfig(GradientMatchingConfig):
    """Gradient matching without augmentation, from noise."""

    initialisation: Literal["random", "noise"] = "noise"
    """Standard normal noise in preprocessed units, or real images drawn at random."""
    augment: bool = False
    """Whether real and synthetic images of a class are augmented, as in DSA."""


class DistributionMatchingConfig(ImageConfig):
    """Distribution matching (DM)."""

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        return [Passes("forward", classes, self.batch_real), Passes("library", classes, ipc)]

    iterations: Count = 20000
    """Updates, each with a network of its own."""
    lr_images: Positive = 1.0
    """Step size of the images, in preprocessed units squared per unit of the objective."""


class CafeConfig(InnerConfig):
    """Feature alignment (CAFE)."""

    iterations: Count = 2000
    """Networks, each with a loop of updates."""
    initialisation: Literal["random", "noise"] = "noise"
    """Real images drawn at random, or standard normal noise in preprocessed units."""
    augment: bool = False
    """Whether real and synthetic images are augmented by one and the same draw (the row CAFE + DSA)."""
    deep_weight: Positive = 1.0
    """Weight of the features before the classifier and of the last block's maps."""
    shallow_weight: Positive = 0.1
    """Weight of the maps of the blocks before the last."""
    discrimination: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the discrimination loss."""
    batch_query: Count = 128
    """Real images of a class that the accuracy of the loops is measured on."""
    window: Annotated[int, Field(ge=2)] = 10
    """Accuracies that the loops look back on."""
    settled: Positive = 0.04
    """λ1: the outer loop ends once the window's accuracies lie within this."""
    moved: Positive = 0.03
    """λ2: the training of the network pauses once the window's accuracies spread by more than this."""
    max_outer: Count = 30
    """Most updates of the images a network."""
    max_inner: Count = 50
    """Most passes of training between two updates."""
    halve_at: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = (0.6, 0.8, 0.9)
    """Shares of the iterations after which `lr_images` is halved."""

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        """With loops as long as they are on CIFAR-10 at IPC 1, of which the shortest is a window."""
        outer, inner = min(1.6 * self.window, self.max_outer), min(2.0 * self.window, self.max_inner)
        matching = [Passes("library-forward", outer * classes, self.batch_real), Passes("library", outer * classes, ipc)]
        training = self.training(ipc * classes)
        query = Passes("forward", outer * (inner + 1), self.batch_query * classes)
        return [*matching, training._replace(times=training.times * outer * inner), query]

    def smoke(self) -> Self:
        return super().smoke().model_copy(update={"batch_query": 8, "window": 2, "max_outer": 3, "max_inner": 3})


class FrepoConfig(DistillConfig):
    """Neural feature regression with a pool (FRePo)."""

    iterations: Count = 500_000
    """Updates of images and labels, one network of the pool each."""
    batch_real: Count = 1024
    """Real images a step, of all classes."""
    lr: Positive = 3e-4
    """Step size of LAMB on images and labels; falls to a tenth along a cosine."""
    initialisation: Literal["random", "noise"] = "random"
    """Real images drawn at random, or standard normal noise in preprocessed units."""
    learn_labels: bool = True
    """Whether the labels are learned, too."""
    flip: bool = False
    """Whether the mirror images take part as further synthetic images (published for IPC 1)."""
    net: NetConfig = NetConfig(name="convnet-widening", norm="batch")
    """Network of the pool; the recipe's own `net` is that of the evaluation."""
    pool: Count = 10
    """Networks in the pool."""
    max_age: Count = 100
    """Training steps after which a network is replaced by a fresh one; the first ones start with staggered ages."""
    lr_net: Positive = 3e-4
    """Learning rate of the networks' Adam."""
    batch_train: Count = 500
    """Synthetic images a step of the networks' training."""
    ridge: Positive = 1e-6
    """λ of the regression, a share of the kernel's mean diagonal."""

    def adapted(self, *, ipc: int, depth: int, mirror: bool) -> Self:
        net = self.net.model_copy(update={"depth": depth})
        return self.model_copy(update={"net": net, "flip": self.flip and mirror and ipc == 1})

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        images = ipc * classes * (2 if self.flip else 1)
        learning = Passes("library", 1, images)
        training = Passes("library", 1, min(ipc * classes, self.batch_train))
        return [Passes("library-forward", 1, self.batch_real), learning, training]

    def smoke(self) -> Self:
        small = {"iterations": 10, "batch_real": 64, "pool": 2, "max_age": 5, "net": self.net.model_copy(update={"width": 8})}
        return self.model_copy(update=small)


class MatchingConfig(DistillConfig):
    """How a synthetic set is made to reproduce expert segments (paper IV-C, IV-D, Algorithm 2). Defaults are MTT's."""

    iterations: Count = 5000
    """Segments matched, one update of the images each."""
    student_steps: Count = 30
    """N, steps of the student in a segment."""
    expert_epochs: Count = 2
    """M, expert epochs that a segment spans."""
    max_start_epoch: Count = 20
    """T+, exclusive upper end of the start epochs."""
    min_start_epoch: Annotated[int, Field(ge=0)] = 0
    """Lowest start epoch (0 in the paper; others for Fig. 11)."""
    batch_syn: Count | None = None
    """Synthetic images a student step; left out: the whole set."""
    lr_images: Positive = 100.0
    """Step size of the images, in preprocessed units squared per unit of matching loss."""
    lr_alpha: Annotated[float, Field(ge=0)] = 1e-5
    """Step size of the student learning rate α."""
    alpha_init: Positive = 0.01
    """α at the start."""
    image_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Momentum of the SGD on images and α."""
    student_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of the student's inner SGD: 0 in the paper, 0.9 in the released code."""
    initialisation: Initialisation = "random"
    """Real images drawn at random; nearest to K-Means centroids of expert features (paper) or logits (released); or noise."""
    feature_epochs: Count | None = None
    """Epochs of the expert whose features are clustered (50 in the paper, trained for this where the experts are shorter);
    left out: the last recorded epoch of the first expert."""
    balanced_loss: Form = "off"
    """ν of Eq. 20: natural logarithm (paper), base 5 (released), or 1 (off)."""
    intermediate_matching: Form = "off"
    """Eq. 22: points after floor(kN/M) steps (paper), k floor(N/M) (released), or the final match alone."""
    intermediate_scale: Literal["equal", "ramp"] = "equal"
    """β of the intermediate terms: 1, or k/M for the k-th."""
    perturbation: Form = "off"
    """Eq. 23: one normalised draw a filter, scaled by rho (paper); one a 4-d layer, times the weight (released); or off."""
    rho: Positive = 0.1
    """Relative size of the paper's perturbation."""
    denominator: Literal["perturbed", "unperturbed"] = "perturbed"
    """Which start the denominators of Eq. 22 are measured from."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the student's starting weights set to zero after the perturbation (Fig. 11)."""
    soft_labels: SoftLabels = "off"
    """Class ids; logits of the target expert on the current images, renewed every iteration and held constant in the gradient
    (TESLA); or the same with the gradient going through the expert to the images (ours)."""
    image_ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the images that is the result (FTD); left out: the images themselves."""
    gradient: Mode = "adjoint"
    """Exact in the memory of one step; exact by plain autograd; or TESLA's approximation."""
    memory: Literal["auto", "keep", "recompute"] = "auto"
    """What the adjoint keeps of the forward sweep: as much as half of the free memory holds, everything, or nothing. The
    numbers are the same; keeping is faster."""
    precision: Literal["float32", "bfloat16-backward", "bfloat16"] = "float32"
    """Exact; bfloat16 convolutions in the backward sweep; or everywhere. The last two are approximations."""
    compile: bool = False
    """torch.compile the student's step where native kernels do not run: about a minute, then faster."""
    guard: Literal["on", "off"] = "on"
    """Skip a step whose loss or gradient is not finite or that would make α non-positive, and drop the momentum that led to it.
    Off only to study collapse."""
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
        if self.gradient == "graph" and self.precision != "float32":
            raise ValueError(f"gradient graph is plain autograd in float32, precision {self.precision} is for the adjoint")
        return self

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        batch = min(self.batch_syn or ipc * classes, ipc * classes)
        return [Passes(kind, self.student_steps, batch) for kind in ("gradient", "tangent")]

    def smoke(self) -> Self:
        small = {"iterations": 5, "student_steps": 6, "max_start_epoch": 2, "min_start_epoch": 0, "expert_epochs": 2}
        return self.model_copy(update={**small, "feature_epochs": None})

    @property
    def describing_epochs(self) -> int | None:
        """Epochs of the expert that the initialisation describes images with; None where any expert will do."""
        return self.feature_epochs if self.initialisation.startswith("representative") else None

    @property
    def epochs_needed(self) -> int:
        """Expert epochs that matching reads: T+ + M - 1."""
        return self.max_start_epoch + self.expert_epochs - 1


class TeslaConfig(MatchingConfig):
    """Trajectory matching by TESLA's gradient, with its labels."""

    iterations: Count = 10_000
    """Segments matched, one update of the images each."""
    soft_labels: SoftLabels = "expert"
    """Logits of the target expert, held constant."""
    gradient: Mode = "tesla"
    """Without the Hessian term."""


class FtdConfig(MatchingConfig):
    """Trajectory matching with flat experts, whose result is a moving average."""

    image_ema: Annotated[float, Field(gt=0, lt=1)] | None = 0.9995
    """Decay of the moving average of the images."""

    @classmethod
    def expert_defaults(cls) -> dict[str, Any]:
        """Plain SGD with GSAM."""
        return {**super().expert_defaults(), "gsam": {}}


class AstConfig(MatchingConfig):
    """Trajectory matching with the four parts of AST, in the paper's form."""

    initialisation: Initialisation = "representative"
    """Nearest to K-Means centroids of expert features (IV-C1)."""
    balanced_loss: Form = "paper"
    """ν of Eq. 20."""
    intermediate_matching: Form = "paper"
    """Eq. 22."""
    perturbation: Form = "paper"
    """Eq. 23."""

    @classmethod
    def expert_defaults(cls) -> dict[str, Any]:
        """Smooth, as `ExpertConfig` has them."""
        return {}
