"""The interface of a method: what it receives, the state it keeps, and what it returns."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.config.registry import MethodInfo, load_method
from dstill.config.settings import DistillConfig, NetConfig, Recipe
from dstill.data import formation
from dstill.data.catalog import Shape
from dstill.data.preprocess import Preprocess, from_bytes
from dstill.data.real import RealSet
from dstill.experts.trained import TrainedNetwork
from dstill.experts.trajectory import Trajectories
from dstill.nets import networks as nets
from dstill.support import seeding
from dstill.support.crew import ALONE, Crew

# Everything that a resumed run needs, by name; `step` replaces entries in place.
State = dict[str, Tensor]
Metrics = dict[str, float]
_Settings = TypeVar("_Settings", bound=DistillConfig)


@dataclass(frozen=True)
class Problem:
    """What a method works on.

    A method keeps and updates stored images. Networks see `decoded` ones, of which a stored image may hold several, with the
    labels of `labels`. A gradient by decoded images that autograd did not compute goes through `pulled_back`.

    Attributes:
        real: real data.
        preprocess: preprocessing, fitted on the training images.
        recipe: the resolved settings.
        trajectories: expert trajectories, for methods that need them.
        device: where tensors live.
        seed: master seed of all random draws; recorded in the result.
        feature_expert: the expert whose last epoch gives the features of real images; the first of `trajectories` if left out.
        trained: the recipe's network trained on all real images, as often as the method asks; empty if it needs none.
        initial: a set whose images are the start of the synthetic set, instead of the recipe's initialisation.
        streams: how many draws of an iteration an NVIDIA card runs side by side, if the method unrolls a student.
    """

    real: RealSet
    preprocess: Preprocess
    recipe: Recipe
    trajectories: Trajectories | None
    device: torch.device
    seed: int
    feature_expert: Trajectories | None = None
    trained: tuple[TrainedNetwork, ...] = ()
    initial: DistilledSet | None = None
    streams: int = 1

    def settings(self, kind: type[_Settings]) -> _Settings:
        """The recipe's `distill` section, which is an instance of the method's settings class."""
        found = self.recipe.distill
        assert isinstance(found, kind), f"{self.recipe.method} has {type(found).__name__} for settings, not {kind.__name__}"
        return found

    def prepared(self, rows: Tensor) -> Tensor:
        """Preprocessed real training images of these rows, float32 on the device."""
        return from_bytes(self.preprocess, self.real.train.images[rows], self.device)

    def network(self, weights: Tensor | None = None) -> nn.Module:
        """A network of the recipe's kind with these weights `[P]`; without them, its weights are placeholders."""
        net = self.fresh_network(seeding.generator(self.seed, "skeleton"))
        if weights is not None:
            nn.utils.vector_to_parameters(weights.to(self.device), net.parameters())
        return net

    def fresh_network(self, generator: torch.Generator, config: NetConfig | None = None) -> nn.Module:
        """A network of the recipe's kind, or of `config`, with random weights."""
        real = self.real
        return nets.build(config or self.recipe.net, real.channels, real.classes, real.size, generator).to(self.device)

    def trained_network(self) -> nn.Module:
        """The recipe's network, trained on all real images; the first one if there are several."""
        return self.network(self.trained[0].weights)

    def trained_networks(self) -> Iterator[nn.Module]:
        """The recipe's network, trained as often as `DistillConfig.network_count` says."""
        return (self.network(trained.weights) for trained in self.trained)

    @property
    def decoded_count(self) -> int:
        """Number of images that networks are trained on, of all classes."""
        return self.real.classes * self.recipe.decoded_ipc

    def decoded(self, images: Tensor) -> Tensor:
        """What networks see of stored images `[S, C, H, W]`, see `formation.decode`; differentiable."""
        return formation.decode(images, self.recipe.distill.parts)

    def pulled_back(self, gradient: Tensor) -> Tensor:
        """The gradient by stored images, from that by decoded ones."""
        return formation.pull_back(gradient, self.recipe.distill.parts)

    def labels(self) -> Tensor:
        """Class ids of the decoded images, class by class: `decoded_ipc` of each."""
        return torch.arange(self.real.classes).repeat_interleave(self.recipe.decoded_ipc).to(self.device)

    def result(self, images: Tensor, labels: Tensor, alpha: float | None) -> DistilledSet:
        """Makes a distilled set.

        Args:
            images: stored images, class by class.
            labels: labels in the order of `labels()`. Class ids are stored once for each stored image, other labels for
                each decoded one.
            alpha: learned learning rate, if there is one.
        """
        recipe, parts = self.recipe, self.recipe.distill.parts
        return DistilledSet(
            images=images.detach().cpu().clone(),
            labels=(labels if labels.is_floating_point() else labels[:: parts**2]).detach().cpu().clone(),
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
            parts=parts,
        )


class Method(abc.ABC):
    """A distillation method; `dstill.distillation.loop` runs it.

    A method must define the three abstract functions. The rest is what dstill asks before a run; the defaults suit most
    methods.
    """

    info: ClassVar[MethodInfo | None] = None
    """The entry in the table of methods, for a method outside dstill; an entry point may refer to it."""
    Settings: ClassVar[type[DistillConfig]] = DistillConfig
    """Class of the `distill` section in its recipes."""
    starts_from_a_set: ClassVar[bool] = True
    """Whether it can start from the images of another set."""
    averages_draws: ClassVar[bool] = False
    """Whether its updates average `DistillConfig.draws` draws."""
    crew: Crew = ALONE
    """The processes that share the draws, seen from this one; the loop sets it."""

    def start(self, problem: Problem) -> None:
        """Builds everything that is not state. Called at the start of every run, also of a resumed one."""
        self.problem = problem

    @abc.abstractmethod
    def initialise(self, generator: torch.Generator) -> State:
        """The state before the first step."""

    def iterations(self) -> int:
        """Number of steps; 0 for selection methods."""
        return self.problem.recipe.distill.iterations

    @abc.abstractmethod
    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        """One update of `state`. `generator` depends only on seed and iteration, so a resumed run makes the same draws."""

    @abc.abstractmethod
    def result(self, state: State) -> DistilledSet:
        """The distilled set of this state."""

    @classmethod
    def check(cls, recipe: Recipe, network: nn.Module) -> None:
        """Checks beforehand what `start` would otherwise refuse only after the experts are trained.

        Args:
            recipe: the resolved settings.
            network: a network of the recipe's kind.

        Raises:
            DstillError: the method cannot work with this network or these settings.
        """
        return None  # most methods accept everything

    @classmethod
    def peak_bytes(cls, recipe: Recipe, shape: Shape, device: torch.device, students: int = 1) -> float:
        """Estimates the memory of one iteration, for this number of unrolled students side by side, where there are any.

        By default this is what torch holds for the largest batch: four copies of the first block's feature maps, which are by
        far the largest. With a gradient, torch keeps the maps of every block; without one, it needs working memory. Both are
        the same within a factor of two.
        """
        work = recipe.distill.work(ipc=recipe.decoded_ipc, classes=shape.classes)
        batches = [(passes.net or recipe.net, passes.images) for passes in work if passes.kind != "forward"]
        return max((library_bytes(net, images, shape) for net, images in batches), default=0.0)

    @classmethod
    def engine(cls, problem: Problem) -> str:
        """How gradients are computed and whether they are exact, for the log; empty if there is no choice."""
        return ""


def library_bytes(net: NetConfig, images: int, shape: Shape) -> float:
    """Memory that torch holds for a batch in float32; see `Method.peak_bytes`."""
    return 4 * images * 4 * (net.width or 128) * math.prod(shape.size)


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        DstillError: the name is unknown, or the class cannot be imported, or is not a `Method`.
    """
    found: type[Method] = load_method(name)
    return found
