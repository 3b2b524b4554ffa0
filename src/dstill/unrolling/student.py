"""The student: a network as pure functions of one flat parameter vector, and one step of its inner loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dstill.derivatives import engine
from dstill.derivatives.cuda_graphs import Caller, Recorder, directly
from dstill.derivatives.engine import Precision
from dstill.errors import DstillError
from dstill.support.devices import full_precision
from dstill.training.fit import cross_entropy, probabilities

_Result = TypeVar("_Result")


class StepTangents(NamedTuple):
    """Derivatives at one step, for h = <grad_θ loss, v>.

    Attributes:
        h: h itself.
        theta: the gradient of h with respect to θ, `[P]`.
        images: the gradient of h with respect to the images, `[B, C, H, W]`.
        labels: the gradient of h with respect to label logits, `[B, K]`; None for class ids.
    """

    h: Tensor
    theta: Tensor
    images: Tensor
    labels: Tensor | None


class Student:
    """A network as pure functions of a flat parameter vector θ `[P]`.

    Args:
        net: the network; its own weights are neither read nor changed. An instance-norm ConvNet is differentiated by the
            hand-written derivatives of `dstill.derivatives.engine`, any other module by torch's double backward.
        precision: precision of the convolutions, see `dstill.derivatives.engine.Derivatives`. Networks without hand-written
            derivatives support `float32` alone.
        compiled: compile the hand-written derivatives with `torch.compile` where native kernels do not run.
        native: False to use tensor operations even where native kernels could run.
        replayed: False to launch kernels one by one even on an NVIDIA card, see `dstill.derivatives.cuda_graphs`.

    Raises:
        DstillError: the network has running statistics, which would be state outside θ, or dropout, which would make it
            impossible to recompute a step; or the network does not support `precision`.

    Example:
        >>> from dstill.nets.convnet import ConvNet
        >>> student = Student(ConvNet(1, 2, (4, 4), width=2, depth=1))
        >>> theta = torch.zeros(student.numel)
        >>> loss, gradient, _ = student.gradient(theta, torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0]))
        >>> round(loss.item(), 3), gradient.shape == theta.shape
        (0.693, True)
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        precision: Precision = "float32",
        compiled: bool = False,
        native: bool = True,
        replayed: bool = True,
    ) -> None:
        for name, module in net.named_modules():
            if getattr(module, "running_mean", None) is not None:
                raise DstillError(
                    f"the student's layer {name!r} ({type(module).__name__}) has running statistics, which a flat parameter "
                    "vector cannot hold: use instance or group norm, or track_running_stats=False"
                )
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise DstillError(f"the student's layer {name!r} drops units at random: build the network with p=0")
        self.written = engine.supports(net)
        if precision != "float32" and not self.written:
            raise DstillError(
                f"precision {precision!r} is for ConvNets with instance norm; use float32 for {type(net).__name__}"
            )
        self.net = net.train()
        named = list(net.named_parameters())
        self.names = [name for name, _ in named]
        self.shapes = [parameter.shape for _, parameter in named]
        self.sizes = [parameter.numel() for _, parameter in named]
        self.numel = sum(self.sizes)
        self.precision: Precision = precision
        self.compiled, self.native = compiled, native
        self._call: Caller = Recorder() if replayed else directly
        self._derivatives: dict[tuple[torch.device, torch.dtype], engine.Derivatives] = {}

    def side_by_side(self, works: Sequence[Callable[[], _Result]]) -> list[_Result]:
        """`[work() for work in works]`, whose steps of this student an NVIDIA card takes side by side.

        The works must not depend on each other. Steps by the hand-written derivatives become branches of one recorded graph,
        see `dstill.derivatives.cuda_graphs.Recorder.side_by_side`. On a CPU the numbers are the same to the last bit.
        """
        return self._call.side_by_side(works) if isinstance(self._call, Recorder) else [work() for work in works]

    def derivatives(self, like: Tensor) -> engine.Derivatives | None:
        """The hand-written derivatives for the device and type of `like`; None if the network has none."""
        key = (like.device, like.dtype)
        if self.written and key not in self._derivatives:
            # They record nothing: `_call` records the whole step, with the splitting and joining of θ.
            self._derivatives[key] = engine.Derivatives(
                self.net, *key, self.precision, compiled=self.compiled, native=self.native
            )
        return self._derivatives.get(key)

    def split(self, theta: Tensor) -> list[Tensor]:
        """Views of θ in the shapes of the network's parameters, in the order of `net.parameters()`."""
        return [part.view(shape) for part, shape in zip(theta.split(self.sizes), self.shapes, strict=True)]

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Logits `[B, K]` of preprocessed images `[B, C, H, W]` under the weights θ; differentiable in both."""
        return functional_call(self.net, dict(zip(self.names, self.split(theta), strict=True)), (images,))

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy under the weights θ, with class ids `[B]` or label logits `[B, K]`; differentiable."""
        return cross_entropy(self.logits(theta, images), labels)

    def kept_bytes(self, like: Tensor, images: int) -> int | None:
        """Approximate bytes that `gradient(keep=True)` keeps for a batch of `images` images; None if nothing can be kept."""
        written = self.derivatives(like)
        return None if written is None else written.kept_bytes(images)

    def gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, *, keep: bool = False
    ) -> tuple[Tensor, Tensor, engine.Kept | None]:
        """The loss and its gradient at θ, detached.

        Args:
            theta: parameters `[P]`.
            images: `[B, C, H, W]`, preprocessed.
            labels: class ids `[B]` or label logits `[B, K]`.
            keep: also return what `tangents` would otherwise recompute.

        Returns:
            The loss, its gradient `[P]`, and what was kept; None if nothing was asked for or can be kept.
        """
        written = self.derivatives(theta)
        if written is None:
            return *self._autograd_gradient(theta.detach(), images.detach(), labels), None
        return self._call(self._written_gradient, theta, images, labels, keep)

    def tangents(
        self, theta: Tensor, v: Tensor, images: Tensor, labels: Tensor, kept: engine.Kept | None = None
    ) -> StepTangents:
        """Derivatives of h = <grad_θ loss, v>, detached.

        Args:
            theta: parameters `[P]`.
            v: direction `[P]`.
            images: `[B, C, H, W]`, preprocessed.
            labels: class ids `[B]` or label logits `[B, K]`.
            kept: what `gradient` kept for the same θ, images and labels. It can be used only once. It is recomputed if left
                out; the numbers are the same.
        """
        written = self.derivatives(theta)
        if written is None:
            return self._autograd_tangents(theta.detach(), v.detach(), images.detach(), labels.detach())
        return self._call(self._written_tangents, theta, v, images, labels, kept)

    @torch.no_grad()
    def _written_gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, engine.Kept | None]:
        written = self.derivatives(theta)
        assert written is not None
        loss, gradients, kept, _ = written.gradient(self.split(theta), images, self._targets(labels, theta), keep=keep)
        return loss, _flat(gradients), kept

    @torch.no_grad()
    def _written_tangents(
        self, theta: Tensor, v: Tensor, images: Tensor, labels: Tensor, kept: engine.Kept | None
    ) -> StepTangents:
        written = self.derivatives(theta)
        assert written is not None
        t = written.tangents(self.split(theta), self.split(v), images, self._targets(labels, theta), kept)
        return StepTangents(t.loss, _flat(t.parameters), t.images, t.labels if labels.is_floating_point() else None)

    def _targets(self, labels: Tensor, like: Tensor) -> Tensor:
        return probabilities(labels.detach(), self.shapes[-1][0]).to(like.dtype)

    @full_precision()
    def _autograd_gradient(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            theta = theta.requires_grad_()
            loss = self.loss(theta, images, labels)
            (gradient,) = torch.autograd.grad(loss, theta)
        return loss.detach(), gradient

    @full_precision()
    def _autograd_tangents(self, theta: Tensor, v: Tensor, images: Tensor, labels: Tensor) -> StepTangents:
        with torch.enable_grad():
            inputs = [theta.requires_grad_(), images.requires_grad_()]
            if labels.is_floating_point():
                inputs.append(labels.requires_grad_())
            (gradient,) = torch.autograd.grad(self.loss(theta, images, labels), theta, create_graph=True)
            h = gradient @ v
            terms = torch.autograd.grad(h, inputs)
        return StepTangents(h.detach(), terms[0], terms[1], terms[2] if len(terms) == 3 else None)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
