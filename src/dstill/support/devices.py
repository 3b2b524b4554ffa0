"""Devices, memory and threads."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dstill.errors import DstillError

_NAMES = ("auto", "cpu", "cuda", "mps")


def resolve_device(name: str) -> torch.device:
    """`auto` takes CUDA, else Apple's MPS, else the CPU.

    Raises:
        DstillError: an unknown name, or a device that this machine lacks.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(device for device in ("cuda", "mps", "cpu") if available[device]))
    kind = name.split(":")[0]
    if kind not in available:
        raise DstillError(f"unknown device {name!r}: take one of {', '.join(_NAMES)}")
    if not available[kind]:
        raise DstillError(f"this machine has no usable {kind} device: use --device auto or cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise DstillError(f"unknown device {name!r}: take one of {', '.join(_NAMES)}, or one by number like cuda:0") from error


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for the work that a card was given before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # from other memory it copies only when all is done
    return tensor.to(device)


def ask_for_determinism() -> None:
    """Makes torch choose deterministic algorithms in this process, and warn of operations that have none.

    For GPUs, and before the first of their kernels runs. Rotation and scaling (the gradient of `grid_sample`) have no
    deterministic algorithm there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses otherwise
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Within it, float32 convolutions of NVIDIA cards multiply float32, not TF32 as is torch's default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def total_memory(device: torch.device) -> float:
    """Bytes of memory of the device; infinite where it cannot be told.

    The total and not the free bytes, so that settings derived from it are the same when a run is continued.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


def processor() -> str:
    """What the CPU calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def available_memory(device: torch.device) -> float:
    """Bytes that can be allocated on the device now; half of the machine's memory where that cannot be told."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch for the next tensor
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    return min(_machine_available(), _group_available())


def _machine_available() -> float:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    return total_memory(torch.device("cpu")) / 2


def _group_available() -> float:
    """What a container's limit leaves (Linux control groups, version 2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        return float((folder / "memory.max").read_text()) - float((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit, or the word "max"
        return float("inf")


@contextlib.contextmanager
def watching_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that tells by how many bytes memory has grown at its peak since here.

    On a CPU this is the process's resident memory, whose peak Linux alone lets one reset; None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - level
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts anew from the present level
        before = _resident_peak()
    except (OSError, StopIteration):
        yield lambda: None
        return
    yield lambda: max(0, _resident_peak() - before)


def resident_memory() -> int | None:
    """Bytes of memory that this process holds; None where the system does not say."""
    try:
        return _status("VmRSS:")
    except (OSError, StopIteration):
        return None


def _resident_peak() -> int:
    return _status("VmHWM:")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
