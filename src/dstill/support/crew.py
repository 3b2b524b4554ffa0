"""The processes that share the draws of an iteration. One process alone is the usual case.

One process leads: it stores, reports and decides when an iteration begins. All of them hold the same state and update it alike,
so that an iteration exchanges what the draws contribute and nothing else.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import math
import os
import re
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

from dstill.errors import DstillError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

PATIENCE = 600.0  # seconds that a process waits for another one's draws
_CPU = torch.device("cpu")
_POLL = datetime.timedelta(seconds=60)
_SMOOTHING = 0.9  # of the seconds that a process takes for a draw
_SLOW = 1.5  # times the median of the others


class Parcel(NamedTuple):
    """What one draw hands to all processes: plain values and tensors, both by name."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]


class Crew(Protocol):
    """The processes of a run, seen from one of them."""

    size: int
    """Number of processes."""

    def share(self, draws: int) -> range:
        """Numbers of the draws that this process takes, of `draws`."""
        ...

    def gathered(self, own: Mapping[int, Parcel]) -> dict[int, Parcel]:
        """The parcels of all processes, by the number of their draw and in this order.

        Args:
            own: the parcels of this process. A process whose draws have ended passes none and takes part all the same.

        Raises:
            DstillError: another process has ended or does not answer.
        """
        ...

    def mean(
        self, numbers: Sequence[int], own: Mapping[int, Mapping[str, Tensor]], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """The mean of tensors of some draws, summed in the order of their numbers.

        Args:
            numbers: the draws, at least one, ascending; the same for all processes.
            own: the tensors of the draws of this process, by name.
            shapes: their shapes.

        Raises:
            DstillError: another process has ended or does not answer.
        """
        ...

    def call(self) -> None:
        """Tells the other processes that an iteration begins. Only the leader calls."""
        ...

    def straggler(self) -> str:
        """A sentence about a process that is much slower than the others; empty if there is none."""
        ...


class Alone:
    """One process that takes all draws."""

    size = 1

    def share(self, draws: int) -> range:
        return range(draws)

    def gathered(self, own: Mapping[int, Parcel]) -> dict[int, Parcel]:
        return dict(own)

    def mean(
        self, numbers: Sequence[int], own: Mapping[int, Mapping[str, Tensor]], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        return {name: _mean([own[k][name] for k in numbers]) for name in shapes}

    def call(self) -> None:
        return None

    def straggler(self) -> str:
        return ""


ALONE = Alone()


class Group:
    """Several processes, joined by gloo; or by nccl if their tensors are on cards.

    Args:
        store: the key-value store that all of them reach, for this group alone.
        number: number of this process; 0 leads.
        size: number of processes.
        device: where the tensors of this process are.
        patience: seconds to wait for another process's draws.
    """

    def __init__(self, store: Store, number: int, size: int, device: torch.device = _CPU, patience: float = PATIENCE) -> None:
        self.store, self.number, self.size, self.device, self.patience = store, number, size, device, patience
        self.pace, self.calls, self.since = [0.0] * size, 0, time.perf_counter()
        try:
            self.group = _process_group(store, number, size, device, datetime.timedelta(seconds=patience))
        except RuntimeError as error:
            raise DstillError(f"the {size} processes of the run did not find each other: {_said(error)}") from error

    def share(self, draws: int) -> range:
        return range(self.number, draws, self.size)

    def gathered(self, own: Mapping[int, Parcel]) -> dict[int, Parcel]:
        seconds = (time.perf_counter() - self.since) / len(own) if own else None
        found: dict[int, Parcel] = {}
        for number, packed in enumerate(self._exchanged(_packed(seconds, own).to(self.device))):
            pace, parcels = _unpacked(packed, self.device)
            if pace is not None:
                self._paced(number, pace)
            found |= parcels
        self.since = time.perf_counter()
        return {k: found[k] for k in sorted(found)}

    def mean(
        self, numbers: Sequence[int], own: Mapping[int, Mapping[str, Tensor]], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """As in `Crew`. Each process sums one slice of all draws, so that what it receives does not grow with their number.

        The slices are exchanged twice: those of the draws, to where they are summed, and their means, to everybody.
        """
        length = sum(math.prod(shape) for shape in shapes.values())
        width = math.ceil(length / self.size)
        drawn = [torch.cat([own[k][name].reshape(-1) for name in shapes]) for k in numbers if k in own]
        padded = [torch.nn.functional.pad(one.to(self.device), (0, self.size * width - length)) for one in drawn]
        sliced = [one.view(self.size, width) for one in padded]
        of_process = [[k for k in numbers if k % self.size == number] for number in range(self.size)]
        received = self._slices(sliced, [len(some) for some in of_process], width)
        by_number = dict(zip([k for some in of_process for k in some], received, strict=True))
        whole = torch.cat(self._all(_mean([by_number[k] for k in numbers])))[:length]
        sizes = [math.prod(shape) for shape in shapes.values()]
        parts = zip(shapes.items(), whole.split(sizes), strict=True)
        # A copy lies as torch aligns its own memory, on which the last bits of a norm may depend.
        return {name: part.clone().view(list(shape)) for (name, shape), part in parts}

    def _slices(self, own: Sequence[Tensor], counts: Sequence[int], width: int) -> Sequence[Tensor]:
        """This process's slice of every draw; `own` are all slices of its own draws, `counts` the draws of each process."""
        sent = torch.stack(list(own), 1).reshape(-1) if own else torch.zeros(0, device=self.device)
        received = torch.empty(sum(counts) * width, device=self.device)
        received_each, sent_each = [count * width for count in counts], [len(own) * width] * self.size
        self._done(lambda: self.group.alltoall_base(received, sent, received_each, sent_each))
        return received.view(-1, width).unbind()

    def call(self) -> None:
        self.calls += 1
        self.store.set(f"call {self.calls}", "on")
        self.store.delete_key(f"call {self.calls - 1}")  # everybody has heard it: they have worked since
        self.since = time.perf_counter()

    def end(self) -> None:
        """Tells the other processes that there is no more to do, also those that wait for a draw of this one."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"call {self.calls + 1}", "end")
        self.group = None

    def called(self) -> bool:
        """Waits for the leader. Returns whether another iteration begins."""
        self.calls += 1
        answer = waited_for(self.store, f"call {self.calls}")
        self.since = time.perf_counter()
        return answer == b"on"

    def fail(self, error: BaseException) -> None:
        """Leaves the other processes, and lets them know why."""
        reason = f"process {self.number}: {type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("failed", "", reason)  # the first reason; those that then leave do so for its sake
        self.group = None  # closes the connections

    def straggler(self) -> str:
        drawing = [pace for pace in self.pace if pace]
        if len(drawing) < 2:
            return ""
        *others, slowest = sorted(drawing)
        typical = statistics.median(others)
        if slowest <= _SLOW * typical:
            return ""
        number = self.pace.index(slowest)
        return f"process {number} takes {slowest:.2g} s for a draw, the others {typical:.2g} s, and all wait for it"

    def _paced(self, number: int, seconds: float) -> None:
        before = self.pace[number]
        self.pace[number] = seconds if before == 0 else _SMOOTHING * before + (1 - _SMOOTHING) * seconds

    def _exchanged(self, own: Tensor) -> list[Tensor]:
        """These bytes of every process, which may have different lengths."""
        sizes = [int(size) for size in self._all(torch.tensor([len(own)], device=self.device))]
        padded = torch.nn.functional.pad(own, (0, max(sizes) - len(own)))
        return [packed[:size] for packed, size in zip(self._all(padded), sizes, strict=True)]

    def _all(self, own: Tensor) -> list[Tensor]:
        received = [torch.empty_like(own) for _ in range(self.size)]
        self._done(lambda: self.group.allgather([received], [own]))
        return received

    def _done(self, exchange: Callable[[], Any]) -> None:
        try:
            exchange().wait()
        except RuntimeError as error:
            raise DstillError(self._lost(error)) from error

    def _lost(self, error: RuntimeError) -> str:
        reason = _said(error)
        with contextlib.suppress(RuntimeError):
            if self.store.check(["failed"]):
                reason = self.store.get("failed").decode()
        return (
            f"one of the {self.size} processes of the run has ended, or has not answered for {self.patience:g} s ({reason}); "
            "the same command goes on from the last checkpoint"
        )


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors) if len(tensors) > 1 else total


def waited_for(store: Store, key: str) -> bytes:
    """The value of a key, once it is there. Waits as long as the store exists.

    Raises:
        RuntimeError: the store's process has ended.
    """
    from torch.distributed import DistStoreError

    while True:
        try:
            store.wait([key], _POLL)
            return bytes(store.get(key))
        except DistStoreError:  # it took longer
            continue


def _process_group(store: Store, number: int, size: int, device: torch.device, patience: datetime.timedelta) -> Any:
    """A process group of torch's own, so that the caller's default group, if there is one, is left alone."""
    from torch import distributed

    if device.type == "cuda":
        cards = distributed.ProcessGroupNCCL.Options()
        cards._timeout = patience
        return distributed.ProcessGroupNCCL(store, number, size, cards)
    options = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = patience
    options._devices = [_gloo_device(store, number, size, patience)]
    return distributed.ProcessGroupGloo(store, number, size, options)


def _gloo_device(store: Store, number: int, size: int, patience: datetime.timedelta) -> Any:
    """What gloo listens on. By itself it takes the address of the machine's name, which other machines may not reach."""
    from torch.distributed import ProcessGroupGloo

    if "GLOO_SOCKET_IFNAME" in os.environ:
        return ProcessGroupGloo.create_default_device()
    host = getattr(_innermost(store), "host", "")
    own = _address_towards(host) if host else ""
    store.set(f"address {number}", own)
    keys = [f"address {other}" for other in range(size)]
    store.wait(keys, patience)
    far = [address for key in keys if not _is_local(address := store.get(key).decode())]
    if _is_local(own) and far:  # the store is on this machine
        own = _address_towards(far[0])
    return ProcessGroupGloo.create_device(hostname=own) if own else ProcessGroupGloo.create_default_device()


def _innermost(store: Any) -> Any:
    """The store behind its prefixes."""
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def _address_towards(host: str) -> str:
    """This machine's address on the way to a host; empty if there is no way."""
    with contextlib.suppress(OSError):
        family, kind, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as way:
            way.connect(address)  # sends nothing
            return str(way.getsockname()[0])
    return ""


def _is_local(address: str) -> bool:
    return not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _said(error: RuntimeError) -> str:
    """What torch says, without the place in its source and its advice."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\] ", "", first).partition(". ")[0]


def _packed(content: Any, parcels: Mapping[int, Parcel]) -> Tensor:
    """Values and parcels as bytes."""
    values = json.dumps({"content": content, "parcels": {k: parcel.values for k, parcel in parcels.items()}})
    tensors = {f"{k} {name}": tensor for k, parcel in parcels.items() for name, tensor in parcel.tensors.items()}
    # The format refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    packed = save({**tensors, "values": torch.frombuffer(bytearray(values.encode()), dtype=torch.uint8)})
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _unpacked(packed: Tensor, device: torch.device) -> tuple[Any, dict[int, Parcel]]:
    """What `_packed` was called for."""
    tensors = load(packed.cpu().numpy().tobytes())
    told = json.loads(tensors.pop("values").numpy().tobytes())
    parcels = {int(k): Parcel(values, {}) for k, values in told["parcels"].items()}
    for key, tensor in tensors.items():
        k, _, name = key.partition(" ")
        # A copy lies as torch aligns its own memory, on which the last bits of a product may depend.
        parcels[int(k)].tensors[name] = tensor.clone().to(device)
    return told["content"], parcels
