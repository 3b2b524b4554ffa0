"""Devices, memory and threads."""

from __future__ import annotations

import os

import torch

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
    return torch.device(name)


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
