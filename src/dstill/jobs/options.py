"""Options that the public functions and the command line share. Importing this does not import torch.

In Python each class is an argument, such as `machine=dstill.Machine(device="cuda")`. On the command line each field is an
option, such as `--device cuda`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from cyclopts import Parameter, Token

from dstill.errors import DstillError

if TYPE_CHECKING:
    from dstill.config.settings import Recipe
    from dstill.support.workers import Workers

Changes = Sequence[str] | Mapping[str, Any]
"""Changes to a recipe: assignments such as `["distill.iterations=300"]`, or a mapping, nested or with dotted keys, such as
`{"distill": {"iterations": 300}, "net.width": 32}`."""
Network = str | type[Any] | Callable[..., Any]


def names(text: str | None) -> list[str]:
    """Splits names at commas.

    Example:
        >>> names("dm, ast,")
        ['dm', 'ast']
    """
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _whole(_: type, tokens: Sequence[Token]) -> int:
    """A whole number; cyclopts would round 1.5."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not a whole number") from None


def _auto_or_whole(hint: type, tokens: Sequence[Token]) -> int | str:
    return "auto" if tokens[0].value == "auto" else _whole(hint, tokens)


def _split(_: type, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(names(tokens[0].value))


Whole = Annotated[int, Parameter(converter=_whole)]
Flag = Annotated[bool, Parameter(negative="")]
_Joined = Parameter(converter=_split, n_tokens=1, negative="")

if TYPE_CHECKING:
    Networks = Sequence[Network]
    Names = Sequence[str]
    Processes = Workers | None
else:  # as on the command line
    Networks = Annotated[tuple[str, ...], _Joined]
    Names = Annotated[tuple[str, ...], _Joined]
    Processes = Annotated[int | Literal["auto"] | None, Parameter(converter=_auto_or_whole)]


class Seeds(NamedTuple):
    """Seeds of a run whose experts have another seed than its images.

    To distil sets of different seeds from the same experts, run once per seed with the same `experts`.

    Attributes:
        images: determines the initial images and all draws of distillation and evaluation.
        experts: determines experts and trained networks.

    Example:
        >>> Seeds(images=3, experts=0)
        Seeds(images=3, experts=0)
    """

    images: int
    experts: int

    @classmethod
    def of(cls, seed: int | Seeds) -> Seeds:
        """Turns a single seed into `Seeds` with the same seed for both."""
        return seed if isinstance(seed, Seeds) else cls(seed, seed)


class Budget(NamedTuple):
    """The time of a whole command.

    Attributes:
        minutes: how long it may take.
        began: when it began, by `time.perf_counter`.

    Example:
        >>> Budget.of(10).left <= 600
        True
    """

    minutes: float
    began: float

    @classmethod
    def of(cls, minutes: float | Budget | None) -> Budget | None:
        """A number of minutes from now on.

        Raises:
            DstillError: it is not above 0.
        """
        if minutes is None or isinstance(minutes, Budget):
            return minutes
        if not 0 < minutes < math.inf:
            raise DstillError(f"minutes must be above 0, got {minutes}")
        return cls(minutes, time.perf_counter())

    @property
    def left(self) -> float:
        """The seconds that are left; below 0 once they are up."""
        return 60 * self.minutes - (time.perf_counter() - self.began)


@Parameter(name="*")
@dataclass(frozen=True)
class Machine:
    """Where the work is done, and with how much of the machine.

    On a CPU, none of it changes the numbers of a ConvNet with instance norm. Other networks are rounded differently by another
    number of threads.

    Attributes:
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts for every run ($DSTILL_CACHE, else ~/.cache/dstill).
        threads: CPU threads for distilling; the machine's cores if left out.
        workers: processes that train experts and networks at once: a number, or auto for one per core if the work is large
            enough. Left out: auto on the command line; 1 in Python, where each process imports the calling script.
        deterministic: ask torch for deterministic algorithms, with a warning for operations that have none. On a CPU, the
            same seed and number of threads give the same bits without it.
        streams: draws of an iteration that an NVIDIA card runs side by side, for methods that unroll a student. This has not
            been measured yet.

    Example:
        >>> Machine(device="cpu", workers=2).workers
        2
    """

    device: str = "auto"
    cache: str | Path | None = None
    threads: Whole | None = None
    workers: Processes = None
    deterministic: Flag = False
    streams: Whole = 1


class Executor(NamedTuple):
    """What runs the rows of a table as jobs, by submitit.

    Attributes:
        name: `slurm`; or `local`, which starts each job as a process of this machine.
        options: what submitit's `AutoExecutor.update_parameters` takes. For Slurm, `timeout_min` is needed.

    Example:
        >>> Executor("slurm", {"timeout_min": 120, "slurm_partition": "gpu", "gpus_per_node": 1}).name
        'slurm'
    """

    name: str
    options: Mapping[str, Any] = MappingProxyType({})


@Parameter(name="*")
@dataclass(frozen=True)
class Evaluation:
    """How the sets of a run are measured.

    Attributes:
        nets: evaluation networks, joined by commas on the command line, `timm:NAME` for those of timm; the recipe's own if left
            out. The first one gives the accuracy.
        networks: fresh networks per set; the protocol's number if left out.
        random: also measure random real images.
        whole: also train on the whole training set.
        also: further protocols that the first network is measured under, joined by commas on the command line.

    Example:
        >>> Evaluation(nets=("convnet", "resnet18"), networks=3).random
        True
    """

    nets: Networks = ()
    networks: Whole | None = None
    random: bool = True
    whole: bool = False
    also: Names = ()


@Parameter(name="*")
@dataclass(frozen=True)
class Recording:
    """What is recorded while a set is distilled. None of it changes the set.

    Attributes:
        validate_every: measure the set on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations; 0 for never.
        picture_every: keep a picture of the images every so many iterations, and an animation of all; 0 for none.
        logs: where metrics go in addition, joined by commas on the command line: tensorboard, wandb.
        keep_every: keep the set itself every so many iterations; 0 for never.

    Example:
        >>> Recording(validate_every=50).checkpoint_every
        25
    """

    validate_every: Whole = 0
    checkpoint_every: Whole = 25
    picture_every: Whole = 0
    logs: Annotated[Names, Parameter(name="--log")] = ()
    keep_every: Whole = 0


@dataclass(frozen=True)
class Choice:
    """The settings to use; `dstill.run` explains the fields."""

    method: str | type[Any] | None = None
    ipc: int | None = None
    recipe: str | Recipe | None = None
    net: Any = None
    changes: Changes = ()
    distill: Mapping[str, Any] | None = None
    experts: Mapping[str, Any] | None = None


def at_least_one(**values: int | None) -> None:
    """Raises `DstillError` for a count below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise DstillError(f"{name} must be at least 1, got {value}")
