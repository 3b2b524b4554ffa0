"""All settings, typed and frozen. Unknown keys are refused. Importing this does not import torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from dstill.config.registry import load_method
from dstill.data.catalog import Shape

Form = Literal["off", "paper", "released"]
Precision = Literal["float32", "bfloat16-backward", "bfloat16"]
Positive = Annotated[float, Field(gt=0)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
# More than anyone can wait for or store, yet small enough for every integer type.
Count = Annotated[int, Field(ge=1, le=10**9)]


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown keys, finite numbers, no implicit conversion of strings to numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


class NetConfig(Settings):
    """A network by name; options left out take the network's own defaults."""

    name: str = "convnet"
    """A name of `dstill ls networks`, `timm:NAME` for a network of timm, or your own `package.module:Class`, which takes
    (channels, classes, size, **options)."""
    width: Count | None = None
    """Channels of each convolution (ConvNet)."""
    depth: Count | None = None
    """Number of blocks, each halving the side (ConvNet)."""
    norm: Literal["instance", "group", "batch", "layer", "none"] | None = None
    """Normalisation after each convolution (ConvNet)."""


class GsamConfig(Settings):
    """Surrogate-gap sharpness-aware minimisation, for FTD's flat experts."""

    rho: Positive = 0.01
    """Radius of the adaptive ascent step."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the part of the gradient that is orthogonal to the perturbed one."""


class ExpertConfig(Settings):
    """How expert trajectories are trained (paper IV-B, Eq. 19, Algorithm 1)."""

    count: Count = 50
    """Number of experts."""
    epochs: Count | None = None
    """Passes over the real training set, each recorded; left out: as many as matching needs, T+ + M - 1."""
    planned_epochs: Count = 50
    """The E of the learning-rate step at E/2, even if fewer epochs are trained."""
    optimiser: Literal["sgd", "adam"] = "sgd"
    """`sgd` with `momentum`, or Adam."""
    lr: Positive = 0.003
    """Learning rate."""
    momentum: Momentum = 0.9
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-3
    """L2 coefficient added to the gradient."""
    batch_size: Count = 256
    """Real images per step."""
    clipped_loss: Form = "paper"
    """λ of Eq. 19: grows over 5 epochs (paper) or over 10 (released), or off."""
    gradient_penalty: Form = "paper"
    """Second term of Eq. 19: norm over a sample, μ = 1 (paper); over the channels at each pixel, μ = 2 (released); or off."""
    lr_step: Form = "paper"
    """Learning rate: halved at epoch E/2 (paper); times 0.6 after epoch E/2 + 1, momentum reset (released); or constant."""
    gsam: GsamConfig | None = None
    """GSAM for flat minima (FTD); left out: plain gradients."""
    store: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type in which trajectories are stored."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the convolutions' products (ConvNet with instance norm); bfloat16 is an approximation."""
    compile: bool = False
    """torch.compile the training step where native kernels do not run. It takes about a minute; then steps are faster."""


class TrainingConfig(Settings):
    """Plain training of one network on all real images, by SGD and without augmentation."""

    epochs: Annotated[int, Field(ge=0, le=10**9)] = 30
    """Passes over the real training set; 0 for a network as it was initialised."""
    lr: Positive = 0.01
    """Learning rate."""
    momentum: Momentum = 0.9
    """Momentum."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 coefficient added to the gradient."""
    batch_size: Count = 256
    """Real images per step."""


class Passes(NamedTuple):
    """How often a batch passes through a network, to estimate the cost of a run.

    Attributes:
        kind: `forward`, `gradient` (forward and backward) or `tangent` (only the second order), by the hand-written
            derivatives if the network has them. `library-forward` and `library` are the first two by torch, for methods
            that cannot use those derivatives.
        times: passes per iteration.
        images: images in the batch.
        net: the network; None for the recipe's.
        precision: precision of the convolutions.
    """

    kind: Literal["forward", "gradient", "tangent", "library-forward", "library"]
    times: float
    images: int
    net: NetConfig | None = None
    precision: Precision = "float32"


class Case(NamedTuple):
    """A case without a recipe, for which settings are derived.

    Attributes:
        shape: shape of the real data.
        ipc: images per class.
        net: the network, with its depth.
        mirror: whether a mirrored image keeps its class.
        memory: memory of the device in bytes.
    """

    shape: Shape
    ipc: int
    net: NetConfig
    mirror: bool
    memory: float

    def steps_in_memory(self, steps: int, vectors: int) -> int:
        """At most `steps` steps of a student, of which a quarter of the memory holds `vectors` parameter vectors each."""
        (channels, size, classes), width, depth = self.shape[:3], self.net.width or 128, self.net.depth or 1
        last = math.prod(max(1, side >> depth) for side in size)
        parameters = 9 * width * (channels + width * (depth - 1)) + 3 * width * depth + (width * last + 1) * classes
        return int(min(steps, 0.25 * self.memory / (4 * parameters * vectors)))


class DistillConfig(Settings):
    """Base of a method's settings, the section `distill` of its recipes.

    The settings also tell the rest of dstill what it must know about a method before a run. All of this has defaults, so that
    a method overrides only what differs.
    """

    iterations: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Updates of the synthetic set; 0 for methods that select real images."""
    parts: Count = 1
    """Images in a stored one along each side: with 2, a stored image holds four, and IPC k trains as 4 k images per class."""

    draws: Count = 1
    """Independent draws that an update averages, of whatever the method leaves to chance: a segment, a network, a training.
    Processes share them."""
    draw_scaling: Literal["none", "root", "linear"] = "root"
    """Factor on the step sizes for K draws: none, √K, or K."""

    optimises_images: ClassVar[bool] = False
    """Whether the method optimises images through `Problem.decoded`, so that a stored image may hold several."""
    late: ClassVar[frozenset[str]] = frozenset({"parts", "draws", "draw_scaling"})
    """Settings that were added later. Where one has its default, files do not mention it, so that runs and caches from before
    stay what they are."""
    worthwhile: ClassVar[int] = 300
    """Iterations that a budget must leave for the recipe's own form and width to be kept."""
    fewest: ClassVar[int] = 50
    """Iterations that a budget must leave, or else the quickest forms of the settings are tried, however much they lose."""
    search_factors: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    """Settings that `tune` searches, with the factors to multiply them by; if empty, the method cannot be tuned."""

    @model_validator(mode="after")
    def _parts_are_optimised(self) -> Self:
        if self.parts > 1 and not self.optimises_images:
            raise ValueError("parts is for methods that optimise images, and this one takes images as they are: leave it at 1")
        return self

    @model_serializer(mode="wrap")
    def _without_late_defaults(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = plain(self)
        fields = type(self).model_fields
        return {key: value for key, value in values.items() if key not in self.late or value != fields[key].default}

    @property
    def draw_factor(self) -> float:
        """The factor on the step sizes that belongs to `draws`, see `draw_scaling`."""
        power = {"none": 0.0, "root": 0.5, "linear": 1.0}[self.draw_scaling]
        return float(self.draws**power)

    @classmethod
    def expert_defaults(cls) -> dict[str, Any]:
        """Defaults of the `experts` section that differ from those of `ExpertConfig`."""
        return {}

    @property
    def epochs_needed(self) -> int | None:
        """Expert epochs that the method reads; None if it does not say."""
        return None

    @property
    def describing_epochs(self) -> int | None:
        """Epochs of the expert whose features the initialisation uses; None if any expert will do."""
        return None

    @property
    def starts_from_representatives(self) -> bool:
        """Whether the synthetic set starts from real images chosen by an expert's features."""
        return False

    @property
    def network_training(self) -> TrainingConfig:
        """How the networks of methods that need trained ones are trained."""
        return TrainingConfig()

    @property
    def network_count(self) -> int:
        """How many such networks the method needs; they differ in their initial weights and in the order of the images."""
        return 1

    def adapted(self, case: Case) -> Self:
        """These settings adapted to a case that they were not written for."""
        return self

    def fitted(self, case: Case) -> tuple[Self, str]:
        """These settings reduced to fit other data and the memory, and a remark on what was reduced, or an empty string."""
        return self, ""

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        """The approximate cost of one iteration, or of one of its `draws`; empty for selection methods.

        Args:
            ipc: images per class that networks are trained on, see `Recipe.decoded_ipc`.
            classes: number of classes.
        """
        return []

    def scaled(self, factors: Mapping[str, float], longest: int | None) -> Self:
        """These settings with those in `search_factors` multiplied; T+ stays within experts of `longest` epochs."""
        return self.model_copy(update={name: getattr(self, name) * factor for name, factor in factors.items()})

    def quicker(self, ipc: int) -> Self | None:
        """The next quicker form of these settings, for a budget that does not allow for them; None if there is none.

        Args:
            ipc: images per class that networks are trained on.
        """
        return None

    def smoke(self) -> Self:
        """These settings reduced to a run of seconds."""
        return self.model_copy(update={"iterations": min(self.iterations, 5)})


class Recipe(Settings):
    """All settings of one result: a file `recipes/<data>/<method>-ipc<k>.yaml`, or your own."""

    data: str
    """Data set that the settings were made for; only a note."""
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
    """Expert trajectories; left out for methods that need none."""
    distill: Annotated[SerializeAsAny[DistillConfig], Field(validate_default=True)] = DistillConfig()
    """The method's own settings; the method's class of settings defines keys and defaults."""
    protocol: str = "ast"
    """Evaluation protocol, a name of `dstill ls protocols`."""

    @field_validator("experts", mode="before")
    @classmethod
    def _experts_of_the_method(cls, section: Any, info: ValidationInfo) -> Any:
        """Completes the section with the method's own defaults, since methods differ in how they train experts."""
        if not isinstance(section, dict) or "method" not in info.data:
            return section
        return {**settings_class(info.data["method"]).expert_defaults(), **section}

    @field_validator("distill", mode="before")
    @classmethod
    def _settings_of_the_method(cls, section: Any, info: ValidationInfo) -> Any:
        """Reads `distill` as an instance of the method's settings class."""
        if "method" not in info.data:
            return DistillConfig()  # the error message is about the missing method
        wanted = settings_class(info.data["method"])
        if type(section) is wanted:
            return section
        if isinstance(section, DistillConfig) and issubclass(wanted, type(section)):
            # A base class such as MatchingConfig determines all its fields, DistillConfig only those that were set.
            section = section.model_dump(exclude_unset=type(section) is DistillConfig)
        if isinstance(section, DistillConfig):
            raise ValueError(f"method {info.data['method']!r} takes a {wanted.__name__}, not a {type(section).__name__}")
        return wanted.model_validate({} if section is None else section)

    @property
    def decoded_ipc(self) -> int:
        """Images per class that networks are trained on: more than are stored, if stored images hold several."""
        return self.ipc * self.distill.parts**2

    @property
    def expert_config(self) -> ExpertConfig:
        """The experts' settings with `epochs` filled in: as many as matching needs, unless they are set."""
        experts = self.experts or ExpertConfig(**self.distill.expert_defaults())
        if experts.epochs is not None:
            return experts
        return experts.model_copy(update={"epochs": self.distill.epochs_needed or experts.planned_epochs})

    def describing_expert(self, epochs: int) -> ExpertConfig | None:
        """The one longer expert that the initialisation needs beside experts of `epochs` epochs; None if those suffice."""
        wanted = self.distill.describing_epochs
        if wanted is None or epochs >= wanted:
            return None
        return self.expert_config.model_copy(update={"count": 1, "epochs": wanted})


class Protocol(Settings):
    """An evaluation protocol, a versioned file in `evaluation/protocol_files`."""

    name: str
    """Name that is recorded in every result."""
    version: Count
    """Raised whenever a number below changes."""
    passes: Count
    """Passes over the synthetic set."""
    batch_size: Count
    """Synthetic images per step."""
    loss: Literal["cross-entropy", "squared"] = "cross-entropy"
    """Cross-entropy, or the mean squared error to the label probabilities minus 1/K, divided by √(K/10) (FRePo)."""
    optimiser: Literal["sgd", "adam"] = "sgd"
    """`sgd` with `momentum`, or Adam."""
    momentum: Momentum
    """Momentum of SGD."""
    weight_decay: Annotated[float, Field(ge=0)]
    """L2 coefficient."""
    lr: Positive
    """Learning rate for sets without a learned α, and for Adam."""
    schedule: Literal["step", "cosine"] = "step"
    """Times `lr_factor` at half of the passes; or raised over `warmup` passes, then lowered to 0 along half a cosine."""
    lr_factor: Positive = 1.0
    """Factor on the learning rate at half of the passes."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Passes over which the cosine schedule raises the learning rate."""
    networks: Count
    """Fresh networks trained and measured."""


def settings_class(method: str) -> type[DistillConfig]:
    """The class of a method's `distill` section.

    Raises:
        DstillError: the method is unknown, or cannot be imported.
    """
    found: type[DistillConfig] = load_method(method).Settings
    return found


def digest(values: Mapping[str, Any]) -> str:
    """A name for plain JSON values: the first 16 hex digits of their SHA-256. The order of the keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def canonical(settings: Settings, **exclude: Any) -> dict[str, Any]:
    """Settings as plain JSON values, in the order of their fields."""
    return settings.model_dump(mode="json", **exclude)
