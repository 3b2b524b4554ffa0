"""Evaluation protocols by name."""

from __future__ import annotations

from pathlib import Path

from dstill.config import yamls
from dstill.config.settings import Protocol
from dstill.errors import DstillError, suggest

_FOLDER = Path(__file__).parent / "protocol_files"


def protocol_names() -> list[str]:
    """Names of the shipped protocols."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def load_protocol(name: str) -> Protocol:
    """A shipped protocol, or one in a YAML file of your own.

    Raises:
        DstillError: unknown name, or a malformed file.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.exists():
        raise DstillError(f"unknown protocol {name!r}; {suggest(name, protocol_names())}")
    return yamls.validate(Protocol, yamls.read_mapping(path), str(path))
