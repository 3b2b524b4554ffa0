"""Every setting, typed and frozen. Unknown keys are refused; nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Form = Literal["off", "paper", "released"]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, no implicit conversion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class NetConfig(Settings):
    """A network by name; options left out take the network's own defaults."""

    name: str = "convnet"
    """A name of `dstill ls networks`, or the user's own `package.module:Class` taking (channels, classes, size, **options)."""
    width: Count | None = None
    """Channels of each convolution (ConvNet)."""
    depth: Count | None = None
    """Number of blocks, each halving the side (ConvNet)."""
    norm: Literal["instance", "group", "batch", "layer", "none"] | None = None
    """Normalisation after each convolution (ConvNet)."""


class GsamConfig(Settings):
    """Surrogate-gap sharpness-aware minimisation, for FTD's flat experts."""

    rho: Positive = 0.01
    """Radius of the (adaptive) ascent step."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the descent along the part of the gradient that is orthogonal to the perturbed one."""


class ExpertConfig(Settings):
    """How expert trajectories are trained (paper IV-B, Eq. 19, Algorithm 1)."""

    count: Count = 50
    """Number of experts."""
    epochs: Count | None = None
    """Passes over the real training set, one record each; left out: what the matching needs, T+ + M - 1."""
    planned_epochs: Count = 50
    """The E that the learning-rate step at E/2 refers to, also where fewer epochs are trained."""
    optimiser: Literal["sgd", "adam"] = "sgd"
    """`sgd` with `momentum`, or Adam."""
    lr: Positive = 0.003
    """Learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    """L2 coefficient added to the gradient."""
    batch_size: Count = 256
    """Real images a step."""
    clipped_loss: Form = "paper"
    """λ of Eq. 19: over 5 epochs (paper), over 10 (released), or off."""
    gradient_penalty: Form = "paper"
    """Second term of Eq. 19: norm over a sample, μ = 1 (paper); over channels at each pixel, μ = 2 (released); or off."""
    lr_step: Form = "paper"
    """Halved at epoch E/2 (paper); times 0.6 after epoch E/2 + 1 with the momentum lost (released); or never."""
    gsam: GsamConfig | None = None
    """Flat minima by GSAM (FTD); left out: plain gradients."""
    store: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which trajectories are stored."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the convolutions' products (ConvNet with instance norm); bfloat16 is an approximation."""
    compile: bool = False
    """torch.compile the training step where native CPU kernels do not run: about a minute, then faster."""


class MatchingConfig(Settings):
    """How a synthetic set is made to reproduce expert segments (paper IV-C, IV-D, Algorithm 2)."""

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
    initialisation: Literal["random", "representative", "representative-released", "noise"] = "random"
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
    soft_labels: Literal["off", "expert"] = "off"
    """Class ids, or logits of the target expert on the current images, renewed every iteration (TESLA)."""
    image_ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the images that is the result (FTD); left out: the images themselves."""
    gradient: Literal["adjoint", "graph", "tesla"] = "adjoint"
    """Exact in the memory of one step; exact by plain autograd; or TESLA's approximation."""
    memory: Literal["auto", "keep", "recompute"] = "auto"
    """What the adjoint keeps of the forward sweep: as much as half of the free memory holds, everything, or nothing. The
    numbers are the same; keeping is faster."""
    precision: Literal["float32", "bfloat16-backward", "bfloat16"] = "float32"
    """Exact; bfloat16 convolutions in the backward sweep; or everywhere. The last two are approximations."""
    compile: bool = False
    """torch.compile the student's step where native CPU kernels do not run: about a minute, then faster."""
    guard: Literal["on", "off"] = "on"
    """Skip a step whose loss or gradient is not finite or that would make α non-positive. Off only to study collapse."""
    max_skip_share: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The run stops with advice once more than this share of the steps, and at least 10, has been skipped."""

    @model_validator(mode="after")
    def _consistent(self) -> MatchingConfig:
        if self.min_start_epoch >= self.max_start_epoch:
            raise ValueError(f"min_start_epoch {self.min_start_epoch} must be below max_start_epoch {self.max_start_epoch}")
        if self.student_steps < self.expert_epochs:
            raise ValueError(f"student_steps {self.student_steps} must be at least expert_epochs {self.expert_epochs}")
        return self

    @property
    def epochs_needed(self) -> int:
        """Expert epochs that matching reads: T+ + M - 1."""
        return self.max_start_epoch + self.expert_epochs - 1


class Recipe(Settings):
    """All settings of one result: a file `recipes/<data>/<method>-ipc<k>.yaml`, or your own."""

    data: str
    """Data set that the settings were made for."""
    method: str
    """A name of `dstill ls methods`."""
    ipc: Count
    """Synthetic images per class."""
    note: str = ""
    """Where the settings come from."""
    preprocess: Literal["standardise", "zca"] = "standardise"
    """Channel standardisation, or ZCA whitening, fitted on the training part."""
    augmentation: str = "colour_crop_cutout_flip_scale_rotate"
    """DSA operations joined by `_`, or `none`."""
    net: NetConfig = NetConfig()
    """Network of experts, student and evaluation."""
    experts: ExpertConfig | None = None
    """Expert trajectories; left out by methods that need none."""
    distill: MatchingConfig | None = None
    """Trajectory matching; left out by selection methods."""
    protocol: str = "ast"
    """Evaluation protocol, a name of `dstill ls protocols`."""

    @property
    def expert_config(self) -> ExpertConfig:
        """The experts' settings with `epochs` filled in: no more than the matching needs unless asked."""
        experts = self.experts or ExpertConfig()
        if experts.epochs is not None:
            return experts
        epochs = self.distill.epochs_needed if self.distill else experts.planned_epochs
        return experts.model_copy(update={"epochs": epochs})


class Protocol(Settings):
    """An evaluation protocol: versioned data, a file of `evaluation/protocol_files`."""

    name: str
    """Name that every result carries."""
    version: Count
    """Raised whenever a number below changes."""
    passes: Count
    """Passes over the synthetic set."""
    batch_size: Count
    """Synthetic images a step."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)]
    """L2 coefficient."""
    lr: Positive
    """Learning rate of sets that carry no learned α."""
    lr_factor: Positive
    """Factor on the learning rate at half of the passes."""
    networks: Count
    """Fresh networks trained and measured."""


def canonical(settings: Settings, **exclude: Any) -> dict[str, Any]:
    """Settings as plain JSON values, in the order of their fields."""
    return settings.model_dump(mode="json", **exclude)
