"""The block after a convolution, instance norm, ReLU and pooling, in four forms: forward, backward, and the tangent of each."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5  # torch's default in GroupNorm


class Unit(Protocol):
    """Instance norm (scale g, shift b), ReLU, 2x2 average pooling: z -> y.

        n = (z - mean z) r,  r = 1 / sqrt(var z + eps)      a = n g + b      y = pool(relu(a))

    Means are over the pixels of one channel of one image. The forms must run in this order; each leaves in the object
    what the next ones read. `z` may be dropped in between and put back: it is the convolution's output.
    """

    z: Tensor | None

    def forward(self, z: Tensor) -> Tensor:
        """Y."""
        ...

    def backward(self, gy: Tensor) -> Tensor:
        """Gradient by z from the gradient by y: gz = g r q,  q = ga - mean(ga) - n mean(ga n),  ga = relu'(a) pool^T(gy)."""
        ...

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients by scale, sum ga n, and shift, sum ga."""
        ...

    def tangent(self, dz: Tensor, dscale: Tensor | None, dshift: Tensor | None) -> tuple[Tensor, Tensor]:
        """(y, y'):  n' = r (z' - mean z' - n mean(n z')),  r' = -r^2 mean(n z'),  y' = pool(relu'(a) a')."""
        ...

    def tangent_backward(self, dgy: Tensor) -> tuple[Tensor, Tensor]:
        """(gz, gz'), the tangent of `backward`: gz' = g' r q + g r' q + g r q'."""
        ...

    def tangent_gradients(self) -> tuple[Tensor, Tensor]:
        """Tangents of `gradients`."""
        ...


class TensorUnit:
    """`Unit` in tensor operations: the formulas as they stand. Any device and type; `torch.compile` fuses each form."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = _channel(scale), _channel(shift)
        self.z: Tensor | None = None

    def _normalised(self) -> tuple[Tensor, Tensor]:
        """N, and relu'(a) as ones and zeros."""
        assert self.z is not None
        n = (self.z - self.mean) * self.r
        return n, (n * self.scale + self.shift > 0).to(n.dtype)

    def forward(self, z: Tensor) -> Tensor:
        self.z, self.mean = z, _mean(z)
        self.r = torch.rsqrt(_mean((z - self.mean).square()) + EPSILON)
        n, mask = self._normalised()
        return F.avg_pool2d((n * self.scale + self.shift) * mask, 2)

    def backward(self, gy: Tensor) -> Tensor:
        self.gy = gy
        n, mask = self._normalised()
        ga = _unpool(gy, n.shape) * mask
        self.mean_ga, self.mean_ga_n = _mean(ga), _mean(ga * n)
        self.by_scale, self.by_shift = (ga * n).sum((0, 2, 3)), ga.sum((0, 2, 3))
        return self.scale * self.r * (ga - self.mean_ga - n * self.mean_ga_n)

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.by_scale, self.by_shift

    def tangent(self, dz: Tensor, dscale: Tensor | None, dshift: Tensor | None) -> tuple[Tensor, Tensor]:
        n, mask = self._normalised()
        projection = _mean(n * dz)
        self.dr = -self.r * self.r * projection
        self.dn = self.r * (dz - _mean(dz) - n * projection)
        self.dscale = None if dscale is None else _channel(dscale)
        da = self.dn * self.scale
        if self.dscale is not None and dshift is not None:
            da = da + n * self.dscale + _channel(dshift)
        return F.avg_pool2d((n * self.scale + self.shift) * mask, 2), F.avg_pool2d(da * mask, 2)

    def tangent_backward(self, dgy: Tensor) -> tuple[Tensor, Tensor]:
        n, mask = self._normalised()
        ga, dga = _unpool(self.gy, n.shape) * mask, _unpool(dgy, n.shape) * mask
        product = dga * n + ga * self.dn
        self.dby_scale, self.dby_shift = product.sum((0, 2, 3)), dga.sum((0, 2, 3))
        q = ga - self.mean_ga - n * self.mean_ga_n
        dq = dga - _mean(dga) - self.dn * self.mean_ga_n - n * _mean(product)
        dgz = self.scale * (self.dr * q + self.r * dq)
        if self.dscale is not None:
            dgz = dgz + self.dscale * self.r * q
        return self.scale * self.r * q, dgz

    def tangent_gradients(self) -> tuple[Tensor, Tensor]:
        return self.dby_scale, self.dby_shift


def _unpool(y: Tensor, size: torch.Size) -> Tensor:
    """Transpose of 2x2 average pooling: every input pixel receives a quarter of its output pixel."""
    x = F.interpolate(y, scale_factor=2.0, mode="nearest") * 0.25
    bottom, right = size[2] - x.shape[2], size[3] - x.shape[3]
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
