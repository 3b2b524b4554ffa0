"""Evaluation protocols by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dstill.config import yamls
from dstill.config.settings import Protocol
from dstill.errors import DstillError

_FOLDER = Path(__file__).parent / "protocol_files"


def protocol_names() -> list[str]:
    """The names of the protocols that come with dstill.

    Example:
        >>> "ast" in protocol_names()
        True
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_protocol(name: str) -> Protocol:
    """A protocol by name or from a file.

    Args:
        name: the name of a protocol that comes with dstill, or the path of a YAML file.

    Raises:
        DstillError: the name is unknown, the file does not exist, or it is malformed.

    Example:
        >>> load_protocol("ast").optimiser
        'sgd'
    """
    path = yamls.located(name, _FOLDER, "protocol", protocol_names)
    return yamls.validate(Protocol, yamls.read_mapping(path), str(path))


def further_protocols(chosen: Protocol, names: Sequence[str]) -> list[Protocol]:
    """The protocols of these names or files that differ from the first one.

    Raises:
        DstillError: as `load_protocol`; or two different ones have the same name and version.
    """
    found = [other for other in map(load_protocol, names) if other != chosen]
    seen = {(chosen.name, chosen.version): chosen}
    for other in found:
        if seen.setdefault((other.name, other.version), other) != other:
            said = f"{other.name}, version {other.version}"
            raise DstillError(f"two different protocols are called {said}: change the name or version in one of the files")
    return found
