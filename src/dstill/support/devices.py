"""Devices, their precision and their memory."""

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
    """The device with a name.

    Args:
        name: `cpu`, `cuda`, `cuda:<number>` or `mps`; or `auto` for CUDA if there is a card, else Apple's MPS, else the CPU.

    Raises:
        DstillError: the name is unknown, or this machine has no such device.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
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
        device = torch.device(name)
    except RuntimeError as error:
        raise DstillError(f"unknown device {name!r}: take one of {', '.join(_NAMES)}, or one by number like cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise DstillError(
            f"this machine has {count} cuda device(s), so {name!r} is none of them: take cuda:0 to cuda:{count - 1}"
        )
    return device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. The copy to a card does not wait for work that the card still has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)  # unpinned memory would wait
    return tensor.to(device)


def ask_for_determinism() -> None:
    """Makes torch use deterministic algorithms in this process, and warn about operations that have none.

    This matters on GPUs and must come before their first kernel. Rotation and scaling (the gradient of `grid_sample`) have no
    deterministic algorithm there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """While active, float32 convolutions on NVIDIA cards multiply in float32, not in TF32, torch's default."""
    with precision_restored():
        torch.backends.cudnn.allow_tf32 = False
        yield


@contextlib.contextmanager
def precision_restored() -> Iterator[None]:
    """Afterwards, float32 convolutions on NVIDIA cards multiply as before, whatever was set meanwhile."""
    before = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def total_memory(device: torch.device) -> float:
    """Bytes of memory that the device has; infinite if that is not known.

    This is the total and not what is free, so that settings derived from it are the same when a run is resumed.
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


def processor() -> str:
    """The name of the CPU's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def available_memory(device: torch.device) -> float:
    """Bytes that can be allocated on the device now; half of the machine's memory if that is not known."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps it for new tensors
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
    """Bytes that the memory limit of a container leaves (Linux control groups, version 2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        left = float((folder / "memory.max").read_text()) - float((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return left + float(statistics.get("inactive_file", 0))  # cached files, which the system gives up when asked
    except (OSError, ValueError):  # there is no limit: no such file, or the word "max"
        return float("inf")


@contextlib.contextmanager
def watching_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yields a function that returns by how many bytes the peak of memory has exceeded the level at the start.

    On a CPU this is the resident memory of the process. Only Linux can reset its peak; on other systems the function returns
    None.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        level = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - level
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak to the present level
        before = _resident_peak()
    except (OSError, StopIteration):
        yield lambda: None
        return
    yield lambda: max(0, _resident_peak() - before)


def resident_memory() -> int | None:
    """Bytes of resident memory of this process; None if the system does not tell."""
    try:
        return _status("VmRSS:")
    except (OSError, StopIteration):
        return None


def _resident_peak() -> int:
    return _status("VmHWM:")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
