# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
"""Instance norm, ReLU and pooling of a block in Triton kernels for NVIDIA cards: one kernel for each of the four forms.

A program handles a few rows; a row is one channel of one image. A block of numbers is `[rows, pooled pixels, 4]`. Its last
axis holds the four pixels that are pooled into one, so that pooling is a sum along this axis and its transpose a broadcast.

Memory is `[image, channel, row, column]`, or channels-last beside convolutions that are so: copies would cost as much as the
kernels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from dstill.derivatives.convolution import channels_last
from dstill.derivatives.unit import EPSILON, TensorUnit

_MOST_POOLED = 4096  # pooled pixels of a row: the numbers of one program must fit its registers
_BLOCK = 1024  # numbers of each operand that one program handles, if rows are short enough
# Channels-last, a program handles eight rows, since a card reads 32 bytes at once, or as many as fit its registers.
_LAST_ROWS, _LAST_BLOCK = 8, 8192


@triton.jit
def _places(count, channels, LAST: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, POOLED: tl.constexpr):
    """Row numbers `[ROWS]`, then the offsets of pooled pixels and of pixels; each with a mask of those that exist."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, POOLED)
    exists = row < count
    there = exists[:, None] & (place < H * W // 4)[None, :]
    corner = tl.arange(0, 4)
    pixel = (place // (W // 2) * 2 * W + place % (W // 2) * 2)[:, None] + (corner // 2 * W + corner % 2)[None, :]
    first = row.to(tl.int64)
    if LAST:
        image, channel = first // channels, first % channels
        pooled = (image[:, None] * (H * W // 4) + place[None, :]) * channels + channel[:, None]
        pixels = (image[:, None, None] * (H * W) + pixel[None, :, :]) * channels + channel[:, None, None]
    else:
        pooled = first[:, None] * (H * W // 4) + place[None, :]
        pixels = first[:, None, None] * (H * W) + pixel[None, :, :]
    return row, exists, pooled, there, pixels, there[:, :, None] & (corner < 4)[None, None, :]


@triton.jit
def _total(x):
    """Sum over a row's pixels, `[ROWS]`."""
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def _mean(x, H: tl.constexpr, W: tl.constexpr):
    return (_total(x) / (H * W))[:, None, None]


@triton.jit
def _pool(x):
    return tl.sum(x, 2) / 4


@triton.jit
def _per_row(pointer, index, exists):
    return tl.load(pointer + index, exists, 0.0)[:, None, None]


@triton.jit
def _forward(
    z_in, scale_in, shift_in, y_out, mean_out, r_out, count, channels,
    EPS: tl.constexpr, LAST: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    row, exists, pooled, there, pixels, mask = _places(count, channels, LAST, H, W, ROWS, POOLED)
    z = tl.load(z_in + pixels, mask, 0.0)
    mean = _mean(z, H, W)
    centred = tl.where(mask, z - mean, 0.0)
    r = 1.0 / tl.sqrt(_mean(centred * centred, H, W) + EPS)
    a = centred * r * _per_row(scale_in, row % channels, exists) + _per_row(shift_in, row % channels, exists)
    tl.store(y_out + pooled, _pool(tl.where(a <= 0, 0.0, a)), there)  # NaN stays NaN
    tl.store(mean_out + row, tl.reshape(mean, [ROWS]), exists)
    tl.store(r_out + row, tl.reshape(r, [ROWS]), exists)


@triton.jit
def _backward(
    gy_in, z_in, mean_in, r_in, scale_in, shift_in, gz_out, sums_out, count, channels,
    LAST: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    row, exists, pooled, there, pixels, mask = _places(count, channels, LAST, H, W, ROWS, POOLED)
    scale, r = _per_row(scale_in, row % channels, exists), _per_row(r_in, row, exists)
    n = (tl.load(z_in + pixels, mask, 0.0) - _per_row(mean_in, row, exists)) * r
    active = (n * scale + _per_row(shift_in, row % channels, exists) > 0) & mask
    ga = tl.where(active, tl.load(gy_in + pooled, there, 0.0)[:, :, None] / 4, 0.0)
    q = ga - _mean(ga, H, W) - n * _mean(ga * n, H, W)
    tl.store(gz_out + pixels, scale * r * q, mask)
    tl.store(sums_out + row, _total(ga * n), exists)
    tl.store(sums_out + count + row, _total(ga), exists)


@triton.jit
def _tangent(
    dz_in, z_in, mean_in, r_in, scale_in, shift_in, dscale_in, dshift_in, y_out, dy_out, rows_out, count, channels,
    AFFINE: tl.constexpr, LAST: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    row, exists, pooled, there, pixels, mask = _places(count, channels, LAST, H, W, ROWS, POOLED)
    scale, r = _per_row(scale_in, row % channels, exists), _per_row(r_in, row, exists)
    n = tl.where(mask, (tl.load(z_in + pixels, mask, 0.0) - _per_row(mean_in, row, exists)) * r, 0.0)
    a = n * scale + _per_row(shift_in, row % channels, exists)
    dz = tl.load(dz_in + pixels, mask, 0.0)
    dmean, projection = _mean(dz, H, W), _mean(n * dz, H, W)
    da = r * (dz - dmean - n * projection) * scale
    if AFFINE:
        da += n * _per_row(dscale_in, row % channels, exists) + _per_row(dshift_in, row % channels, exists)
    tl.store(y_out + pooled, _pool(tl.where(a <= 0, 0.0, a)), there)
    tl.store(dy_out + pooled, _pool(tl.where(a > 0, da, 0.0)), there)
    tl.store(rows_out + row, tl.reshape(dmean, [ROWS]), exists)
    tl.store(rows_out + count + row, tl.reshape(projection, [ROWS]), exists)


@triton.jit
def _tangent_backward(
    gy_in, dgy_in, dz_in, rows_in, z_in, mean_in, r_in, scale_in, shift_in, dscale_in, gz_out, dgz_out, sums_out,
    count, channels,
    AFFINE: tl.constexpr, LAST: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    row, exists, pooled, there, pixels, mask = _places(count, channels, LAST, H, W, ROWS, POOLED)
    scale, r = _per_row(scale_in, row % channels, exists), _per_row(r_in, row, exists)
    dmean, projection = _per_row(rows_in, row, exists), _per_row(rows_in + count, row, exists)
    n = tl.where(mask, (tl.load(z_in + pixels, mask, 0.0) - _per_row(mean_in, row, exists)) * r, 0.0)
    dn = tl.where(mask, r * (tl.load(dz_in + pixels, mask, 0.0) - dmean - n * projection), 0.0)
    active = (n * scale + _per_row(shift_in, row % channels, exists) > 0) & mask
    ga = tl.where(active, tl.load(gy_in + pooled, there, 0.0)[:, :, None] / 4, 0.0)
    dga = tl.where(active, tl.load(dgy_in + pooled, there, 0.0)[:, :, None] / 4, 0.0)
    product = dga * n + ga * dn
    ga_n = _mean(ga * n, H, W)
    q = ga - _mean(ga, H, W) - n * ga_n
    dq = dga - _mean(dga, H, W) - dn * ga_n - n * _mean(product, H, W)
    dgz = scale * r * dq - scale * r * r * projection * q
    if AFFINE:
        dgz += _per_row(dscale_in, row % channels, exists) * r * q
    tl.store(gz_out + pixels, scale * r * q, mask)
    tl.store(dgz_out + pixels, dgz, mask)
    tl.store(sums_out + row, _total(product), exists)
    tl.store(sums_out + count + row, _total(dga), exists)


class FusedUnit(TensorUnit):
    """`TensorUnit` of float32 or float64 in these kernels; falls back to tensor operations for odd and very large sides."""

    channels_last: ClassVar[bool] = False

    def forward(self, z: Tensor) -> Tensor:
        if not _fits(z):
            return super().forward(z)
        self.z = z = self._arranged(z)
        self.mean, self.r = z.new_empty(2, *z.shape[:2], 1, 1)
        y = self._pooled(z)
        self._launch(_forward, z, z, self.scale, self.shift, y, self.mean, self.r, EPS=EPSILON)
        return y

    def backward(self, gy: Tensor) -> Tensor:
        assert self.z is not None
        if not _fits(self.z):
            return super().backward(gy)
        self.gy, gz, sums = self._arranged(gy), torch.empty_like(self.z), _sums(self.z)
        self._launch(_backward, self.z, self.gy, self.z, *self._norm(), gz, sums)
        self.by_scale, self.by_shift = sums.sum(1)
        return gz

    def tangent(self, dz: Tensor, dscale: Tensor | None, dshift: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.z is not None
        if not _fits(self.z):
            return super().tangent(dz, dscale, dshift)
        self.z = z = self._arranged(self.z)
        self.dz, self.dscale, self.rows = self._arranged(dz), dscale, _sums(z)
        y, dy = self._pooled(z), self._pooled(z)
        affine = dscale is not None
        direction = (dscale, dshift) if affine else (z, z)  # not read
        self._launch(_tangent, z, self.dz, z, *self._norm(), *direction, y, dy, self.rows, AFFINE=affine)
        return y, dy

    def tangent_backward(self, dgy: Tensor) -> tuple[Tensor, Tensor]:
        assert self.z is not None
        if not _fits(z := self.z):
            return super().tangent_backward(dgy)
        gz, dgz, sums = torch.empty_like(z), torch.empty_like(z), _sums(z)
        affine = self.dscale is not None
        direction = self.dscale if affine else z  # not read
        given = (self.gy, self._arranged(dgy), self.dz, self.rows, z, *self._norm(), direction)
        self._launch(_tangent_backward, z, *given, gz, dgz, sums, AFFINE=affine)
        self.dby_scale, self.dby_shift = sums.sum(1)
        return gz, dgz

    def _norm(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.r, self.scale, self.shift

    def _arranged(self, x: Tensor) -> Tensor:
        return channels_last(x) if self.channels_last else x.contiguous()

    def _pooled(self, z: Tensor) -> Tensor:
        batch, channels, height, width = z.shape
        if self.channels_last:
            return z.new_empty(batch, height // 2, width // 2, channels).permute(0, 3, 1, 2)
        return z.new_empty(batch, channels, height // 2, width // 2)

    def _launch(self, kernel: Any, like: Tensor, *tensors: Tensor | None, **constants: Any) -> None:
        """Launches a kernel over all rows of tensors with the shape of `like`."""
        batch, channels, height, width = like.shape
        count, pooled = batch * channels, triton.next_power_of_2(height * width // 4)
        rows = max(1, _BLOCK // (4 * pooled))
        if self.channels_last:
            rows = max(rows, min(_LAST_ROWS, _LAST_BLOCK // (4 * pooled)))
        sizes = {"LAST": self.channels_last, "H": height, "W": width, "ROWS": rows, "POOLED": pooled}
        warps = min(16, max(1, 4 * rows * pooled // 256))
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(count, rows),)](*tensors, count, channels, **constants, **sizes, num_warps=warps)


class ChannelsLastUnit(FusedUnit):
    """`FusedUnit` with channels-last images inside."""

    channels_last: ClassVar[bool] = True


def _fits(z: Tensor) -> bool:
    height, width = z.shape[2:]
    return height % 2 == width % 2 == 0 and height * width // 4 <= _MOST_POOLED and z.dtype in (torch.float32, torch.float64)


def _sums(z: Tensor) -> Tensor:
    """Uninitialised memory for two numbers for each row."""
    return z.new_empty(2, *z.shape[:2])
