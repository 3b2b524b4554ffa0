"""dstill's files: safetensors with a JSON header, written atomically, without pickle."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from dstill.errors import DamagedFileError, DstillError
from dstill.version import __version__

FORMAT = 4  # the newest that is read here
_KEY = "dstill"
_CHECK = "header_sha256"
_PART = ".part"
# Faults of the machine rather than of a path.
_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`. On success, the file is flushed to disk and renamed to `path`, else removed."""
    with _said(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Makes the folder for results and checks that it is writable, before the work starts.

    Raises:
        DstillError: the folder cannot be made or written to, for example because the path is a file or lies below one.
        OSError: the machine lacks something, for example on a full disk.
    """
    with _said(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextlib.contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Turns the error of a folder that another path would not have into a sentence; what the machine lacks stays as it is."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        raise DstillError(f"{folder} is not a folder, and none can be made there: pass another one") from error
    except OSError as error:
        if error.errno in _MACHINE:
            raise
        raise DstillError(f"{folder} cannot be made or written to ({error.strerror}): pass another folder") from error


@contextlib.contextmanager
def alone(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Keeps other processes from making the same file at the same time, so that what several runs need is made once.

    The system holds the lock and releases it when the process ends, however it ends. After waiting for another process, look
    whether the file is there.

    Args:
        path: the file. Its folder is made.
        wait: wait for another process that makes the file.

    Yields:
        Whether this process may make the file; always, if it waits.

    Raises:
        DstillError: the folder cannot be made.
    """
    with _said(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=-1 if wait else 0)
    with contextlib.suppress(Timeout):
        lock.acquire()
    try:
        yield lock.is_locked
    finally:
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    """Removes the temporary files of writers that were killed, if they are at least `older_than` seconds old."""
    for path in folder.glob(f".*{_PART}"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def _system_error(error: Exception, path: Path) -> Exception:
    """The system's error behind a safetensors error, which mentions it only in its text."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found.group(1)), os.strerror(int(found.group(1))), str(path)) if found else error


def _umask() -> int:
    """The permissions that the user's new files do not get."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes the renaming survive a power cut, on systems that allow it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes bytes atomically."""
    with atomic(path) as temporary:
        temporary.write_bytes(content)


def save(path: Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, since: int = 1) -> None:
    """Writes tensors and a header atomically, with a checksum for each of the two.

    Args:
        path: the file.
        kind: what the file holds, such as `distilled set`.
        tensors: the tensors by name.
        header: JSON values. The format, the kind and the version of dstill are added.
        since: the format of the file: the first whose readers understand what it holds. Older ones refuse it.
    """
    contiguous, metadata = _prepared(kind, tensors, header, since)
    with atomic(path) as temporary:
        try:
            safetensors.torch.save_file(contiguous, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise _system_error(error, path) from error


def size(kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, since: int = 1) -> int:
    """Bytes of the file that `save` would write with these arguments; it is made in memory."""
    contiguous, metadata = _prepared(kind, tensors, header, since)
    return len(safetensors.torch.save(contiguous, metadata=metadata))


def _prepared(
    kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any], since: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors as they are stored, and the metadata of the file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    full = {"format": since, "kind": kind, "dstill": __version__, "sha256": checksum(contiguous), **header}
    return contiguous, {_KEY: json.dumps({**full, _CHECK: _sha256(full)}, sort_keys=True)}


def _sha256(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names and bytes; safetensors itself does not detect a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def opened(path: Path, kind: str | None) -> Iterator[tuple[dict[str, Any], Any]]:
    """Opens a file and checks its header. Tensors stay memory-mapped until they are read.

    Args:
        path: the file.
        kind: the kind that it must have; None for any.

    Yields:
        The header and the safetensors handle.

    Raises:
        DstillError: the file does not exist, was not written by dstill, is of another kind, or has a newer format.
        DamagedFileError: the file is damaged.
    """
    if not path.is_file():
        raise DstillError(f"{path} does not exist")
    try:
        handle = safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path} is damaged or not a safetensors file ({error})") from error
    with handle as file:
        try:
            header = dict(json.loads((file.metadata() or {})[_KEY]))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise DstillError(f"{path} has no dstill header: it was written by another program") from error
        if header.pop(_CHECK, None) not in (None, _sha256(header)):
            raise DamagedFileError(f"{path} is damaged: its header has changed since it was written; restore it from a copy")
        if kind is not None and header.get("kind") != kind:
            raise DstillError(f"{path} holds {_with_article(header.get('kind'))}, not {_with_article(kind)}")
        if header.get("format") not in range(1, FORMAT + 1):
            raise DstillError(f"{path} has format {header.get('format')}, this dstill reads up to {FORMAT}: upgrade dstill")
        yield header, file


def _with_article(noun: object) -> str:
    return f"{'an' if str(noun)[:1] in 'aeiou' else 'a'} {noun}"


def load(path: Path, kind: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the header and all tensors of a file.

    Args:
        path: the file.
        kind: the kind that it must have; None for any.

    Raises:
        DstillError: the file does not exist, was not written by dstill, is of another kind, or has a newer format.
        DamagedFileError: the file is damaged.
    """
    with opened(path, kind) as (header, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if header.get("sha256") not in (None, checksum(tensors)):
        raise DamagedFileError(f"{path} is damaged: its tensors have changed since they were written; restore it from a copy")
    return header, tensors


def set_aside_if_damaged(path: Path, kind: str, note: Callable[[str], None]) -> None:
    """Renames a damaged file, so that it is neither used nor lost and can be made again.

    Args:
        path: the file; it need not exist.
        kind: the kind that it must have.
        note: called with a message if the file is damaged.
    """
    if not path.exists():
        return
    try:
        load(path, kind)
    except DamagedFileError as error:
        aside = path.replace(path.with_name(path.name + ".damaged"))
        note(f"{error}; it is set aside as {aside.name} and made again")


def load_or_make(path: Path, kind: str, make: Callable[[], None]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Loads a file. If it is missing or damaged, `make` writes it first; a damaged file is set aside.

    Of several processes that need the file, one makes it, and the others wait.

    Args:
        path: the file.
        kind: the kind that it must have.
        make: writes the file.
    """
    with contextlib.suppress(DamagedFileError):
        if path.exists():
            return load(path, kind)
    with alone(path):
        set_aside_if_damaged(path, kind, lambda _: None)
        if not path.exists():  # else another process has made it meanwhile
            make()
    return load(path, kind)
