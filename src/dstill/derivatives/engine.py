"""Runs the hand-written derivatives: chooses kernels and precision, and cuts batches into pieces."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dstill.derivatives import build, tangent
from dstill.derivatives.build import Kernels, fused_unit, kernels, tiled
from dstill.derivatives.convolution import Convolution, Direct
from dstill.derivatives.cpu_convolutions import Patches, Winograd
from dstill.derivatives.cpu_unit import NativeUnit
from dstill.derivatives.cuda_graphs import Caller, Recorder, directly
from dstill.derivatives.tangent import Operations, Sum, UnitMaker
from dstill.derivatives.tiles import Product
from dstill.derivatives.unit import TensorUnit, Unit
from dstill.nets.convnet import ConvNet
from dstill.support.devices import full_precision

Precision = Literal["float32", "bfloat16-backward", "bfloat16"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Patches for fewer input channels than the first number. The direct form for sides below the second number, where most of
# Winograd's 4x4 tile would be padding.
_FEW_CHANNELS, _SMALL_SIDE = 8, 3
# Images are processed a few at a time, so that the operands of one convolution stay in the processor's caches. The matrix
# units for bfloat16 need more images: an expert's step at width 128 is 18 % faster with 8 MB than with 1.5 MB.
_PIECE_BYTES, _ROUNDED_PIECE_BYTES = 2_700_000, 8_000_000


def supports(net: nn.Module) -> bool:
    """Whether `net` has hand-written derivatives: it must be a `ConvNet` (no subclass) with instance norm.

    Example:
        >>> supports(ConvNet(3, 10, (8, 8), width=4, depth=1)), supports(nn.Linear(2, 2))
        (True, False)
    """
    return type(net) is ConvNet and net.norm == "instance"


class Tangents(NamedTuple):
    """Derivatives along a direction: of the loss, and of its gradients with respect to parameters, images and label logits."""

    loss: Tensor
    parameters: list[Tensor]
    images: Tensor
    labels: Tensor


# What the first-order pass leaves for the second: for each piece of the batch, the unit of each block.
Kept = list[list[Unit]]


class Gradient(NamedTuple):
    """The loss, its gradients with respect to the parameters, what `Derivatives.tangents` reuses, and logits `[B, K]`."""

    loss: Tensor
    parameters: list[Tensor]
    kept: Kept | None
    logits: Tensor


class Derivatives:
    """Derivatives of the mean cross-entropy of one ConvNet. On a CPU a batch is cut into pieces, which threads work on.

    Instance norm treats each image by itself, so cutting a batch into pieces is exact. The results of the pieces are added in
    order, so the numbers do not depend on the number of threads.

    Args:
        net: a network for which `supports` is true. Only its geometry is read, not its weights.
        device: device of the tensors.
        dtype: type of the tensors.
        precision: `float32`: every product in the type of the tensors, also on NVIDIA cards, where torch would round to TF32.
            `bfloat16-backward`: convolutions of the second-order pass in bfloat16. `bfloat16`: all convolutions in bfloat16,
            except native kernels on few channels. The last two are approximations.
        threads: number of threads on a CPU; torch's own number if left out.
        compiled: compile the tensor operations with `torch.compile` where native kernels do not run. This is faster after a
            compilation of up to a minute.
        native: False to use tensor operations even where native kernels could run.
        call: calls `gradient`, `tangents` and `penalty`. A `Recorder` records their kernels on an NVIDIA card and replays them,
            see `dstill.derivatives.cuda_graphs`.

    Raises:
        TypeError: the network has no hand-written derivatives.
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
        self.tiled = functools.partial(tiled, device) if native and dtype == torch.float32 else _never
        blocks = [(channels, net.width, size) for channels, size in self.geometry]
        exact = [self._exact(compiled_kernels, *block) for block in blocks]
        rounded = [self._rounded(convolution, *block) for convolution, block in zip(exact, blocks, strict=True)]
        first = rounded if precision == "bfloat16" else exact
        if compiled_kernels is not None:
            unit: UnitMaker = functools.partial(NativeUnit, compiled_kernels)
        else:
            own = not all(isinstance(convolution, Direct) for convolution in first)  # the pass that keeps z decides
            fused = fused_unit(channels_last=own) if native and device.type == "cuda" else None
            unit = fused or (_compiled_unit() if compiled else TensorUnit)
        self.operations = Operations(unit, first, exact if precision == "float32" else rounded)
        self.threads = 1 if device.type != "cpu" else threads or torch.get_num_threads()
        budget = _PIECE_BYTES if precision == "float32" else _ROUNDED_PIECE_BYTES
        self.piece = _piece(self.geometry, net.width, dtype, budget) if device.type == "cpu" else None
        self._pool: ThreadPoolExecutor | None = None
        self._call = call

    def _exact(self, kernels: Kernels | None, inputs: int, outputs: int, size: tuple[int, int]) -> Convolution:
        if kernels is None or (min(size) < _SMALL_SIDE and inputs >= _FEW_CHANNELS):
            return self.tiled("tf32x3", inputs, outputs, size) or Direct(self.dtype)
        return Patches(kernels, inputs, size) if inputs < _FEW_CHANNELS else Winograd(kernels, size)

    def _rounded(self, exact: Convolution, inputs: int, outputs: int, size: tuple[int, int]) -> Convolution:
        if isinstance(exact, Patches):  # little to multiply: a copy in another type would cost more than it saves
            return exact
        return self.tiled("bfloat16", inputs, outputs, size) or Direct(self.dtype, torch.bfloat16)

    def kept_bytes(self, images: int) -> int:
        """Approximate bytes by which memory grows while the results of `gradient(keep=True)` for `images` images are kept.

        On a CPU that is twice their size: the allocator leaves gaps between what is kept and what is not (measured: 1.4 to
        2.2 times).
        """
        numbers = 0
        for i, (_, (height, width)) in enumerate(self.geometry):
            numbers += self.channels * ((height * width if i else 0) + (height // 2) * (width // 2) + 4)
        return (1 if self.piece is None else 2) * images * numbers * self.dtype.itemsize

    @torch.no_grad()
    def gradient(self, parameters: Sequence[Tensor], images: Tensor, targets: Tensor, *, keep: bool = False) -> Gradient:
        """Mean cross-entropy with target probabilities, and its gradients.

        Args:
            parameters: in the order of `net.parameters()`.
            images: `[B, C, H, W]`, preprocessed.
            targets: target probabilities `[B, K]`.
            keep: also return what `tangents` would otherwise recompute.
        """
        return self._call(self._gradient, parameters, images, targets, keep)

    def _gradient(self, parameters: Sequence[Tensor], images: Tensor, targets: Tensor, keep: bool) -> Gradient:
        point = self.operations.weights(parameters, second=False)

        def work(piece: tuple[Tensor, Tensor]) -> tangent.FirstOrder:
            result = tangent.cross_entropy_gradient(self.operations, point, *piece, len(images))
            if keep:
                result.units[0].z = None  # it has few input channels: convolving again is cheaper than keeping
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
        """Derivatives of the gradient of the mean cross-entropy along a direction in the parameters.

        Args:
            parameters: in the order of `net.parameters()`.
            direction: a tensor for each parameter, of its shape.
            images: `[B, C, H, W]`, preprocessed.
            targets: target probabilities `[B, K]`.
            kept: what `gradient` kept for the same parameters, images and targets. It can be used only once. It is recomputed
                if left out; the numbers are the same.
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
        """The expert's gradient penalty E[(|grad_x W(x)| - target)^2] and its exact gradients (paper Eq. 19).

        Args:
            parameters: in the order of `net.parameters()`.
            images: `[B, C, H, W]`, preprocessed, not augmented.
            pixelwise: see `dstill.derivatives.tangent.penalty_tangents`.
            target: the paper's K.
        """
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
        """Logits `[B, K]` of preprocessed images `[B, C, H, W]`."""
        point = self.operations.weights(parameters, second=False)
        return torch.cat(self._each(lambda some: tangent.logits(self.operations, point, some), self._cut(images)))

    @torch.no_grad()
    def features(self, parameters: Sequence[Tensor], images: Tensor) -> Tensor:
        """The inputs of the classifier, `[B, F]`, for preprocessed images `[B, C, H, W]`."""
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


def _never(product: Product, inputs: int, outputs: int, size: tuple[int, int]) -> None:
    """Stands for `tiled` where our own convolutions cannot run."""


@functools.cache
def _compiled_unit() -> type[TensorUnit]:
    """`TensorUnit` with each form compiled by itself, since compiling a whole pass takes ten times as long."""
    # Every block and every batch size, of experts and of students, is compiled by itself. Torch would stop at eight.
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    forms = ("forward", "backward", "tangent", "tangent_backward")
    return type("CompiledUnit", (TensorUnit,), {f: torch.compile(getattr(TensorUnit, f), dynamic=False) for f in forms})


def describe(net: nn.Module, device: torch.device, precision: Precision = "float32", *, compiled: bool = False) -> str:
    """What differentiates a network in an unrolled student, as a phrase for the log.

    Example:
        >>> describe(nn.Linear(2, 2), torch.device("cpu"))
        'torch double backward'
    """
    if not supports(net):
        return "torch double backward"
    phrase = build.describe(device, compiled=compiled)
    if device.type != "cuda":
        return phrase
    used = Derivatives(net, device, precision=precision).operations
    pairs = enumerate(zip(used.first, used.second, strict=True), 1)
    own = [str(block) for block, pair in pairs if not all(isinstance(convolution, Direct) for convolution in pair)]
    return f"{phrase} with own convolutions in block {', '.join(own)}" if own else phrase


def derivatives_of(net: nn.Module, *, precision: Precision = "float32", compiled: bool = False) -> Derivatives | None:
    """The hand-written derivatives of a network on its device, recorded on an NVIDIA card; None if it has none."""
    if not supports(net):
        return None
    weight = next(net.parameters())
    return Derivatives(net, weight.device, weight.dtype, precision, compiled=compiled, call=Recorder())


def _piece(geometry: Sequence[tuple[int, tuple[int, int]]], channels: int, dtype: torch.dtype, budget: int) -> int:
    """How many images fit the budget of bytes with their largest operand.

    That is the second block's input in Winograd's domain: 36 numbers for every 16 pixels.
    """
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
