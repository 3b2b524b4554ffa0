"""Methods whose updates average independent draws.

A draw is whatever an update leaves to chance: a segment of an expert, a fresh network, a batch of real images. Draw k of an
iteration depends on the seed, the iteration and k alone, and an update sums the draws in the order of their numbers. So it
does not matter which process computes which draw.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from dstill.methods.base import Method, Metrics, State
from dstill.support import seeding
from dstill.support.crew import Parcel


@dataclass(frozen=True)
class Drawn:
    """What a draw contributes to an update.

    Attributes:
        gradients: gradients by what is learned, under the names of the state.
        metrics: what the log receives at the end of the draw.
        kept: tensors that the method stores beside what it learns.
        last: whether the draw ends here. A draw that trains its network between updates contributes to several.
    """

    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    last: bool = True


@dataclass(frozen=True)
class Told:
    """What every process knows of a draw. Its gradients are known to the process that took it.

    Attributes:
        number: number of the draw within its iteration.
        metrics, kept, last: as in `Drawn`.
        sound: whether its loss and gradients are finite.
        shapes: shapes of its gradients.
    """

    number: int
    metrics: Metrics = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    last: bool = True
    sound: bool = True
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @staticmethod
    def parcel(drawn: Drawn) -> Parcel:
        """What other processes must know of a draw, for `of`."""
        norms = [float(gradient.norm()) for gradient in drawn.gradients.values()]
        sound = all(map(math.isfinite, (drawn.metrics.get("loss", 0.0), *norms)))
        shapes = {name: list(gradient.shape) for name, gradient in drawn.gradients.items()}
        return Parcel({"metrics": drawn.metrics, "last": drawn.last, "sound": sound, "shapes": shapes}, dict(drawn.kept))

    @classmethod
    def of(cls, number: int, parcel: Parcel, device: torch.device) -> Self:
        """What `parcel` was called for, with tensors on a device."""
        return cls(number, kept={name: tensor.to(device) for name, tensor in parcel.tensors.items()}, **parcel.values)


_NAMING = ("start_epoch", "expert")  # metrics that say which segment a draw took

Mean = Callable[[Sequence[Told]], dict[str, Tensor]]
"""The mean gradients of some draws, by what is learned; at least one. All processes ask for the same draws."""


class DrawingMethod(Method):
    """A method that averages `DistillConfig.draws` draws in an update."""

    averages_draws: ClassVar[bool] = True

    @abc.abstractmethod
    def draw(self, state: State, iteration: int, number: int, generator: torch.Generator) -> Iterator[Drawn]:
        """Takes a draw: yields what it contributes to an update, and goes on after the update unless that was the last.

        Args:
            state: the state, which each update changes in place. A draw only reads it.
            iteration: number of the iteration.
            number: number of the draw within it.
            generator: makes all random choices of the draw.
        """

    @abc.abstractmethod
    def update(self, state: State, iteration: int, drawn: Sequence[Told], mean: Mean) -> Metrics:
        """Changes `state` by the mean of these draws, at least one, and returns what the log should know about it."""

    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        """Takes the draws of an iteration and updates `state` until all of them have ended."""
        share = self.crew.share(self.problem.recipe.distill.draws)
        own = {k: self.draw(state, iteration, k, self._source(iteration, k, generator)) for k in share}
        ended = dict[int, Metrics]()
        while True:
            taken = self.taken(own)
            parcels = self.crew.gathered({k: Told.parcel(drawn) for k, drawn in taken.items()})
            drawn = [Told.of(k, parcel, self.problem.device) for k, parcel in parcels.items()]
            told = self.update(state, iteration, drawn, functools.partial(self._mean, taken))
            ended |= {one.number: one.metrics for one in drawn if one.last}
            if all(one.last for one in drawn):
                return {**mean_metrics([ended[k] for k in sorted(ended)]), **told}
            own = {k: draw for k, draw in own.items() if k not in ended}

    def taken(self, draws: Mapping[int, Iterator[Drawn]]) -> dict[int, Drawn]:
        """What each of these draws contributes to the next update."""
        return {k: next(draw) for k, draw in draws.items()}

    def _mean(self, taken: Mapping[int, Drawn], drawn: Sequence[Told]) -> dict[str, Tensor]:
        own = {k: one.gradients for k, one in taken.items()}
        means = self.crew.mean([one.number for one in drawn], own, drawn[0].shapes)
        return {name: mean.to(self.problem.device) for name, mean in means.items()}

    def _source(self, iteration: int, number: int, first: torch.Generator) -> torch.Generator:
        """The generator of a draw; `first` is that of draw 0."""
        return first if number == 0 else seeding.generator(self.problem.seed, "step", iteration, number)


def mean_metrics(rows: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over the rows that have it. Those that name a segment have none.

    Example:
        >>> mean_metrics([{"loss": 1.0, "cosine": 0.5, "expert": 3}, {"loss": 2.0, "expert": 8}])
        {'loss': 1.5, 'cosine': 0.5}
    """
    if len(rows) == 1:
        return dict(rows[0])
    names = dict.fromkeys(name for row in rows for name in row if name not in _NAMING)
    of_name = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in of_name.items()}


def move_averages(state: State, decay: float | None) -> None:
    """Moves each entry `name.average` of the state towards `name`; without a decay there are none."""
    for average in [name for name in state if name.endswith(".average")]:
        assert decay is not None
        state[average] = decay * state[average] + (1 - decay) * state[average.removesuffix(".average")]


def with_averages(state: State, names: Sequence[str], decay: float | None) -> State:
    """`state` with an average of each of these entries, if a decay is set."""
    return state if decay is None else {**state, **{f"{name}.average": state[name].clone() for name in names}}


def averaged(state: State, name: str) -> Tensor:
    """The average of an entry if one is kept, else the entry."""
    return state.get(f"{name}.average", state[name])
