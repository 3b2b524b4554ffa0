# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""3x3 convolutions on NVIDIA cards as matrix products on tensor cores, in Triton kernels.

Images are channels-last, `[B, H, W, C]`. The convolution and its two transposes are matrix products whose left factors are
never laid out in memory. Each program gathers the numbers that it needs:

    z[p, o]       = sum over (t, i) of x[p + t, i] W[(t, i), o]      a row p for each pixel, t one of the nine places
    grad_x[p, i]  = sum over (t, o) of g[p + t, o] W[(-t, i), o]
    grad_W[(t, i), o] = sum over p of x[p + t, i] g[p, o]

A sum of two products, such as W * x' + W' * x, is one launch with one accumulator.

Tensor cores round float32 to TF32, with 10 bits of fraction. `tf32x3` splits each operand into two TF32 numbers and adds the
three products that matter. Its results have the accuracy of float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dstill.derivatives.convolution import Pair, rows
from dstill.derivatives.tiles import Product, Tile


@triton.jit
def _multiplied(a, b, total, PRODUCT: tl.constexpr):
    if PRODUCT == "bfloat16":
        total = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        total = tl.dot(a, b, total, input_precision=PRODUCT, out_dtype=total.dtype)
    return total


@triton.jit
def _gathered(x, pixel, k, count, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """x[p + t, c] for pixels p and k = (t, c), broadcast against each other; 0 outside the image."""
    place, channel = k // C, k % C
    down, right = place // 3 - 1, place % 3 - 1
    row, column = pixel // W % H + down, pixel % W + right
    inside = (pixel < count) & (place < 9) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return tl.load(x + (pixel + down * W + right).to(tl.int64) * C + channel, inside, 0.0)


@triton.jit
def _convolve(
    x, w, x2, w2, z, count,
    PAIRS: tl.constexpr, TRANSPOSED: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """z `[count, N]` from x `[count, C]`: by W `[9 C, N]` or, if TRANSPOSED, by the transpose of W `[9 N, C]`."""
    pixel = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    n = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    total = tl.zeros([ROWS, COLUMNS], z.dtype.element_ty)
    for pair in tl.static_range(PAIRS):
        for start in range(0, 9 * C, DEPTH):
            k = start + tl.arange(0, DEPTH)
            a = _gathered(x if pair == 0 else x2, pixel, k[None, :], count, H, W, C)
            below = k[:, None]
            place = ((8 - below // C) * N + n) * C + below % C if TRANSPOSED else below * N + n
            b = tl.load((w if pair == 0 else w2) + place, (below < 9 * C) & (n < N), 0.0)
            total = _multiplied(a, b, total, PRODUCT)
    tl.store(z + pixel.to(tl.int64) * N + n, total, (pixel < count) & (n < N))


@triton.jit
def _correlate(
    g, x, g2, x2, parts, count, share,
    PAIRS: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, N: tl.constexpr,
    PRODUCT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One of `parts` `[S, 9 C, N]` from `share` pixels of x `[count, C]` and g `[count, N]`."""
    k = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    n = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, count)
    total = tl.zeros([ROWS, COLUMNS], parts.dtype.element_ty)
    for pair in tl.static_range(PAIRS):
        for start in range(first, last, DEPTH):
            pixel = start + tl.arange(0, DEPTH)
            a = _gathered(x if pair == 0 else x2, pixel[None, :], k, last, H, W, C)
            across = pixel[:, None]
            place = across.to(tl.int64) * N + n
            b = tl.load((g if pair == 0 else g2) + place, (across < last) & (n < N), 0.0)
            total = _multiplied(a, b, total, PRODUCT)
    place = (tl.program_id(2) * 9 * C + k) * N + n
    tl.store(parts + place, total, (k < 9 * C) & (n < N))


class Tiled:
    """`dstill.derivatives.convolution.Convolution` in these kernels.

    Args:
        product: how numbers are multiplied.
        tile: how the products are divided.
        programs: programs that fill the card. A gradient with respect to the weight is divided into parts until there are as
            many. The parts are added in order, so the bits depend on this number.
    """

    def __init__(self, product: Product, tile: Tile, programs: int = 264) -> None:
        self.product, self.tile, self.programs = product, tile, programs

    def weight(self, weight: Tensor) -> Tensor:
        outputs = len(weight)
        return weight.permute(2, 3, 1, 0).reshape(-1, outputs).contiguous()  # [9 I, O]

    def weight_adjoint(self, total: Tensor) -> Tensor:
        return total.view(3, 3, -1, total.shape[1]).permute(3, 2, 0, 1).contiguous()

    def input(self, x: Tensor) -> Tensor:
        return rows(x)

    def output(self, g: Tensor) -> Tensor:
        return rows(g)

    def forward(self, *pairs: Pair) -> Tensor:
        return self._convolved(pairs, pairs[0][1].shape[1], transposed=False)

    def by_input(self, *pairs: Pair) -> Tensor:
        return self._convolved(pairs, len(pairs[0][1]) // 9, transposed=True)

    def by_weight(self, *pairs: Pair) -> Tensor:
        (g, x), (g2, x2) = pairs[0], pairs[-1]
        (batch, height, width, channels), outputs = x.shape, g.shape[3]
        count, tile = batch * height * width, self.tile
        blocks = triton.cdiv(9 * channels, tile.rows), triton.cdiv(outputs, tile.columns)
        shares = max(1, min(self.programs // (blocks[0] * blocks[1]), triton.cdiv(count, tile.depth)))
        share = triton.cdiv(triton.cdiv(count, shares), tile.depth) * tile.depth
        parts = x.new_empty(triton.cdiv(count, share), 9 * channels, outputs)
        sizes = {"PAIRS": len(pairs), "H": height, "W": width, "C": channels, "N": outputs}
        self._launch(_correlate, (*blocks, len(parts)), g, x, g2, x2, parts, count, share, **sizes)
        return parts.sum(0)

    def _convolved(self, pairs: tuple[Pair, ...], outputs: int, *, transposed: bool) -> Tensor:
        (x, w), (x2, w2) = pairs[0], pairs[-1]
        batch, height, width, channels = x.shape
        count, tile = batch * height * width, self.tile
        z = x.new_empty(batch, height, width, outputs)
        sizes = {"PAIRS": len(pairs), "TRANSPOSED": transposed, "H": height, "W": width, "C": channels, "N": outputs}
        grid = (triton.cdiv(count, tile.rows), triton.cdiv(outputs, tile.columns))
        self._launch(_convolve, grid, x, w, x2, w2, z, count, **sizes)
        return z.permute(0, 3, 1, 2)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        tile, divided = self.tile, {"num_warps": self.tile.warps, "num_stages": self.tile.stages}
        constants |= {"PRODUCT": self.product, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants, **divided)
