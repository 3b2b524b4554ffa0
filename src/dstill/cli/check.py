"""Checks files for damage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dstill.artifacts import files
from dstill.artifacts.record import RESULT_NAME
from dstill.artifacts.result import Result
from dstill.errors import DstillError


def check(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """All files of dstill among `paths` and below them, each with its fault, or an empty string if it is intact.

    Raises:
        DstillError: a path does not exist, or there is no file of dstill.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DstillError(f"{path} does not exist")
        below = [*path.rglob("*.safetensors"), *path.rglob(RESULT_NAME)] if path.is_dir() else [path]
        found += sorted(below)
    if not found:
        raise DstillError("there is no file of dstill to check: pass files, or folders that hold some")
    return [(path, _problem(path)) for path in found]


def _problem(path: Path) -> str:
    try:
        if path.suffix == ".json":
            Result.load(path)
        else:
            files.load(path, None)
    except DstillError as error:
        return str(error).removeprefix(f"{path} ")
    return ""
