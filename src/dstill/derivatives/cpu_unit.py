"""Instance norm, ReLU and pooling of a block in native kernels: each of the four forms in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dstill.derivatives.build import Kernels
from dstill.derivatives.convolution import channels_last
from dstill.derivatives.unit import EPSILON


class NativeUnit:
    """`dstill.derivatives.unit.Unit` of CPU tensors in float32 or float64; images are channels-last inside.

    Args:
        kernels: the compiled kernels.
        scale: scale of the norm, `[C]`.
        shift: shift of the norm, `[C]`.
    """

    def __init__(self, kernels: Kernels, scale: Tensor, shift: Tensor) -> None:
        self.kernels, self.scale, self.shift = kernels, scale.contiguous(), shift.contiguous()
        self.z: Tensor | None = None

    def forward(self, z: Tensor) -> Tensor:
        self.z = z = channels_last(z)
        self.mean, self.r = self._statistics(z)
        y = self._pooled(z)
        self.kernels.call("unit_forward", z, self.scale, self.shift, y, self.mean, self.r, EPSILON, *_shape(z))
        return y

    def backward(self, gy: Tensor) -> Tensor:
        z = self._kept()
        self.gy, gz = channels_last(gy), torch.empty_like(z)
        self.sum_ga, self.sum_ga_n = self._statistics(z)
        self.kernels.call("unit_backward", z, *self._norm(), self.gy, gz, self.sum_ga, self.sum_ga_n, *_shape(z))
        return gz

    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.sum_ga_n.sum(0), self.sum_ga.sum(0)

    def tangent(self, dz: Tensor, dscale: Tensor | None, dshift: Tensor | None) -> tuple[Tensor, Tensor]:
        z = self._kept()
        self.dz, self.dscale = channels_last(dz), dscale if dscale is None else dscale.contiguous()
        dshift = dshift if dshift is None else dshift.contiguous()
        y, dy = self._pooled(z), self._pooled(z)
        self.mean_dz, self.projection = self._statistics(z)
        self.kernels.call(
            "unit_tangent", z, *self._norm(), self.dz, self.dscale, dshift, y, dy, self.mean_dz, self.projection, *_shape(z)
        )
        return y, dy

    def tangent_backward(self, dgy: Tensor) -> tuple[Tensor, Tensor]:
        z = self._kept()
        gz, dgz = torch.empty_like(z), torch.empty_like(z)
        self.sum_dga, self.sum_scale = self._statistics(z)
        before = (self.dz, self.mean_dz, self.projection, self.dscale, self.gy, self.sum_ga, self.sum_ga_n)
        self.kernels.call(
            "unit_tangent_backward",
            z,
            *self._norm(),
            *before,
            channels_last(dgy),
            gz,
            dgz,
            self.sum_dga,
            self.sum_scale,
            *_shape(z),
        )
        return gz, dgz

    def tangent_gradients(self) -> tuple[Tensor, Tensor]:
        return self.sum_scale.sum(0), self.sum_dga.sum(0)

    def _kept(self) -> Tensor:
        assert self.z is not None
        self.z = channels_last(self.z)
        return self.z

    def _norm(self) -> tuple[Tensor, ...]:
        return self.mean, self.r, self.scale, self.shift

    @staticmethod
    def _statistics(z: Tensor) -> tuple[Tensor, Tensor]:
        """Uninitialised memory for two numbers for each channel of each image."""
        return z.new_empty(z.shape[:2]), z.new_empty(z.shape[:2])

    @staticmethod
    def _pooled(z: Tensor) -> Tensor:
        batch, height, width, channels = _shape(z)
        return z.new_empty(batch, height // 2, width // 2, channels).permute(0, 3, 1, 2)


def _shape(z: Tensor) -> tuple[int, int, int, int]:
    batch, channels, height, width = z.shape
    return batch, height, width, channels
