"""The folder of a run: settings, metrics and checkpoints that survive an interruption."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from dstill.artifacts import files
from dstill.artifacts.record import METRICS_NAME, read_metrics
from dstill.errors import DamagedFileError, DstillError

_CHECKPOINT = "checkpoint"
IDENTITY_NAME = "settings.json"


def refuse_other_run(path: Path, known: Mapping[str, Any]) -> None:
    """Checks early whether a folder belongs to another run, by the part of the identity that is known so far.

    Args:
        path: the folder of a run.
        known: the known settings.

    Raises:
        DstillError: the folder belongs to a run with other settings.
    """
    stored = _stored(path)
    if stored is not None:
        known = json.loads(json.dumps(known))
        _refuse_other(path, {key: stored.get(key) for key in known}, known)


def _stored(path: Path) -> dict[str, Any] | None:
    stamp = path / IDENTITY_NAME
    if not stamp.exists():
        return None
    try:
        return dict(json.loads(stamp.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DstillError(f"{stamp} was not written by dstill ({error}): pass another -o") from error


def _refuse_other(path: Path, stored: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    if stored != identity:
        changed = ", ".join(_differences(stored, identity)) or "settings"
        raise DstillError(f"{path} holds a run with other settings ({changed}): pass another -o, or remove the folder")


class RunFolder:
    """The folder in which one set is distilled.

    It holds `metrics.jsonl` with one line for each iteration, the last two checkpoints until the run is finished, and what the
    caller writes beside them.

    Args:
        path: the folder; made if missing.
        identity: the settings that determine the run.
        note: called with messages for the user.

    Raises:
        DstillError: the folder cannot be made.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], note: Callable[[str], None] = lambda _: None) -> None:
        self.path, self.identity, self.note = path, json.loads(json.dumps(identity)), note
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DstillError(f"the folder {path} cannot be made ({error.strerror}): pass another -o") from error
        self.metrics_path = path / METRICS_NAME
        self.checkpoint_path = path / "checkpoint.safetensors"
        self.earlier_path = path / "checkpoint-before.safetensors"

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends one line to the metrics. Numbers that are not finite become null, since JSON has no word for them."""
        row = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of the metrics so far, see `read_metrics`."""
        return read_metrics(self.metrics_path)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out of the folder, claims it for this run, and removes leftovers of a process that was killed.

        The system holds the lock and releases it when the process ends, however it ends.

        Raises:
            DstillError: another process works in the folder, or the folder belongs to a run with other settings.
        """
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise DstillError(f"another process works in {self.path}: wait for it, or pass another -o") from error
        try:
            self._claim()
            files.remove_leftovers(self.path)
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _claim(self) -> None:
        stored = _stored(self.path)
        if stored is None:
            files.write_text(self.path / IDENTITY_NAME, json.dumps(self.identity, indent=2) + "\n")
        else:
            _refuse_other(self.path, stored, self.identity)

    def checkpoint(self, iteration: int, state: Mapping[str, Tensor]) -> None:
        """Stores the state before `iteration` atomically. The previous checkpoint is kept until the next call."""
        if self.checkpoint_path.exists():
            self.checkpoint_path.replace(self.earlier_path)
        files.save(self.checkpoint_path, _CHECKPOINT, state, {"iteration": iteration})

    def restore(self) -> tuple[int, dict[str, Tensor]] | None:
        """Restores the last checkpoint that is not damaged.

        Metrics that were logged after it are removed, since they will be logged again.

        Returns:
            The iteration and the state before it; None if there is no checkpoint.

        Raises:
            DstillError: there are checkpoints, but all are damaged.
        """
        found = [path for path in (self.checkpoint_path, self.earlier_path) if path.exists()]
        if not found:
            self.metrics_path.unlink(missing_ok=True)
            return None
        header, state = self._first_whole(found)
        iteration = int(header["iteration"])
        kept = [row for row in self.metrics() if row["iteration"] < iteration]
        files.write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))
        return iteration, state

    def _first_whole(self, paths: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        for i, path in enumerate(paths):
            try:
                found = files.load(path, _CHECKPOINT)
            except DamagedFileError as error:
                self.note(f"{error}; falling back to the previous checkpoint")
                continue
            for damaged in paths[:i]:  # else the next checkpoint would replace this good one and keep the damaged one
                damaged.unlink()
            return found
        names = " and ".join(path.name for path in paths)
        raise DstillError(f"{names} in {self.path} are damaged: remove them to restart this run")

    def finish(self) -> None:
        """Removes the checkpoints, once the result of the run has been written."""
        self.checkpoint_path.unlink(missing_ok=True)
        self.earlier_path.unlink(missing_ok=True)


def _differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """The first three keys in which two nested mappings differ, with dots between levels, and both values of each."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return [] if a == b else [f"{prefix.rstrip('.')}: {a} there, {b} now"]
    found: list[str] = []
    for key in {**a, **b}:
        found += _differences(a.get(key), b.get(key), f"{prefix}{key}.")
    return found[:3]
