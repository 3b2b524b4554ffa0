"""Derivatives of the instance-norm ConvNet written by hand: each block in four forms.

With the scalar l(theta, x), a direction (theta', x') and a prime for d/d(epsilon) along it, one pass gives

    l' = <grad l, (theta', x')>      grad_theta l'  (a Hessian-vector product)      grad_x l'

which is everything that one step of the unrolled gradient needs (`dstill.unroll.adjoint`: H v, the image term and the
step-size term), and, with a direction in the *input*, the exact gradient of the expert's gradient penalty.

Why by hand: library double backward also forms the gradient by the primal weights, keeps a graph, and treats the
convolution bias, whose effect an instance norm removes exactly. Plain tensor operations only: they run on any device,
in any dtype, and `torch.compile` fuses everything between two convolutions.

Shapes: images `[B, C, H, W]`; `parameters` is the list of `ConvNet.parameters()`, which is, for each block,
convolution weight `[O, I, 3, 3]`, convolution bias `[O]`, norm scale `[O]`, norm shift `[O]`, and at the end the
classifier's weight and bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dstill.nets.convnet import ConvNet

_EPSILON = 1e-5  # torch's default in GroupNorm


def supports(net: nn.Module) -> bool:
    """Whether `net` has hand-written derivatives: exactly a ConvNet with instance norm."""
    return type(net) is ConvNet and net.norm == "instance"


def _conv(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def _conv_backward(grad: Tensor, x: Tensor, weight: Tensor, by_input: bool, by_weight: bool) -> tuple[Tensor, Tensor]:
    gx, gw, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [by_input, by_weight, False]
    )
    return gx, gw


def _by_input(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _conv_backward(grad, x, weight, True, False)[0]


def _by_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _conv_backward(grad, x, weight, False, True)[1]


def _unpool(y: Tensor, size: torch.Size) -> Tensor:
    """Transpose of 2x2 average pooling: every input pixel receives a quarter of its output pixel."""
    x = F.interpolate(y, scale_factor=2.0, mode="nearest") * 0.25
    bottom, right = size[2] - x.shape[2], size[3] - x.shape[3]
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def _channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


@dataclass
class Block:
    """Convolution W, instance norm (scale g, shift b), ReLU, 2x2 average pooling.

        z = W * x      n = (z - mean z) r,  r = 1 / sqrt(var z + eps)      a = g n + b      y = pool(relu(a))

    The four forms keep in the object what the next form reads.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        z = _conv(x, self.weight)
        centred = z - _mean(z)
        self.r = torch.rsqrt(_mean(centred * centred) + _EPSILON)
        self.n = centred * self.r
        a = self.n * _channel(self.scale) + _channel(self.shift)
        self.mask = (a > 0).to(a.dtype)
        return F.avg_pool2d(a * self.mask, 2)

    def backward(self, gy: Tensor) -> Tensor:
        """Gradient by the convolution's output: gz = g r q,  q = ga - mean(ga) - n mean(ga n)."""
        self.ga = _unpool(gy, self.n.shape) * self.mask
        self.ga_n = _mean(self.ga * self.n)
        self.q = self.ga - _mean(self.ga) - self.n * self.ga_n
        self.gz = _channel(self.scale) * self.r * self.q
        return self.gz

    def gradients(self) -> list[Tensor]:
        """Gradients by weight, bias (exactly zero before an instance norm), scale and shift."""
        by_scale = (self.ga * self.n).sum((0, 2, 3))
        return [_by_weight(self.gz, self.x, self.weight), torch.zeros_like(by_scale), by_scale, self.ga.sum((0, 2, 3))]

    def tangent(self, dx: Tensor | None, dweight: Tensor | None, dscale: Tensor | None, dshift: Tensor | None) -> Tensor:
        """n' = r (z' - mean z' - n mean(n z')),  r' = -r^2 mean(n z'),  y' = pool(mask a')."""
        self.dx, self.dweight, self.dscale = dx, dweight, dscale
        if dx is None:
            assert dweight is not None
            dz = _conv(self.x, dweight)
        else:
            dz = _conv(dx, self.weight)
            if dweight is not None:
                dz = dz + _conv(self.x, dweight)
        projection = _mean(self.n * dz)
        self.dr = -self.r * self.r * projection
        self.dn = self.r * (dz - _mean(dz) - self.n * projection)
        da = self.dn * _channel(self.scale)
        if dscale is not None and dshift is not None:
            da = da + self.n * _channel(dscale) + _channel(dshift)
        return F.avg_pool2d(da * self.mask, 2)

    def tangent_backward(self, dgy: Tensor) -> Tensor:
        """Tangent of `backward`: gz' = g' r q + g r' q + g r q'."""
        self.dga = _unpool(dgy, self.n.shape) * self.mask
        mixed = _mean(self.dga * self.n) + _mean(self.ga * self.dn)
        dq = self.dga - _mean(self.dga) - self.dn * self.ga_n - self.n * mixed
        self.dgz = _channel(self.scale) * (self.dr * self.q + self.r * dq)
        if self.dscale is not None:
            self.dgz = self.dgz + _channel(self.dscale) * self.r * self.q
        return self.dgz

    def tangent_gradients(self) -> list[Tensor]:
        """Tangents of `gradients`."""
        by_weight = _by_weight(self.dgz, self.x, self.weight)
        if self.dx is not None:
            by_weight = by_weight + _by_weight(self.gz, self.dx, self.weight)
        by_scale = (self.dga * self.n + self.ga * self.dn).sum((0, 2, 3))
        return [by_weight, torch.zeros_like(by_scale), by_scale, self.dga.sum((0, 2, 3))]

    def by_input(self) -> Tensor:
        return _by_input(self.gz, self.x, self.weight)

    def tangent_by_input(self) -> Tensor:
        by_input = _by_input(self.dgz, self.x, self.weight)
        return by_input if self.dweight is None else by_input + _by_input(self.gz, self.x, self.dweight)


class Tangents(NamedTuple):
    """Derivatives along one direction: of the loss, and of its gradients by parameters, images and label logits."""

    loss: Tensor
    parameters: list[Tensor]
    images: Tensor
    labels: Tensor


def _blocks(parameters: Sequence[Tensor]) -> list[Block]:
    return [Block(parameters[i], parameters[i + 2], parameters[i + 3]) for i in range(0, len(parameters) - 2, 4)]


def _forward(blocks: list[Block], images: Tensor) -> Tensor:
    y = images
    for block in blocks:
        y = block.forward(y)
    return y


def _backward(blocks: list[Block], gy: Tensor) -> None:
    for i, block in reversed(list(enumerate(blocks))):
        block.backward(gy)
        if i:
            gy = block.by_input()


def _tangent_backward(blocks: list[Block], dgy: Tensor) -> Tensor:
    """Runs the last form from the top down; returns the tangent of the gradient by the images."""
    for block in reversed(blocks):
        block.tangent_backward(dgy)
        dgy = block.tangent_by_input()
    return dgy


def cross_entropy_gradient(parameters: Sequence[Tensor], images: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Mean cross-entropy with target probabilities `[B, K]`, and its gradients by every parameter."""
    blocks = _blocks(parameters)
    features = _forward(blocks, images)
    flat = features.flatten(1)
    log_probabilities = F.log_softmax(F.linear(flat, parameters[-2], parameters[-1]), 1)
    loss = -(targets * log_probabilities).sum(1).mean()
    gf = (log_probabilities.exp() - targets) / len(images)
    _backward(blocks, (gf @ parameters[-2]).view_as(features))
    gradients = [g for block in blocks for g in block.gradients()]
    return loss, [*gradients, gf.t() @ flat, gf.sum(0)]


def cross_entropy_tangents(
    parameters: Sequence[Tensor], direction: Sequence[Tensor], images: Tensor, targets: Tensor
) -> Tangents:
    """Derivatives of the mean cross-entropy and of its gradients along a direction in the parameters.

    Args:
        parameters: the point.
        direction: the direction v, one tensor a parameter.
        images: `[B, C, H, W]`.
        targets: target probabilities q `[B, K]`, rows summing to one.

    Returns:
        `Tangents`: <grad, v>; H v; d<grad, v>/d images; d<grad, v>/d label logits where q = softmax(label logits).
    """
    blocks = _blocks(parameters)
    weight, dweight = parameters[-2], direction[-2]
    features = _forward(blocks, images)
    flat = features.flatten(1)
    probabilities = F.softmax(F.linear(flat, weight, parameters[-1]), 1)
    gf = (probabilities - targets) / len(images)
    _backward(blocks, (gf @ weight).view_as(features))

    dy: Tensor | None = None
    for i, block in enumerate(blocks):
        dy = block.tangent(dy, direction[4 * i], direction[4 * i + 2], direction[4 * i + 3])
    assert dy is not None
    dflat = dy.flatten(1)
    df = F.linear(dflat, weight) + F.linear(flat, dweight, direction[-1])
    dloss = (gf * df).sum()
    dgf = probabilities * (df - (probabilities * df).sum(1, keepdim=True)) / len(images)
    dlabels = -targets * (df - (targets * df).sum(1, keepdim=True)) / len(images)

    dimages = _tangent_backward(blocks, (dgf @ weight + gf @ dweight).view_as(features))
    gradients = [g for block in blocks for g in block.tangent_gradients()]
    return Tangents(dloss, [*gradients, dgf.t() @ flat + gf.t() @ dflat, dgf.sum(0)], dimages, dlabels)


def input_gradient_tangents(
    parameters: Sequence[Tensor], images: Tensor, cotangent: Tensor, pixelwise: bool, target: float
) -> tuple[Tensor, list[Tensor]]:
    """Two-sided gradient penalty E[(|grad_x W(x)| - target)^2] and its exact gradient by the parameters (Eq. 19).

    W(x) = <cotangent, logits>. With J = grad_x W and u = 2 (|J| - target) / (|J| n) J held constant, the gradient of
    the penalty is the gradient by theta of the derivative of W along u in the input: one tangent pass.

    Args:
        parameters: the point.
        images: `[B, C, H, W]`, un-augmented.
        cotangent: `[K]`; ones for the sum of the logits.
        pixelwise: the norm over colour channels at each pixel (released code) instead of over the whole image (paper).
        target: K of the paper.
    """
    blocks = _blocks(parameters)
    weight = parameters[-2]
    features = _forward(blocks, images)
    gy = (cotangent @ weight).expand(len(images), -1).view_as(features)
    _backward(blocks, gy)
    jacobian = blocks[0].by_input()

    axes = (1,) if pixelwise else (1, 2, 3)
    norm = jacobian.square().sum(axes, keepdim=True).sqrt()
    penalty = (norm - target).square().mean()
    direction = 2 * (norm - target) / norm.clamp_min(1e-12) * jacobian / norm.numel()

    dy = direction
    for block in blocks:
        dy = block.tangent(dy, None, None, None)
    # The cotangent does not depend on x, so the tangent of every gradient above the top block is zero.
    top = torch.zeros_like(features)
    for i, block in reversed(list(enumerate(blocks))):
        block.tangent_backward(top)
        if i:
            top = block.tangent_by_input()
    gradients = [g for block in blocks for g in block.tangent_gradients()]
    by_weight = cotangent[:, None] * dy.flatten(1).sum(0)[None, :]
    return penalty, [*gradients, by_weight, torch.zeros_like(parameters[-1])]
