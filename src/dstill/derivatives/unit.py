"""Instance norm, ReLU and pooling of a block in four forms: forward, backward, and the tangents of both."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-5  # torch's default in GroupNorm


class Unit(Protocol):
    """Instance norm (scale g, shift b), ReLU, 2x2 average pooling: z -> y.

        n = (z - mean z) r,  r = 1 / sqrt(var z + eps)      a = n g + b      y = pool(relu(a))

    Means are over the pixels of one channel of one image. The four forms must be called in the order below; each stores in the
    object what the later ones read. `z`, the convolution's output, may be removed in between and restored.
    """

    z: Tensor | None

    def forward(self, z: Tensor) -> Tensor:
        """The output y, `[B, C, H // 2, W // 2]`, of z, `[B, C, H, W]`."""
        ...

    def backward(self, gy: Tensor) -> Tensor:
        """The gradient gz with respect to z, from the gradient gy with respect to y.

        gz = g r q,  q = ga - mean(ga) - n mean(ga n),  ga = relu'(a) pool^T(gy)
        """
        ...

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients with respect to the scale, sum ga n, and the shift, sum ga; `[C]` each."""
        ...

    def tangent(self, dz: Tensor, dscale: Tensor | None, dshift: Tensor | None) -> tuple[Tensor, Tensor]:
        """The output y and its tangent y', from the tangents of z, scale and shift (None where these do not change).

        n' = r (z' - mean z' - n mean(n z')),  r' = -r^2 mean(n z'),  y' = pool(relu'(a) a')
        """
        ...

    def tangent_backward(self, dgy: Tensor) -> tuple[Tensor, Tensor]:
        """gz and its tangent, from the tangent of gy: gz' = g' r q + g r' q + g r q'."""
        ...

    def tangent_gradients(self) -> tuple[Tensor, Tensor]:
        """The tangents of `gradients`."""
        ...


class TensorUnit:
    """`Unit` in few tensor operations, for any device and type; `torch.compile` can fuse each form.

    Args:
        scale: scale of the norm, `[C]`.
        shift: shift of the norm, `[C]`.
    """

    KEPT = ("scale", "shift", "z", "mean", "r", "gy")  # what the second-order pass reads

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = _channel(scale), _channel(shift)
        self.z: Tensor | None = None
        self.a: Tensor | None = None  # set by `forward`, removed by `backward`

    def _normalised(self) -> tuple[Tensor, Tensor]:
        """n and a."""
        assert self.z is not None
        n = (self.z.contiguous() - self.mean) * self.r
        return n, torch.addcmul(self.shift, n, self.scale)

    def forward(self, z: Tensor) -> Tensor:
        batch, channels, height, width = z.shape
        z = z.contiguous()
        a, mean, r = torch.native_group_norm(
            z, self.scale.flatten(), self.shift.flatten(), batch, channels, height * width, channels, EPSILON
        )
        self.z, self.a, self.mean, self.r = z, a, mean[..., None, None], r[..., None, None]
        return F.avg_pool2d(a.relu(), 2)

    def backward(self, gy: Tensor) -> Tensor:
        assert self.z is not None and self.a is not None
        batch, channels, height, width = self.z.shape
        ga = _through_relu(_unpool(gy, self.z), self.a)
        self.gy, self.a = gy, None
        gz, self.by_scale, self.by_shift = torch.ops.aten.native_group_norm_backward(
            ga,
            self.z,
            self.mean.flatten(1),
            self.r.flatten(1),
            self.scale.flatten(),
            batch,
            channels,
            height * width,
            channels,
            [True, True, True],
        )
        return gz

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.by_scale, self.by_shift

    def tangent(self, dz: Tensor, dscale: Tensor | None, dshift: Tensor | None) -> tuple[Tensor, Tensor]:
        n, a = self._normalised()
        dz = dz.contiguous()
        projection = _mean(n * dz)
        self.dr = -self.r * self.r * projection
        self.dn = self.r * torch.addcmul(dz - _mean(dz), n, projection, value=-1)
        self.dscale = None if dscale is None else _channel(dscale)
        if self.dscale is not None and dshift is not None:
            da = torch.addcmul(torch.addcmul(_channel(dshift), n, self.dscale), self.dn, self.scale)
        else:
            da = self.dn * self.scale
        return F.avg_pool2d(a.relu(), 2), F.avg_pool2d(_through_relu(da, a), 2)

    def tangent_backward(self, dgy: Tensor) -> tuple[Tensor, Tensor]:
        n, a = self._normalised()
        ga, dga = (_through_relu(_unpool(g, n), a) for g in (self.gy, dgy))
        product = torch.addcmul(dga * n, ga, self.dn)
        self.dby_scale, self.dby_shift = product.sum((0, 2, 3)), dga.sum((0, 2, 3))
        mean_ga_n = _mean(ga * n)
        q = torch.addcmul(ga - _mean(ga), n, mean_ga_n, value=-1)
        dq = torch.addcmul(dga - _mean(dga), self.dn, mean_ga_n, value=-1)
        dq = torch.addcmul(dq, n, _mean(product), value=-1)
        dgz = torch.addcmul(self.scale * self.r * dq, q, self.scale * self.dr)
        if self.dscale is not None:
            dgz = torch.addcmul(dgz, q, self.dscale * self.r)
        return self.scale * self.r * q, dgz

    def tangent_gradients(self) -> tuple[Tensor, Tensor]:
        return self.dby_scale, self.dby_shift


def _through_relu(g: Tensor, a: Tensor) -> Tensor:
    """relu'(a) g; the slope at 0 is 0."""
    return torch.ops.aten.threshold_backward(g, a, 0)


def _unpool(y: Tensor, like: Tensor) -> Tensor:
    """The transpose of 2x2 average pooling, in the shape of `like`: each input pixel receives a quarter of its output pixel."""
    return torch.ops.aten.avg_pool2d_backward(y, like, [2, 2], [], [0, 0], False, True, None)


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)
