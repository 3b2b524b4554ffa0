"""The student: a network as pure functions of one flat parameter vector, and one step of its inner loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dstill.errors import DstillError
from dstill.nets import tangent
from dstill.training import cross_entropy


class StepTangents(NamedTuple):
    """Derivatives of h = <grad_θ loss, v> at one step: h itself, and its gradients by θ `[P]`, images, and label logits."""

    h: Tensor
    theta: Tensor
    images: Tensor
    labels: Tensor | None


class Student:
    """Pure functions of a flat parameter vector θ `[P]` around one network.

    Args:
        net: the network; its own weights are never read or changed. Instance-norm ConvNets take hand-written derivatives
            when `compiled`, any other module double backward.
        compiled: `torch.compile` the hand-written derivatives; ignored where the network has none.

    Raises:
        DstillError: the network has running statistics or dropout: the first would be state outside θ, the second would
            make a step impossible to recompute.
    """

    def __init__(self, net: nn.Module, *, compiled: bool = False) -> None:
        for name, module in net.named_modules():
            if getattr(module, "running_mean", None) is not None:
                raise DstillError(
                    f"the student's layer {name!r} ({type(module).__name__}) has running statistics, which a flat parameter "
                    "vector cannot carry: use instance or group norm, or track_running_stats=False"
                )
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise DstillError(f"the student's layer {name!r} drops units at random: build the network with p=0")
        self.net = net.train()
        named = list(net.named_parameters())
        self.names = [name for name, _ in named]
        self.shapes = [parameter.shape for _, parameter in named]
        self.sizes = [parameter.numel() for _, parameter in named]
        self.numel = sum(self.sizes)
        self._written = compiled and tangent.supports(net)
        self._gradient = _compiled(self._written_gradient) if self._written else self._autograd_gradient
        self._tangents = _compiled(self._written_tangents) if self._written else self._autograd_tangents

    def split(self, theta: Tensor) -> list[Tensor]:
        """Views of θ in the shapes of the network's parameters."""
        return [part.view(shape) for part, shape in zip(theta.split(self.sizes), self.shapes, strict=True)]

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Logits `[B, K]` of preprocessed images under the weights θ; differentiable in both."""
        return functional_call(self.net, dict(zip(self.names, self.split(theta), strict=True)), (images,))

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy with class ids `[B]` or label logits `[B, K]`."""
        return cross_entropy(self.logits(theta, images), labels)

    def gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and its gradient by θ `[P]`, both detached."""
        return self._gradient(theta.detach(), images.detach(), labels.detach())

    def tangents(self, theta: Tensor, v: Tensor, images: Tensor, labels: Tensor) -> StepTangents:
        """Derivatives of h = <grad_θ loss, v>; the label term is None for class ids."""
        t = StepTangents(*self._tangents(theta.detach(), v.detach(), images.detach(), labels.detach()))
        return t if labels.is_floating_point() else t._replace(labels=None)

    def _autograd_gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            theta = theta.requires_grad_()
            loss = self.loss(theta, images, labels)
            (gradient,) = torch.autograd.grad(loss, theta)
        return loss.detach(), gradient

    def _autograd_tangents(self, theta: Tensor, v: Tensor, images: Tensor, labels: Tensor) -> tuple[Any, ...]:
        with torch.enable_grad():
            inputs = [theta.requires_grad_(), images.requires_grad_()]
            if labels.is_floating_point():
                inputs.append(labels.requires_grad_())
            (gradient,) = torch.autograd.grad(self.loss(theta, images, labels), theta, create_graph=True)
            h = gradient @ v
            terms = torch.autograd.grad(h, inputs)
        return (h.detach(), *terms) if len(terms) == 3 else (h.detach(), *terms, None)

    def _written_gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            loss, gradients = tangent.cross_entropy_gradient(
                self.split(theta), images, self._probabilities(labels, theta.dtype)
            )
            return loss, _flat(gradients)

    def _written_tangents(self, theta: Tensor, v: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            probabilities = self._probabilities(labels, theta.dtype)
            t = tangent.cross_entropy_tangents(self.split(theta), self.split(v), images, probabilities)
            return t.loss, _flat(t.parameters), t.images, t.labels

    def _probabilities(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        return labels.softmax(1) if labels.is_floating_point() else F.one_hot(labels, self.shapes[-1][0]).to(dtype)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    fast = torch.compile(function, dynamic=False)

    def call(*arguments: Tensor) -> Any:
        # The convolutions want channels-last images; parameters are views of one vector and stay as they are.
        return fast(*(a.contiguous(memory_format=torch.channels_last) if a.ndim == 4 else a for a in arguments))

    return call


def sgd_step(parameter: Tensor, buffer: Tensor, gradient: Tensor, lr: Tensor | float, momentum: float) -> tuple[Tensor, Tensor]:
    """b' = momentum b + g, θ' = θ - lr b': `torch.optim.SGD` as a pure function, starting from b = 0."""
    buffer = momentum * buffer + gradient
    return parameter - lr * buffer, buffer
