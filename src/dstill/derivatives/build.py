"""Native kernels: for a CPU built on first use with the machine's own C++ compiler and cached, for NVIDIA cards by Triton.

Those for a CPU are one small source without dependencies, built in a few seconds for the CPU at hand and called through
`ctypes`, which releases the interpreter's lock. Where there are none, everything runs on plain tensor operations instead: the
same numbers up to rounding, more slowly.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor

from dstill.artifacts.files import atomic
from dstill.derivatives.unit import TensorUnit

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-Wno-psabi")
_SWITCHED_OFF = "these are switched off by DSTILL_NATIVE=0"
_SUFFIXES = {torch.float32: "float32", torch.float64: "float64"}


class Kernels:
    """The functions of `kernels.cpp` on contiguous (or channels-last) CPU tensors of one type, float32 or float64."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        _keep_freed_memory()

    def call(self, name: str, *arguments: Tensor | int | float | None) -> None:
        """Calls `name` for the type of its first tensor; None is a null pointer. Nothing is checked: see the callers."""
        first = next(a for a in arguments if isinstance(a, Tensor))
        function = getattr(self._library, f"{name}_{_SUFFIXES[first.dtype]}")
        function(*(_argument(a) for a in arguments))


def _keep_freed_memory() -> None:
    """Lets the process keep up to 1 GiB that it freed, where the C library can be told (glibc).

    Each step frees the buffers that the next one asks for. Given back to the system and faulted in again, page by page, they
    cost a third of the time.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 1 << 30)


def _argument(value: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_double:
    kind = type(value)  # not isinstance, which for a tensor takes as long as a small kernel
    if kind is int:
        return ctypes.c_long(value)  # type: ignore[arg-type]
    if kind is float:
        return ctypes.c_double(value)  # type: ignore[arg-type]
    return ctypes.c_void_p(None if value is None else value.data_ptr())  # type: ignore[union-attr]


def kernels() -> Kernels | None:
    """The compiled kernels; None where there is no working compiler, or where DSTILL_NATIVE=0 asks for none."""
    return _found()[0]


def fused_unit() -> type[TensorUnit] | None:
    """The `Unit` in Triton's kernels for NVIDIA cards; None where Triton does not work, or DSTILL_NATIVE=0 asks for none."""
    return _found_fused()[0]


def describe(device: torch.device, *, compiled: bool = False) -> str:
    """What derivatives on this device run on, for the log."""
    plain = "compiled tensor operations" if compiled else "plain tensor operations"
    found: object
    match device.type:
        case "cpu":
            (found, reason), kind = _found(), "native CPU kernels"
        case "cuda":
            (found, reason), kind = _found_fused(), "fused kernels"
        case _:
            return plain
    return kind if found else f"{plain}, slower than {kind}: {reason}"


@functools.cache
def _found() -> tuple[Kernels | None, str]:
    """The kernels, or why there are none."""
    if os.environ.get("DSTILL_NATIVE") == "0":
        return None, _SWITCHED_OFF
    compiler = _compiler()
    if compiler is None:
        return None, "install a C++ compiler (g++ or clang++), or name one in CXX"
    try:
        return _loaded(compiler), ""
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip() or str(error)
    except (OSError, subprocess.SubprocessError) as error:
        said = str(error)
    return None, f"{compiler} could not build them ({said.splitlines()[0]}); name another compiler in CXX"


@functools.cache
def _found_fused() -> tuple[type[TensorUnit] | None, str]:
    """The unit, or why there is none."""
    if os.environ.get("DSTILL_NATIVE") == "0":
        return None, _SWITCHED_OFF
    try:
        from dstill.derivatives.cuda_unit import FusedUnit

        one = torch.ones(1, device="cuda")
        FusedUnit(one, one).forward(one.expand(1, 1, 2, 2))
    except ImportError:
        return None, "install triton"
    except Exception as error:  # whatever Triton lacks to build a kernel: a C compiler, Python's headers, a card it knows
        said = str(error).strip() or type(error).__name__
        return None, f"Triton could not build them ({said.splitlines()[0]})"
    return FusedUnit, ""


def _compiler() -> str | None:
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _loaded(compiler: str) -> Kernels:
    """The kernels from the cache, compiled first where it lacks them. A cache that cannot be written changes no number."""
    source = resources.files(__package__).joinpath("kernels.cpp").read_text(encoding="utf-8")
    digest = hashlib.sha256("\n".join([source, compiler, *_FLAGS, _processor()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("DSTILL_CACHE") or Path.home() / ".cache" / "dstill").expanduser() / "native"
    library = folder / f"kernels-{digest}.so"
    if library.exists():
        with contextlib.suppress(OSError):  # damaged, or in a folder that nothing may be run from: built anew
            return Kernels(library)
    with tempfile.TemporaryDirectory() as scratch:
        code, built = Path(scratch) / "kernels.cpp", Path(scratch) / "kernels.so"
        code.write_text(source, encoding="utf-8")
        subprocess.run(  # noqa: S603 - the user's own compiler, without a shell
            [compiler, *_FLAGS, "-o", str(built), str(code)], check=True, capture_output=True, timeout=300
        )
        try:
            with atomic(library) as temporary:  # two processes may build at once
                shutil.copyfile(built, temporary)
            return Kernels(library)
        except OSError:  # a full disk, for instance
            return Kernels(built)  # which stays open when its file is gone


def _processor() -> str:
    """What `-march=native` depends on; home folders are shared between machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
