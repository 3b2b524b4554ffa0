"""What runs the hand-written derivatives: native kernels or tensor operations, in which precision and in which pieces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dstill.derivatives import tangent
from dstill.derivatives.build import Kernels, fused_unit, kernels
from dstill.derivatives.convolution import Convolution, Direct
from dstill.derivatives.cpu_convolutions import Patches, Winograd
from dstill.derivatives.cpu_unit import NativeUnit
from dstill.derivatives.cuda_graphs import Caller, Recorder, directly
from dstill.derivatives.tangent import Operations, Sum, UnitMaker
from dstill.derivatives.unit import TensorUnit, Unit
from dstill.nets.convnet import ConvNet
from dstill.support.devices import full_precision

Precision = Literal["float32", "bfloat16-backward", "bfloat16"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Fewer input channels than this: patches. Sides below this: the direct form, of which a 4x4 tile would be mostly padding.
_FEW_CHANNELS, _SMALL_SIDE = 8, 3
# Images are taken a few at a time, so that one convolution's operands stay in the processor's caches. Matrix units for
# bfloat16 want more of them: 18 % faster in an expert's step at width 128 with five times the budget.
_PIECE_BYTES, _ROUNDED_PIECE_BYTES = 1_500_000, 8_000_000


def supports(net: nn.Module) -> bool:
    """Whether `net` has hand-written derivatives: exactly a ConvNet with instance norm."""
    return type(net) is ConvNet and net.norm == "instance"


class Tangents(NamedTuple):
    """Derivatives along a direction: of the loss, and of its gradients by parameters, images, and label logits."""

    loss: Tensor
    parameters: list[Tensor]
    images: Tensor
    labels: Tensor


Kept = list[list[Unit]]


class Gradient(NamedTuple):
    """Loss, its gradients by the parameters, what `Derivatives.tangents` may start from, and the logits `[B, K]`."""

    loss: Tensor
    parameters: list[Tensor]
    kept: Kept | None
    logits: Tensor


class Derivatives:
    """Derivatives of the mean cross-entropy of one ConvNet, a few images at a time, the pieces side by side on threads.

    An instance norm looks at one image at a time, so cutting a batch into pieces is exact. Pieces are added up in order:
    the numbers do not depend on the number of threads.

    Args:
        net: supported by `supports`; its geometry alone is read.
        device: where the tensors will be.
        dtype: their type.
        precision: `float32`: every product in the tensors' own type, also on NVIDIA cards, where torch would round to TF32.
            `bfloat16-backward`: convolutions of the second order in bfloat16; `bfloat16`: all of them, but for native kernels
            on few channels. The latter two are approximations.
        threads: pieces at a time on a CPU; torch's own number if left out.
        compiled: `torch.compile` the tensor operations, where native kernels do not run: faster after up to a minute.
        native: False for tensor operations also where native kernels could run.
        call: calls `gradient`, `tangents` and `penalty`. A `Recorder` records their kernels on an NVIDIA card and replays them,
            see `dstill.derivatives.cuda_graphs`.
    """

    def __init__(
        self,
        net: nn.Module,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        precision: Precision = "float32",
        threads: int | None = None,
        compiled: bool = False,
        native: bool = True,
        call: Caller = directly,
    ) -> None:
        if not supports(net):
            raise TypeError("only a ConvNet with instance norm has hand-written derivatives")
        assert isinstance(net, ConvNet)
        self.geometry, self.channels, self.dtype = net.geometry, net.width, dtype
        suitable = native and device.type == "cpu" and dtype in (torch.float32, torch.float64)
        compiled_kernels = kernels() if suitable else None
        self.native = compiled_kernels is not None
        exact: list[Convolution] = [_exact(compiled_kernels, channels, size, dtype) for channels, size in self.geometry]
        # With few channels there is little to multiply, and a copy in another type costs more than it saves.
        rounded: list[Convolution] = [e if isinstance(e, Patches) else Direct(dtype, torch.bfloat16) for e in exact]
        first = rounded if precision == "bfloat16" else exact
        if compiled_kernels is not None:
            unit: UnitMaker = functools.partial(NativeUnit, compiled_kernels)
        else:
            fused = fused_unit() if native and device.type == "cuda" else None
            unit = fused or (_compiled_unit() if compiled else TensorUnit)
        self.operations = Operations(unit, first, exact if precision == "float32" else rounded)
        self.threads = 1 if device.type != "cpu" else threads or torch.get_num_threads()
        budget = _PIECE_BYTES if precision == "float32" else _ROUNDED_PIECE_BYTES
        self.piece = _piece(self.geometry, net.width, dtype, budget) if device.type == "cpu" else None
        self._pool: ThreadPoolExecutor | None = None
        self._call = call

    def kept_bytes(self, images: int) -> int:
        """About what `gradient(keep=True)` holds on to for so many images."""
        numbers = 0
        for i, (_, (height, width)) in enumerate(self.geometry):
            numbers += self.channels * ((height * width if i else 0) + (height // 2) * (width // 2) + 4)
        return images * numbers * self.dtype.itemsize

    @torch.no_grad()
    def gradient(self, parameters: Sequence[Tensor], images: Tensor, targets: Tensor, *, keep: bool = False) -> Gradient:
        """Mean cross-entropy with target probabilities `[B, K]`, and its gradients; `keep` for the sake of `tangents`."""
        return self._call(self._gradient, parameters, images, targets, keep)

    def _gradient(self, parameters: Sequence[Tensor], images: Tensor, targets: Tensor, keep: bool) -> Gradient:
        point = self.operations.weights(parameters, second=False)

        def work(piece: tuple[Tensor, Tensor]) -> tangent.FirstOrder:
            result = tangent.cross_entropy_gradient(self.operations, point, *piece, len(images))
            if keep:
                result.units[0].z = None  # few input channels: cheaper to convolve again than to keep
            return result if keep else result._replace(units=[])

        parts = self._each(work, zip(self._cut(images), self._cut(targets), strict=True))
        loss, total = _added([part.loss for part in parts]), _summed([part.gradient for part in parts])
        kept = [part.units for part in parts] if keep else None
        return Gradient(loss, total.parameters(self.operations.first), kept, torch.cat([part.logits for part in parts]))

    @torch.no_grad()
    def tangents(
        self,
        parameters: Sequence[Tensor],
        direction: Sequence[Tensor],
        images: Tensor,
        targets: Tensor,
        kept: Kept | None = None,
    ) -> Tangents:
        """Derivatives of the mean cross-entropy's gradient along a direction in the parameters.

        `kept` is of `gradient` at the same point and images, and is used up; recomputed where it is None: the same numbers.
        """
        return self._call(self._tangents, parameters, direction, images, targets, kept)

    def _tangents(
        self, parameters: Sequence[Tensor], direction: Sequence[Tensor], images: Tensor, targets: Tensor, kept: Kept | None
    ) -> Tangents:
        point, along = self.operations.weights(parameters), self.operations.weights(direction, first=False)

        def work(piece: tuple[Tensor, Tensor, list[Unit] | None]) -> tangent.SecondOrder:
            some, labels, units = piece
            return tangent.cross_entropy_tangents(self.operations, point, along, some, labels, len(images), units)

        cut = self._cut(images)
        units: Sequence[list[Unit] | None] = kept or [None] * len(cut)
        parts = self._each(work, zip(cut, self._cut(targets), units, strict=True))
        return Tangents(
            _added([part.loss for part in parts]),
            _summed([part.gradient for part in parts]).parameters(self.operations.second),
            torch.cat([part.images for part in parts]),
            torch.cat([part.labels for part in parts]),
        )

    @torch.no_grad()
    def penalty(
        self, parameters: Sequence[Tensor], images: Tensor, *, pixelwise: bool, target: float = 1.0
    ) -> tuple[Tensor, list[Tensor]]:
        """The expert's gradient penalty, E[(|grad_x W(x)| - target)^2], and its exact gradients (paper Eq. 19)."""
        return self._call(self._penalty, parameters, images, pixelwise, target)

    def _penalty(
        self, parameters: Sequence[Tensor], images: Tensor, pixelwise: bool, target: float
    ) -> tuple[Tensor, list[Tensor]]:
        point = self.operations.weights(parameters)

        def work(some: Tensor) -> tuple[Tensor, Sum]:
            return tangent.penalty_tangents(self.operations, point, some, pixelwise, target, len(images))

        parts = self._each(work, self._cut(images))
        total = _summed([gradient for _, gradient in parts])
        return _added([value for value, _ in parts]), total.parameters(self.operations.second)

    @torch.no_grad()
    def logits(self, parameters: Sequence[Tensor], images: Tensor) -> Tensor:
        """`[B, K]` of preprocessed images."""
        point = self.operations.weights(parameters, second=False)
        return torch.cat(self._each(lambda some: tangent.logits(self.operations, point, some), self._cut(images)))

    @torch.no_grad()
    def features(self, parameters: Sequence[Tensor], images: Tensor) -> Tensor:
        """What enters the classifier, `[B, F]`, of preprocessed images."""
        point = self.operations.weights(parameters, second=False)
        return torch.cat(self._each(lambda some: tangent.features(self.operations, point, some), self._cut(images)))

    def _cut(self, batch: Tensor) -> list[Tensor]:
        return [batch] if self.piece is None else list(batch.tensor_split(-(-len(batch) // self.piece)))

    def _each(self, work: Callable[[_Item], _Result], pieces: Iterable[_Item]) -> list[_Result]:
        with full_precision():
            if self.threads == 1:
                return [work(piece) for piece in pieces]
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self.threads)
            return list(self._pool.map(torch.no_grad()(work), pieces))


@functools.cache
def _compiled_unit() -> type[TensorUnit]:
    """`TensorUnit` with each form compiled by itself: compiling a whole sweep takes ten times as long."""
    # One for each block and batch size, of experts and students; beyond torch's limit of eight it would compile no more.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    forms = ("forward", "backward", "tangent", "tangent_backward")
    return type("CompiledUnit", (TensorUnit,), {f: torch.compile(getattr(TensorUnit, f), dynamic=False) for f in forms})


def derivatives_of(net: nn.Module, *, precision: Precision = "float32", compiled: bool = False) -> Derivatives | None:
    """The hand-written derivatives of a network on its device, recorded on an NVIDIA card; None where it has none."""
    if not supports(net):
        return None
    weight = next(net.parameters())
    return Derivatives(net, weight.device, weight.dtype, precision, compiled=compiled, call=Recorder())


def _exact(kernels: Kernels | None, channels: int, size: tuple[int, int], dtype: torch.dtype) -> Convolution:
    if kernels is None or (min(size) < _SMALL_SIDE and channels >= _FEW_CHANNELS):
        return Direct(dtype)
    return Patches(kernels, channels, size) if channels < _FEW_CHANNELS else Winograd(kernels, size)


def _piece(geometry: Sequence[tuple[int, tuple[int, int]]], channels: int, dtype: torch.dtype, budget: int) -> int:
    """Images whose largest operand, 36 numbers for every 16 pixels of the second block's input, fits the budget."""
    height, width = geometry[min(1, len(geometry) - 1)][1]
    return max(1, int(budget / (36 / 16 * height * width * channels * dtype.itemsize)))


def _added(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum()


def _summed(parts: Sequence[Sum | None]) -> Sum:
    total = parts[0]
    assert total is not None
    for part in parts[1:]:
        assert part is not None
        total.add_(part)
    return total
