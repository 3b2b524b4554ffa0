"""Files of dstill: safetensors with a JSON header, written atomically. No pickle anywhere."""

from __future__ import annotations

import contextlib
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
import torch
from safetensors.torch import save_file
from torch import Tensor

from dstill.errors import DamagedFileError, DstillError
from dstill.version import __version__

FORMAT = 1
_KEY = "dstill"
_CHECK = "header_sha256"
_PART = ".part"


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed over `path`."""
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
    """Makes a folder that results will be written into, before the work that leads to them.

    Raises:
        DstillError: it is a file, or below one.
        OSError: the system does not let it be written: a read-only disk, for instance.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise DstillError(f"{folder} is no folder, and none can be made there: pass another one") from error
    with tempfile.TemporaryFile(dir=folder):
        pass


def remove_leftovers(folder: Path, older_than: float = 0.0) -> None:
    """Removes what writers left behind that were killed, if it is so many seconds old."""
    for path in folder.glob(f".*{_PART}"):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()


def _system_error(error: Exception, path: Path) -> Exception:
    """What the system said, which safetensors hides in its text."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found.group(1)), os.strerror(int(found.group(1))), str(path)) if found else error


def _umask() -> int:
    """What the user's new files may not have."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself survive a power cut, where the system can."""
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


def save(path: Path, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes tensors and a header, each with a checksum; the header gains the format, the kind and the package version."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    full = {"format": FORMAT, "kind": kind, "dstill": __version__, "sha256": checksum(contiguous), **header}
    text = json.dumps({**full, _CHECK: _sha256(full)}, sort_keys=True)
    with atomic(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata={_KEY: text})
        except safetensors.SafetensorError as error:
            raise _system_error(error, path) from error


def _sha256(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and bytes; safetensors itself does not notice a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def opened(path: Path, kind: str | None) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yields `(header, safetensors handle)`; tensors are memory-mapped until read. Any kind will do where `kind` is None.

    Raises:
        DstillError: no such file, not a dstill file, another kind, or written by a newer format.
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
            raise DamagedFileError(f"{path} is damaged: its header is not the one that was written; restore it from a copy")
        if kind is not None and header.get("kind") != kind:
            raise DstillError(f"{path} holds {_with_article(header.get('kind'))}, not {_with_article(kind)}")
        if header.get("format") not in range(1, FORMAT + 1):
            raise DstillError(f"{path} has format {header.get('format')}, this dstill reads up to {FORMAT}: upgrade dstill")
        yield header, file


def _with_article(noun: object) -> str:
    return f"{'an' if str(noun)[:1] in 'aeiou' else 'a'} {noun}"


def load(path: Path, kind: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the header and all tensors of a file of this kind; raises as `opened` does, and where tensors differ."""
    with opened(path, kind) as (header, file):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if header.get("sha256") not in (None, checksum(tensors)):
        raise DamagedFileError(f"{path} is damaged: its tensors are not those that were written; restore it from a copy")
    return header, tensors


def set_aside_if_damaged(path: Path, kind: str, note: Callable[[str], None]) -> None:
    """Renames a file that is not what was written, so that it is neither used nor lost, and can be made again."""
    if not path.exists():
        return
    try:
        load(path, kind)
    except DamagedFileError as error:
        aside = _set_aside(path)
        note(f"{error}; it is set aside as {aside.name}, and made again")


def load_or_make(path: Path, kind: str, make: Callable[[], None]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `load` gives; `make` writes the file first where it is missing or damaged. A damaged one is set aside."""
    if path.exists():
        try:
            return load(path, kind)
        except DamagedFileError:
            _set_aside(path)
    make()
    return load(path, kind)


def _set_aside(path: Path) -> Path:
    return path.replace(path.with_name(path.name + ".damaged"))
