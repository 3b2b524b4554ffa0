"""3x3 convolutions of CPU tensors in native kernels: Winograd's method for many channels, rows of patches for few.

Winograd's F(4x4, 3x3) (Lavin and Gray 2016; `kernels.cpp` states the interpolation points) transforms 6x6 patches d of the
input, 4x4 tiles g of an output gradient and a filter W into one domain,

    V = B^T d B      M = A g A^T      U = G W G^T

In this domain the convolution and its two transposes are 36 matrix products each, over channels or over tiles. They need a
quarter of the multiplications of the direct form:

    z = A^T [U V] A      grad_x = B [U^T M] B^T      grad_W = G^T [M^T V] G

An operand is transformed once and then used in every product that it enters. A sum of products is formed before it is
transformed back. One step of the unrolled gradient has nine products and transforms each tensor once.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dstill.derivatives.build import Kernels
from dstill.derivatives.convolution import rows

_PLANES, _TILE = 36, 4
# Bytes of padding between planes. Planes that lie a power of two apart would all map to the same cache lines.
_PADDING = 64
_LANES = 16


class Filters(NamedTuple):
    """Transformed filters in both orders, since the rows of a matrix product's right factor must be contiguous."""

    by_output: Tensor
    by_input: Tensor


class Winograd:
    """`dstill.derivatives.convolution.Convolution` of images of one size, by F(4x4, 3x3).

    Args:
        kernels: the compiled kernels.
        size: height and width of the images.
    """

    def __init__(self, kernels: Kernels, size: tuple[int, int]) -> None:
        self.kernels, self.size = kernels, size
        self.tiles = -(-size[0] // _TILE) * -(-size[1] // _TILE)

    def weight(self, weight: Tensor) -> Filters:
        return Filters(self._filters(weight), self._filters(weight.transpose(0, 1)))

    def weight_adjoint(self, total: Tensor) -> Tensor:
        outputs, inputs = total.shape[1:]
        weight = total.new_empty(outputs, inputs, 3, 3)
        self.kernels.call("winograd_weight_adjoint", total, weight, total.stride(0), outputs * inputs)
        return weight

    def input(self, x: Tensor) -> Tensor:
        return self._into("winograd_input", x)

    def output(self, g: Tensor) -> Tensor:
        return self._into("winograd_output_adjoint", g)

    def forward(self, *pairs: tuple[Tensor, Filters]) -> Tensor:
        total = _products(self.kernels, [(x, w.by_input) for x, w in pairs])
        return self._back("winograd_output", total)

    def by_input(self, *pairs: tuple[Tensor, Filters]) -> Tensor:
        total = _products(self.kernels, [(g, w.by_output) for g, w in pairs])
        return self._back("winograd_input_adjoint", total)

    def by_weight(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        return _products(self.kernels, [(g.transpose(1, 2), x) for g, x in pairs])

    def _filters(self, weight: Tensor) -> Tensor:
        domain = _domain(weight, *weight.shape[:2])
        self.kernels.call("winograd_weight", weight.contiguous(), domain, domain.stride(0), len(weight) * weight.shape[1])
        return domain

    def _into(self, name: str, images: Tensor) -> Tensor:
        batch, channels = images.shape[:2]
        domain = _domain(images, batch * self.tiles, channels)
        self.kernels.call(name, rows(images), domain, domain.stride(0), batch, *self.size, channels)
        return domain

    def _back(self, name: str, domain: Tensor) -> Tensor:
        batch, channels = domain.shape[1] // self.tiles, domain.shape[2]
        images = domain.new_empty(batch, *self.size, channels)
        self.kernels.call(name, domain, images, domain.stride(0), batch, *self.size, channels)
        return images.permute(0, 3, 1, 2)


class Patches:
    """`dstill.derivatives.convolution.Convolution` as one matrix product over 3x3 patches laid out as rows.

    For images with few channels: nine copies of them need little memory, and Winograd's matrix products would be too small.

    Args:
        kernels: the compiled kernels.
        channels: channels of the images.
        size: height and width of the images.
    """

    def __init__(self, kernels: Kernels, channels: int, size: tuple[int, int]) -> None:
        self.kernels, self.channels, self.size = kernels, channels, size
        self.pixels = size[0] * size[1]
        # Rows fill whole vector registers; the padding is zero.
        self.length = -(-9 * channels // _LANES) * _LANES

    def weight(self, weight: Tensor) -> Filters:
        outputs = len(weight)
        by_output = weight.new_zeros(1, outputs, self.length)
        by_output[0, :, : weight[0].numel()] = weight.permute(0, 2, 3, 1).reshape(outputs, -1)  # position, then channel
        return Filters(by_output, by_output.transpose(1, 2).contiguous())

    def weight_adjoint(self, total: Tensor) -> Tensor:
        return total[0, : 9 * self.channels].view(3, 3, self.channels, -1).permute(3, 2, 0, 1).contiguous()

    def input(self, x: Tensor) -> Tensor:
        patches = x.new_empty(1, len(x) * self.pixels, self.length)
        self.kernels.call("patches", rows(x), patches, self.length, len(x), *self.size, self.channels)
        return patches

    def output(self, g: Tensor) -> Tensor:
        return rows(g).reshape(1, -1, g.shape[1])

    def forward(self, *pairs: tuple[Tensor, Filters]) -> Tensor:
        z = _products(self.kernels, [(x, w.by_input) for x, w in pairs])
        return z.view(-1, *self.size, z.shape[2]).permute(0, 3, 1, 2)

    def by_input(self, *pairs: tuple[Tensor, Filters]) -> Tensor:
        patches = _products(self.kernels, [(g, w.by_output) for g, w in pairs])
        x = patches.new_empty(patches.shape[1] // self.pixels, *self.size, self.channels)
        self.kernels.call("patches_adjoint", patches, x, self.length, len(x), *self.size, self.channels)
        return x.permute(0, 3, 1, 2)

    def by_weight(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        return _products(self.kernels, [(x.transpose(1, 2), g) for g, x in pairs])


def _domain(like: Tensor, rows: int, columns: int) -> Tensor:
    plane = rows * columns + _PADDING // like.element_size()
    return like.new_empty(_PLANES * plane).as_strided((_PLANES, rows, columns), (plane, columns, 1))


def _products(kernels: Kernels, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of A B over one or two pairs (A, B), plane by plane."""
    (a, b), (a2, b2) = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
    planes, m, k = a.shape
    n = b.shape[2]
    c = _domain(a, m, n) if planes > 1 else a.new_empty(1, m, n)
    strides = (a.stride(1), a.stride(2), a.stride(0), b.stride(1), b.stride(0), c.stride(1), c.stride(0))
    kernels.call("products", a, b, a2, b2, c, planes, m, n, k, *strides)
    return c
