"""Options that the public functions and the command line share. Importing this never imports torch.

In Python each class is an argument, such as `machine=dstill.Machine(device="cuda")`. On the command line each field is an
option, such as `--device cuda`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from cyclopts import Parameter, Token

from dstill.errors import DstillError

if TYPE_CHECKING:
    from dstill.config.settings import Recipe

Workers = int | Literal["auto"]
Changes = Sequence[str] | Mapping[str, Any]
Network = str | type[Any] | Callable[..., Any]


def names(text: str | None) -> list[str]:
    """The names between commas.

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
else:  # as the command line reads them
    Networks = Annotated[tuple[str, ...], _Joined]
    Names = Annotated[tuple[str, ...], _Joined]
    Processes = Annotated[int | Literal["auto"] | None, Parameter(converter=_auto_or_whole)]


class Seeds(NamedTuple):
    """Seeds of a run, where the experts do not share that of the images.

    Sets of different seeds that are distilled from the same experts are one run each, with the same `experts`.

    Attributes:
        images: decides initial images and every draw of the distillation and of the evaluation.
        experts: decides experts and trained networks.

    Example:
        >>> Seeds(images=3, experts=0)
        Seeds(images=3, experts=0)
    """

    images: int
    experts: int

    @classmethod
    def of(cls, seed: int | Seeds) -> Seeds:
        """The same seed for both, unless two are given."""
        return seed if isinstance(seed, Seeds) else cls(seed, seed)


@Parameter(name="*")
@dataclass(frozen=True)
class Machine:
    """Where the work is done, and with how much of the machine. None of it changes a number on a CPU.

    Attributes:
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts for every run ($DSTILL_CACHE, else ~/.cache/dstill).
        threads: CPU threads of distilling; the machine's cores if left out.
        workers: processes that train experts and networks at once: a number, or auto for one a core where the work is worth
            it. Left out: auto on the command line; 1 in Python, where each process imports the script that calls.
        deterministic: ask torch for deterministic algorithms, and be warned of operations that have none; on a CPU the same
            seed and threads give the same bits without it.

    Example:
        >>> Machine(device="cpu", workers=2).workers
        2
    """

    device: str = "auto"
    cache: str | Path | None = None
    threads: Whole | None = None
    workers: Processes = None
    deterministic: Flag = False


@Parameter(name="*")
@dataclass(frozen=True)
class Evaluation:
    """How the sets of a run are measured.

    Attributes:
        nets: evaluation networks, joined by commas on the command line; the recipe's own if left out. The first one gives
            the accuracy.
        networks: fresh networks a set; the protocol's number if left out.
        random: also measure random real images.
        whole: also train on the whole training set.

    Example:
        >>> Evaluation(nets=("convnet", "resnet18"), networks=3).random
        True
    """

    nets: Networks = ()
    networks: Whole | None = None
    random: bool = True
    whole: bool = False


@Parameter(name="*")
@dataclass(frozen=True)
class Recording:
    """What is recorded while a set is distilled. None of it changes the set.

    Attributes:
        validate_every: measure the set on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations; 0 for never.
        picture_every: keep a picture of the images every so many iterations, and an animation of all; 0 for none.
        logs: where the metrics go besides, joined by commas on the command line: tensorboard, wandb.

    Example:
        >>> Recording(validate_every=50).checkpoint_every
        25
    """

    validate_every: Whole = 0
    checkpoint_every: Whole = 25
    picture_every: Whole = 0
    logs: Annotated[Names, Parameter(name="--log")] = ()


@dataclass(frozen=True)
class Choice:
    """Which settings are asked for; see `dstill.run` for what each may be."""

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
