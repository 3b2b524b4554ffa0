"""Builds the native kernels: from C++ for CPUs, with Triton for NVIDIA cards.

The CPU kernels are one small C++ source without dependencies. On first use, the machine's own compiler builds it for the
processor at hand in a few seconds, and the library is cached. `ctypes` calls it, which releases Python's global interpreter
lock. Where there are no kernels, plain tensor operations give the same numbers up to rounding, more slowly.
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
from dstill.derivatives import tiles
from dstill.derivatives.convolution import Convolution
from dstill.derivatives.tiles import Product
from dstill.derivatives.unit import TensorUnit
from dstill.errors import DstillError
from dstill.support.cache import cache_folder

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-Wno-psabi")
_SWITCHED_OFF = "these are switched off by DSTILL_NATIVE=0"
_SUFFIXES = {torch.float32: "float32", torch.float64: "float64"}


class Kernels:
    """The functions of `kernels.cpp` on contiguous (or channels-last) CPU tensors of one type, float32 or float64."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        _keep_freed_memory()

    def call(self, name: str, *arguments: Tensor | int | float | None) -> None:
        """Calls the function `name` for the type of its first tensor; None is passed as a null pointer.

        Nothing is checked here: the callers pass tensors of the right shapes and strides.
        """
        first = next(a for a in arguments if isinstance(a, Tensor))
        function = getattr(self._library, f"{name}_{_SUFFIXES[first.dtype]}")
        function(*(_argument(a) for a in arguments))


def _keep_freed_memory() -> None:
    """Lets the process keep up to 1 GiB of freed memory, where the C library allows it (glibc).

    Each step frees buffers that the next step asks for again. Returning them to the system and mapping them back in, page by
    page, took a third of the time.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, 1 << 30)


def _argument(value: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_double:
    kind = type(value)  # isinstance on a tensor would take as long as a small kernel
    if kind is int:
        return ctypes.c_long(value)  # type: ignore[arg-type]
    if kind is float:
        return ctypes.c_double(value)  # type: ignore[arg-type]
    return ctypes.c_void_p(None if value is None else value.data_ptr())  # type: ignore[union-attr]


def kernels() -> Kernels | None:
    """The compiled CPU kernels; None if no compiler works or DSTILL_NATIVE=0 is set."""
    return _found()[0]


def fused_unit(*, channels_last: bool = False) -> type[TensorUnit] | None:
    """The `Unit` in Triton kernels for NVIDIA cards; None if Triton does not work or DSTILL_NATIVE=0 is set."""
    found = _found_fused()[0]
    if found is None or not channels_last:
        return found
    from dstill.derivatives.cuda_unit import ChannelsLastUnit

    return ChannelsLastUnit


def tiled(device: torch.device, product: Product, inputs: int, outputs: int, size: tuple[int, int]) -> Convolution | None:
    """Our own convolution for a card, where it was measured to be faster than the library's; see `dstill.derivatives.tiles`."""
    if device.type != "cuda" or fused_unit() is None:
        return None
    tile = tiles.measured().tile(torch.cuda.get_device_name(device), product, inputs, outputs, size)
    if tile is None:
        return None
    from dstill.derivatives.cuda_convolution import Tiled

    return Tiled(product, tile)


def describe(device: torch.device, *, compiled: bool = False) -> str:
    """What the hand-written derivatives run on, as a phrase for the log.

    Args:
        device: where the tensors are.
        compiled: whether `torch.compile` compiles the tensor operations.
    """
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
    """The kernels and an empty text, or None and the reason why there are none."""
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
    """The unit and an empty text, or None and the reason why there is none."""
    if os.environ.get("DSTILL_NATIVE") == "0":
        return None, _SWITCHED_OFF
    try:
        from dstill.derivatives.cuda_unit import FusedUnit

        one = torch.ones(1, device="cuda")
        FusedUnit(one, one).forward(one.expand(1, 1, 2, 2))
    except ImportError:
        return None, "install triton"
    except Exception as error:  # of many types: no C compiler, no Python headers, an unknown card
        said = str(error).strip() or type(error).__name__
        return None, f"Triton could not build them ({said.splitlines()[0]})"
    return FusedUnit, ""


def _compiler() -> str | None:
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _loaded(compiler: str) -> Kernels:
    """The kernels from the cache, compiled first if they are not in it. They also load if the cache cannot be written."""
    source = resources.files(__package__).joinpath("kernels.cpp").read_text(encoding="utf-8")
    digest = hashlib.sha256("\n".join([source, compiler, *_FLAGS, _processor()]).encode()).hexdigest()[:16]
    library = cache_folder() / "native" / f"kernels-{digest}.so"
    if library.exists():
        with contextlib.suppress(OSError):  # damaged, or in a folder that code may not be loaded from: build it again
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
        except (OSError, DstillError):  # a full disk, or a file where the folder should be
            return Kernels(built)  # stays loaded after its file is deleted


def _processor() -> str:
    """What `-march=native` depends on. It is part of the cache key because machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
