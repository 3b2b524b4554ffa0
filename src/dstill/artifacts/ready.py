"""The sets that ship with the package. Importing this does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from dstill.config import yamls
from dstill.errors import DstillError, suggest

if TYPE_CHECKING:
    from dstill.artifacts.distilled import DistilledSet
    from dstill.data.real import RealSet

_FOLDER = Path(__file__).parent / "ready_sets"


class Measured(BaseModel):
    """An accuracy of a set, measured once on all test images.

    Attributes:
        protocol: the evaluation protocol.
        network: the networks that were trained on the set.
        accuracy: mean over the networks, in percent.
        spread: standard deviation over the networks, in percent.
        networks: their number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocol: str
    network: str
    accuracy: float
    spread: float
    networks: int

    def __str__(self) -> str:
        return f"{self.accuracy:.1f} ± {self.spread:.1f} % (n = {self.networks}, {self.network}, protocol {self.protocol})"


class Ready(BaseModel):
    """The card of a set.

    Attributes:
        title: what it is, in a line.
        commands: how it was made; each command has the seed 0.
        minutes: how long that took.
        machine: on what.
        measured: its accuracies, the one to expect first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    commands: tuple[str, ...]
    minutes: float
    machine: str
    measured: tuple[Measured, ...]


def ready_names() -> list[str]:
    """The names of the sets that ship with the package.

    Example:
        >>> "digits-ipc1" in ready_names()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def ready_file(name: str) -> Path:
    """The file of a set.

    Raises:
        DstillError: unknown name.
    """
    if name not in ready_names():
        raise DstillError(f"no set {name!r} ships with dstill; {suggest(name, ready_names())}")
    return _FOLDER / f"{name}.safetensors"


def ready_card(name: str) -> Ready:
    """The card of a set.

    Raises:
        DstillError: unknown name.
    """
    path = ready_file(name).with_suffix(".yaml")
    return Ready.model_validate(yamls.read_mapping(path))


def load_set(name: str, *, real: RealSet | None = None) -> DistilledSet:
    """A set that ships with the package; `dstill ls sets` lists them. To read your own, see `DistilledSet.load`.

    Args:
        name: its name, such as `cifar10-ipc1`.
        real: the data that it was distilled from. A set on whitened images needs them once, to fit the whitening; without them
            it comes with a warning.

    Returns:
        The set. Its accuracy is the first that `dstill ls sets` shows.

    Raises:
        DstillError: unknown name, or `real` holds other data.

    Example:
        >>> load_set("digits-ipc1").images.shape
        torch.Size([10, 1, 8, 8])
    """
    from dstill.artifacts.distilled import DistilledSet

    return DistilledSet.load(ready_file(name), real=real)
