"""Derivatives of the instance-norm ConvNet, written by hand: each block in four forms.

Let l(theta, x) be a scalar, (theta', x') a direction, and let a prime denote the derivative along it. One pass computes

    l' = <grad l, (theta', x')>      grad_theta l'  (a Hessian-vector product)      grad_x l'

This is everything that one step of the unrolled gradient needs (`dstill.unrolling.adjoint`: H v, the image term and the
step-size term). With a direction in the *input*, it gives the exact gradient of the expert's gradient penalty.

Why by hand: torch's double backward also forms the gradient with respect to the primal weights, keeps a graph, and computes
with the convolution bias, whose effect the instance norm removes exactly. A block is a `Convolution` followed by a `Unit`.
Both are implemented in plain tensor operations for any device and type, and in native kernels for CPUs; the unit also has
kernels for NVIDIA cards (`dstill.derivatives.build`).

The computation has two passes, and the first may run long before the second. `cross_entropy_gradient` is the first-order
pass: forward and backward. It leaves one `Unit` for each block, which holds what is expensive to recompute: the output z of
the convolution and the gradient with respect to the block's output. `cross_entropy_tangents` and `penalty_tangents` are the
second-order pass: the tangents of forward and backward, computed from these units.

Shapes: images are `[B, C, H, W]`. `parameters` is the list of `ConvNet.parameters()`: for each block the convolution weight
`[O, I, 3, 3]`, the convolution bias `[O]`, the norm's scale `[O]` and shift `[O]`, and at the end the weight and the bias of
the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dstill.derivatives.convolution import Convolution, Operand
from dstill.derivatives.unit import Unit


class UnitMaker(Protocol):
    """Makes a `Unit` from the norm's scale and shift."""

    def __call__(self, scale: Tensor, shift: Tensor, /) -> Unit: ...


@dataclass(frozen=True)
class Operations:
    """The operations that compute the blocks of one network geometry.

    Attributes:
        unit: makes the `Unit` of a block.
        first: the convolution of each block in the first-order pass. The ReLU masks follow from its results.
        second: the convolution of each block in the second-order pass: the same objects, or cheaper ones in another precision.
    """

    unit: UnitMaker
    first: Sequence[Convolution]
    second: Sequence[Convolution]

    def weights(self, parameters: Sequence[Tensor], *, first: bool = True, second: bool = True) -> Weights:
        """Prepares parameters, or a direction in parameter space, for the passes.

        Args:
            parameters: a tensor for each parameter of the network.
            first: transform the filters for the first-order pass.
            second: transform the filters for the second-order pass.
        """
        filters = parameters[:-2:4]
        if self.second is self.first:
            both = [conv.weight(w) for conv, w in zip(self.first, filters, strict=True)]
            return Weights(parameters, both, both)
        return Weights(
            parameters,
            [conv.weight(w) for conv, w in zip(self.first, filters, strict=True)] if first else [],
            [conv.weight(w) for conv, w in zip(self.second, filters, strict=True)] if second else [],
        )


class Weights(NamedTuple):
    """Parameters as they are in memory, and their filters in the domains of both passes: see `Operations.weights`."""

    parameters: Sequence[Tensor]
    first: Sequence[Operand]
    second: Sequence[Operand]

    @property
    def classifier(self) -> tuple[Tensor, Tensor]:
        return self.parameters[-2], self.parameters[-1]

    def affine(self, block: int) -> tuple[Tensor, Tensor]:
        """Scale and shift of a block."""
        return self.parameters[4 * block + 2], self.parameters[4 * block + 3]


class Sum(NamedTuple):
    """The gradient of some images with respect to the parameters, with its filters still in the convolutions' domain.

    Gradients of several pieces are added there and transformed back once.
    """

    filters: list[Operand]
    affine: list[tuple[Tensor, Tensor]]
    classifier: tuple[Tensor, Tensor]

    def add_(self, other: Sum) -> None:
        """Adds in place."""
        for mine, theirs in zip(self._all(), other._all(), strict=True):
            mine.add_(theirs)

    def _all(self) -> list[Tensor]:
        return [*self.filters, *(t for pair in self.affine for t in pair), *self.classifier]

    def parameters(self, convolutions: Sequence[Convolution]) -> list[Tensor]:
        """In the order of `ConvNet.parameters()`. Biases before an instance norm have none: zero."""
        result: list[Tensor] = []
        for conv, filters, (scale, shift) in zip(convolutions, self.filters, self.affine, strict=True):
            result += [conv.weight_adjoint(filters), torch.zeros_like(shift), scale, shift]
        return [*result, *self.classifier]


class FirstOrder(NamedTuple):
    """The loss of some images, its gradient, the units that the second-order pass starts from, and the logits."""

    loss: Tensor
    gradient: Sum | None
    units: list[Unit]
    logits: Tensor


class SecondOrder(NamedTuple):
    """Derivatives along a direction: of the loss, and of its gradients with respect to parameters, images and label logits."""

    loss: Tensor
    gradient: Sum
    images: Tensor
    labels: Tensor


def _forward(operations: Operations, point: Weights, images: Tensor) -> tuple[list[Unit], list[Operand], Tensor]:
    """The unit and the transformed input of each block, and the features `[B, O, H, W]`."""
    units: list[Unit] = []
    inputs: list[Operand] = []
    y = images
    for i, (conv, weight) in enumerate(zip(operations.first, point.first, strict=True)):
        inputs.append(conv.input(y))
        units.append(operations.unit(*point.affine(i)))
        y = units[-1].forward(conv.forward((inputs[-1], weight)))
    return units, inputs, y


def features(operations: Operations, point: Weights, images: Tensor) -> Tensor:
    """The inputs of the classifier, `[B, F]`, for images `[B, C, H, W]`."""
    return _forward(operations, point, images)[2].flatten(1)


def logits(operations: Operations, point: Weights, images: Tensor) -> Tensor:
    """Logits `[B, K]` of images `[B, C, H, W]`."""
    return F.linear(features(operations, point, images), *point.classifier)


def cross_entropy_gradient(
    operations: Operations, point: Weights, images: Tensor, targets: Tensor, count: int, *, weights: bool = True
) -> FirstOrder:
    """Cross-entropy of some images, and its gradient.

    Args:
        operations: the operations to compute with.
        point: the parameters.
        images: `[B, C, H, W]`.
        targets: target probabilities `[B, K]`.
        count: the sum over the images is divided by this number.
        weights: False to leave out the gradient and compute the units alone.
    """
    units, inputs, features = _forward(operations, point, images)
    flat = features.flatten(1)
    outputs = F.linear(flat, *point.classifier)
    log_probabilities = F.log_softmax(outputs, 1)
    loss = -(targets * log_probabilities).sum() / count
    gf = (log_probabilities.exp() - targets) / count
    gy = (gf @ point.classifier[0]).view_as(features)
    filters, _ = _backward(operations, point, units, inputs if weights else None, gy)
    if not weights:
        return FirstOrder(loss, None, units, outputs)
    gradient = Sum(filters, [u.gradients() for u in units], (gf.t() @ flat, gf.sum(0)))
    return FirstOrder(loss, gradient, units, outputs)


def _backward(
    operations: Operations,
    point: Weights,
    units: list[Unit],
    inputs: list[Operand] | None,
    gy: Tensor,
    *,
    by_images: bool = False,
) -> tuple[list[Operand], Tensor | None]:
    """Runs `Unit.backward` from the last block to the first.

    Returns:
        Gradients with respect to the filters, if `inputs` are given; the gradient with respect to the images, if `by_images`.
    """
    filters: list[Operand] = []
    for i in reversed(range(len(units))):
        conv, gz = operations.first[i], units[i].backward(gy)
        if inputs is None and i == 0 and not by_images:
            break
        operand = conv.output(gz)
        if inputs is not None:
            filters.insert(0, conv.by_weight((operand, inputs[i])))
        if i or by_images:
            gy = conv.by_input((operand, point.first[i]))
    return filters, gy if by_images else None


def _tangent(
    operations: Operations,
    point: Weights,
    direction: Weights | None,
    units: list[Unit],
    images: Tensor,
    dimages: Tensor | None,
    known: list[Operand] | None = None,
) -> tuple[list[Operand], list[Operand | None], Tensor, Tensor]:
    """Runs `Unit.tangent` from the first block to the last.

    `known` are the transformed inputs of the first-order pass, where they have been kept.

    Returns:
        The transformed inputs of the convolutions, the tangents of these, the features, and the tangent of the features.
    """
    inputs: list[Operand] = []
    reused = known if operations.second is operations.first else None
    dinputs: list[Operand | None] = []
    y, dy = images, dimages
    for i, (unit, conv) in enumerate(zip(units, operations.second, strict=True)):
        if unit.z is None:
            unit.z = operations.first[i].forward((operations.first[i].input(y), point.first[i]))
        inputs.append(conv.input(y) if reused is None else reused[i])
        dinputs.append(None if dy is None else conv.input(dy))
        pairs = [] if dinputs[i] is None else [(dinputs[i], point.second[i])]
        pairs += [] if direction is None else [(inputs[i], direction.second[i])]
        dscale, dshift = (None, None) if direction is None else direction.affine(i)
        y, dy = unit.tangent(conv.forward(*pairs), dscale, dshift)
    assert dy is not None
    return inputs, dinputs, y, dy


def _tangent_backward(
    operations: Operations,
    point: Weights,
    direction: Weights | None,
    units: list[Unit],
    inputs: list[Operand],
    dinputs: list[Operand | None],
    dgy: Tensor,
    *,
    by_images: bool,
) -> tuple[list[Operand], Tensor]:
    """Runs `Unit.tangent_backward` from the last block to the first.

    Returns:
        Tangents of the gradients with respect to the filters and, if `by_images`, with respect to the images.
    """
    filters: list[Operand] = []
    for i in reversed(range(len(units))):
        conv = operations.second[i]
        gz, dgz = (conv.output(g) for g in units[i].tangent_backward(dgy))
        dx = dinputs[i]
        filters.insert(0, conv.by_weight((dgz, inputs[i]), *([] if dx is None else [(gz, dx)])))
        if i or by_images:
            pairs = [] if direction is None else [(gz, direction.second[i])]
            dgy = conv.by_input((dgz, point.second[i]), *pairs)
    return filters, dgy


def cross_entropy_tangents(
    operations: Operations,
    point: Weights,
    direction: Weights,
    images: Tensor,
    targets: Tensor,
    count: int,
    units: list[Unit] | None = None,
) -> SecondOrder:
    """Derivatives of `cross_entropy_gradient` along a direction in the parameters.

    Args:
        operations: the operations to compute with.
        point: the parameters.
        direction: the direction v.
        images: `[B, C, H, W]`.
        targets: target probabilities q `[B, K]`; each row sums to one.
        count: the sum over the images is divided by this number.
        units: the units of the first-order pass at this point and these images; recomputed if left out. They can be used only
            once.

    Returns:
        <grad, v>; H v; d<grad, v>/d images; d<grad, v>/d label logits, where q = softmax(label logits).
    """
    if units is None:
        units = cross_entropy_gradient(operations, point, images, targets, count, weights=False).units
    inputs, dinputs, y, dy = _tangent(operations, point, direction, units, images, None)
    flat, dflat = y.flatten(1), dy.flatten(1)
    (weight, _), (dweight, dbias) = point.classifier, direction.classifier
    probabilities = F.softmax(F.linear(flat, *point.classifier), 1)
    gf = (probabilities - targets) / count
    df = F.linear(dflat, weight) + F.linear(flat, dweight, dbias)
    dloss = (gf * df).sum()
    dgf = probabilities * (df - (probabilities * df).sum(1, keepdim=True)) / count
    dlabels = -targets * (df - (targets * df).sum(1, keepdim=True)) / count
    dgy = (dgf @ weight + gf @ dweight).view_as(y)
    filters, dimages = _tangent_backward(operations, point, direction, units, inputs, dinputs, dgy, by_images=True)
    classifier = (dgf.t() @ flat + gf.t() @ dflat, dgf.sum(0))
    return SecondOrder(dloss, Sum(filters, [u.tangent_gradients() for u in units], classifier), dimages, dlabels)


def penalty_tangents(
    operations: Operations, point: Weights, images: Tensor, pixelwise: bool, target: float, count: int
) -> tuple[Tensor, Sum]:
    """The two-sided gradient penalty (|grad_x W(x)| - target)^2 and its exact gradient (Eq. 19); W is the sum of the logits.

    Let J = grad_x W, and hold u = 2 (|J| - target) / |J| J constant. The gradient of the penalty is then the gradient, with
    respect to theta, of the derivative of W along u in the input: one tangent pass.

    Args:
        operations: the operations to compute with.
        point: the parameters.
        images: `[B, C, H, W]`, not augmented.
        pixelwise: take the norm over the colour channels at each pixel, and the mean over pixels (released code), instead of
            the norm over the whole image (paper).
        target: the paper's K.
        count: the sum over the images is divided by this number.

    Returns:
        The penalty and its gradient with respect to the parameters.
    """
    units, known, features = _forward(operations, point, images)
    weight = point.classifier[0]
    gy = weight.sum(0).expand(len(images), -1).contiguous().view_as(features)
    _, jacobian = _backward(operations, point, units, None, gy, by_images=True)
    assert jacobian is not None
    axes, share = ((1,), images[0, 0].numel()) if pixelwise else ((1, 2, 3), 1)
    norm = jacobian.square().sum(axes, keepdim=True).sqrt()
    penalty = (norm - target).square().sum() / (count * share)
    direction = 2 * (norm - target) / norm.clamp_min(1e-12) * jacobian / (count * share)

    inputs, dinputs, _, dy = _tangent(operations, point, None, units, images, direction, known)
    # The cotangent does not depend on x, so the tangent of every gradient above the top block is zero.
    filters, _ = _tangent_backward(operations, point, None, units, inputs, dinputs, torch.zeros_like(dy), by_images=False)
    by_weight = dy.flatten(1).sum(0).expand_as(weight).clone()
    classifier = (by_weight, torch.zeros_like(point.classifier[1]))
    return penalty, Sum(filters, [u.tangent_gradients() for u in units], classifier)
