"""The interface of a method: what it is given, what it keeps, what it returns."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.config.registry import MethodInfo, load_method
from dstill.config.settings import DistillConfig, NetConfig, Recipe
from dstill.data.catalog import Shape
from dstill.data.preprocess import Preprocess, from_bytes
from dstill.data.real import RealSet
from dstill.experts.trained import TrainedNetwork
from dstill.experts.trajectory import Trajectories
from dstill.nets import networks as nets
from dstill.support import seeding

# Everything that must survive a restart, by name; `step` replaces entries in place.
State = dict[str, Tensor]
Metrics = dict[str, float]
_Settings = TypeVar("_Settings", bound=DistillConfig)


@dataclass(frozen=True)
class Problem:
    """What a method works on.

    Attributes:
        real: real data.
        preprocess: fitted on its training part.
        recipe: the resolved settings.
        trajectories: expert trajectories, for methods that need them.
        device: where tensors live.
        seed: decides every draw; recorded in the result.
        feature_expert: the trajectory whose last epoch describes real images; the first of `trajectories` if left out.
        trained: the recipe's network trained on all real images, for methods that need it.
        initial: a set whose images the synthetic set starts from, instead of the recipe's initialisation.
    """

    real: RealSet
    preprocess: Preprocess
    recipe: Recipe
    trajectories: Trajectories | None
    device: torch.device
    seed: int
    feature_expert: Trajectories | None = None
    trained: TrainedNetwork | None = None
    initial: DistilledSet | None = None

    def settings(self, kind: type[_Settings]) -> _Settings:
        """The recipe's `distill` section, which is of the class that the method's table entry names."""
        found = self.recipe.distill
        assert isinstance(found, kind), f"{self.recipe.method} has {type(found).__name__} for settings, not {kind.__name__}"
        return found

    def prepared(self, rows: Tensor) -> Tensor:
        """Preprocessed real training images of these rows, float32 on the device."""
        return from_bytes(self.preprocess, self.real.train.images[rows], self.device)

    def network(self, weights: Tensor | None = None) -> nn.Module:
        """A network of the recipe's kind with these weights `[P]`; left out, they mean nothing yet."""
        net = self.fresh_network(seeding.generator(self.seed, "skeleton"))
        if weights is not None:
            nn.utils.vector_to_parameters(weights.to(self.device), net.parameters())
        return net

    def fresh_network(self, generator: torch.Generator, config: NetConfig | None = None) -> nn.Module:
        """A network of the recipe's kind, or another, with random weights."""
        real = self.real
        return nets.build(config or self.recipe.net, real.channels, real.classes, real.size, generator).to(self.device)

    def trained_network(self) -> nn.Module:
        """The recipe's network as it is after training on all real images."""
        assert self.trained is not None
        return self.network(self.trained.weights)

    def labels(self) -> Tensor:
        """Class ids of a synthetic set, `ipc` of each class in turn."""
        return torch.arange(self.real.classes).repeat_interleave(self.recipe.ipc).to(self.device)

    def result(self, images: Tensor, labels: Tensor, alpha: float | None) -> DistilledSet:
        """Wraps tensors of `labels()` order as a distilled set."""
        recipe = self.recipe
        return DistilledSet(
            images=images.detach().cpu().clone(),
            labels=labels.detach().cpu().clone(),
            alpha=alpha,
            preprocess=self.preprocess,
            method=recipe.method,
            ipc=recipe.ipc,
            class_names=self.real.class_names,
            augmentation=recipe.augmentation,
            net=recipe.net,
            data=self.real.name,
            data_fingerprint=self.real.fingerprint,
            recipe=recipe,
            seed=self.seed,
        )


class Method(abc.ABC):
    """A distillation method; `dstill.distillation.loop` runs it.

    The three abstract functions are the method. The rest is what dstill asks about it beforehand, with answers that suit
    most methods.
    """

    info: ClassVar[MethodInfo | None] = None
    """What the table of methods says of it, where it is not dstill's own; an entry point may name it."""
    Settings: ClassVar[type[DistillConfig]] = DistillConfig
    """Class of the `distill` section of its recipes."""
    starts_from_a_set: ClassVar[bool] = True
    """Whether it can start from the images of another set."""

    def start(self, problem: Problem) -> None:
        """Called on every launch, also when a run is resumed: builds what is not state."""
        self.problem = problem

    @abc.abstractmethod
    def initialise(self, generator: torch.Generator) -> State:
        """The state before the first step."""

    def iterations(self) -> int:
        """Number of steps; 0 for selection methods."""
        return self.problem.recipe.distill.iterations

    @abc.abstractmethod
    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        """One update of `state`; `generator` depends on seed and iteration alone, so a resumed run draws the same."""

    @abc.abstractmethod
    def result(self, state: State) -> DistilledSet:
        """The distilled set of this state."""

    @classmethod
    def check(cls, recipe: Recipe, network: nn.Module) -> None:
        """Refuses early what `start` would refuse after the experts are trained.

        Args:
            recipe: the resolved settings.
            network: a network of the recipe's kind.

        Raises:
            DstillError: the method cannot work with this network or these settings.
        """
        return None  # most methods refuse nothing

    @classmethod
    def peak_bytes(cls, recipe: Recipe, shape: Shape, device: torch.device) -> float:
        """About how much memory one iteration takes.

        By default that is what the library holds of the largest batch: four copies of the first block's maps, by far the
        largest. For a gradient the library keeps the maps of every block, and without one it needs room to work: that is the
        same within a factor of two.
        """
        work = recipe.distill.work(ipc=recipe.ipc, classes=shape.classes)
        batches = [(passes.net or recipe.net, passes.images) for passes in work if passes.kind != "forward"]
        return max((library_bytes(net, images, shape) for net, images in batches), default=0.0)

    @classmethod
    def engine(cls, problem: Problem) -> str:
        """What computes the gradients and whether they are exact, for the log; empty where there is no choice."""
        return ""


def library_bytes(net: NetConfig, images: int, shape: Shape) -> float:
    """What the library holds of a batch in float32; see `Method.peak_bytes`."""
    return 4 * images * 4 * (net.width or 128) * math.prod(shape.size)


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        DstillError: the name is unknown, or the class cannot be imported, or is no `Method`.
    """
    found: type[Method] = load_method(name)
    return found
