"""The 3x3 convolution as a bilinear map: its three products, each a sum over pairs of operands."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# An image, a weight or an output gradient, transformed into the domain in which the products are computed.
Operand = Any
Pair = tuple[Operand, Operand]

_THIN = 8  # with fewer input channels, by_input on a CPU is one matrix product and nine shifted sums


class Convolution(Protocol):
    """z = W * x with padding 1, and its two transposes.

    Each operand is transformed once and then used in several products. Sums of products, such as W * x' + W' * x, are formed
    before the result is transformed back.
    """

    def weight(self, weight: Tensor) -> Operand:
        """Transforms a weight `[O, I, 3, 3]`."""
        ...

    def weight_adjoint(self, total: Operand) -> Tensor:
        """Transforms a sum of results of `by_weight` back into a gradient `[O, I, 3, 3]`."""
        ...

    def input(self, x: Tensor) -> Operand:
        """Transforms images `[B, I, H, W]`."""
        ...

    def output(self, g: Tensor) -> Operand:
        """Transforms a gradient with respect to the output, `[B, O, H, W]`."""
        ...

    def forward(self, *pairs: Pair) -> Tensor:
        """The sum of W * x over pairs (x, W): `[B, O, H, W]`."""
        ...

    def by_input(self, *pairs: Pair) -> Tensor:
        """The gradient with respect to the input, summed over pairs (g, W): `[B, I, H, W]`."""
        ...

    def by_weight(self, *pairs: Pair) -> Operand:
        """The gradient with respect to the weight, summed over pairs (g, x), in the domain: see `weight_adjoint`."""
        ...


class Direct:
    """`Convolution` by torch's own operations, on any device.

    Args:
        result: type of the tensors that are passed in and returned.
        product: type in which the products are computed, for example bfloat16; `result` if left out.
    """

    def __init__(self, result: torch.dtype, product: torch.dtype | None = None) -> None:
        self.result, self.product = result, product or result

    def _cast(self, tensor: Tensor) -> Tensor:
        # Matrix units compute these products, and they are fastest on channels-last memory.
        return tensor if self.product == self.result else tensor.to(self.product, memory_format=torch.channels_last)

    def weight(self, weight: Tensor) -> Operand:
        return self._cast(weight)

    def weight_adjoint(self, total: Operand) -> Tensor:
        return total

    def input(self, x: Tensor) -> Operand:
        return self._cast(x)

    def output(self, g: Tensor) -> Operand:
        return self._cast(g)

    def forward(self, *pairs: Pair) -> Tensor:
        return self._sum([F.conv2d(x, w, padding=1) for x, w in pairs])

    def by_input(self, *pairs: Pair) -> Tensor:
        return self._sum([_by_input(g, w) for g, w in pairs])

    def by_weight(self, *pairs: Pair) -> Operand:
        shape = (pairs[0][0].shape[1], pairs[0][1].shape[1], 3, 3)
        return self._sum([_backward(g, x, x.new_empty(()).expand(shape), 1) for g, x in pairs])

    def _sum(self, terms: list[Tensor]) -> Tensor:
        total = terms[0].to(self.result)
        for term in terms[1:]:
            total = total + term
        return total


def rows(x: Tensor) -> Tensor:
    """`[B, C, H, W]` as a contiguous `[B, H, W, C]`; not copied if it is channels-last already."""
    return x.permute(0, 2, 3, 1).contiguous()


def channels_last(x: Tensor) -> Tensor:
    """The tensor with its memory in the order [image, row, column, channel].

    `torch.channels_last` would be ambiguous where the number of channels or a side is 1.
    """
    return rows(x).permute(0, 3, 1, 2)


def _backward(g: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    gradients = torch.ops.aten.convolution_backward(g, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask)
    return gradients[which]


def _by_input(g: Tensor, weight: Tensor) -> Tensor:
    batch, outputs, height, width = g.shape
    inputs = weight.shape[1]
    if g.device.type != "cpu" or inputs >= _THIN:
        return _backward(g, g.new_empty(()).expand(batch, inputs, height, width), weight, 0)
    rows = g.permute(0, 2, 3, 1).reshape(-1, outputs)
    patches = (rows @ weight.permute(0, 2, 3, 1).reshape(outputs, -1)).view(batch, height, width, 3, 3, inputs)
    padded = patches.new_zeros(batch, height + 2, width + 2, inputs)
    for i in range(3):
        for j in range(3):
            padded[:, i : i + height, j : j + width] += patches[:, :, :, i, j]
    return padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2)
