"""The student's optimisers as pairs of pure functions: a step, and its pullback.

A step maps θ, the optimiser's buffers and a gradient to new θ and buffers. Its pullback maps the derivatives of the outer loss
by the new θ and buffers to those by the old ones, by the gradient and by the learning rate. `torch.optim` changes its
parameters in place, so that nothing could be differentiated through it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dstill.derivatives.build import Kernels, kernels
from dstill.errors import DstillError

# What an optimiser carries from step to step, each `[P]`: no tensor, the momentum, or Adam's two moments.
Buffers = tuple[Tensor, ...]


class Stepped(NamedTuple):
    """The outcome of a step.

    Attributes:
        theta: θ after the step, `[P]`.
        buffers: the buffers after it.
        kept: what the pullback of this step needs besides θ.
    """

    theta: Tensor
    buffers: Buffers
    kept: tuple[Tensor, ...]


class Pulled(NamedTuple):
    """Derivatives of the outer loss by the inputs of a step, without those that run through the gradient.

    Attributes:
        gradient: by the gradient, `[P]`; the direction of the tangent pass.
        theta: by θ before the step, `[P]`.
        buffers: by the buffers before it.
        by_lr: maps <gradient, `Pulled.gradient`>, which the tangent pass gives, to the derivative by the learning rate.
    """

    gradient: Tensor
    theta: Tensor
    buffers: Buffers
    by_lr: Callable[[Tensor], Tensor]


class Optimiser(abc.ABC):
    """A step and its pullback. Both are pure functions."""

    @property
    @abc.abstractmethod
    def vectors(self) -> int:
        """Vectors of the size of θ that a differentiated step keeps, θ included."""

    @abc.abstractmethod
    def start(self, theta: Tensor) -> Buffers:
        """The buffers before the first step."""

    @abc.abstractmethod
    def step(self, theta: Tensor, buffers: Buffers, gradient: Tensor, lr: Tensor, number: int) -> Stepped:
        """One step; differentiable by autograd in every tensor.

        Args:
            theta: parameters `[P]`.
            buffers: as from `start` or the step before.
            gradient: the gradient of the loss at θ, `[P]`.
            lr: learning rate, a 0-d tensor.
            number: 1 for the first step.
        """

    @abc.abstractmethod
    def pullback(
        self, theta: Tensor, kept: tuple[Tensor, ...], lr: Tensor, number: int, by_theta: Tensor, by_buffers: Buffers
    ) -> Pulled:
        """The derivatives by the inputs of a step.

        Args:
            theta: parameters before the step, `[P]`.
            kept: what the step kept.
            lr: learning rate of the step.
            number: number of the step.
            by_theta: the derivative by θ after the step, `[P]`.
            by_buffers: the derivatives by the buffers after the step.
        """


@dataclass(frozen=True)
class Sgd(Optimiser):
    """`torch.optim.SGD`: b' = momentum b + g + weight_decay θ, θ' = θ - lr b'.

    Attributes:
        momentum: 0 for plain gradient descent, which has no buffer.
        weight_decay: L2 coefficient added to the gradient.

    Example:
        >>> theta, gradient = torch.tensor([1.0]), torch.tensor([2.0])
        >>> Sgd().step(theta, (), gradient, torch.tensor(0.25), 1).theta
        tensor([0.5000])
    """

    momentum: float = 0.0
    weight_decay: float = 0.0

    @property
    def vectors(self) -> int:
        return 2 if self.momentum else 1

    def start(self, theta: Tensor) -> Buffers:
        return (torch.zeros_like(theta),) if self.momentum else ()

    def step(self, theta: Tensor, buffers: Buffers, gradient: Tensor, lr: Tensor, number: int) -> Stepped:
        if self.weight_decay:
            gradient = gradient + self.weight_decay * theta
        if not self.momentum:
            return Stepped(theta - lr * gradient, (), ())
        theta, buffer = sgd_step(theta, buffers[0], gradient, lr, self.momentum)
        return Stepped(theta, (buffer,), (buffer,))

    def pullback(
        self, theta: Tensor, kept: tuple[Tensor, ...], lr: Tensor, number: int, by_theta: Tensor, by_buffers: Buffers
    ) -> Pulled:
        p = -lr * by_theta if not by_buffers else by_buffers[0] - lr * by_theta
        decayed = by_theta + self.weight_decay * p if self.weight_decay else by_theta

        def by_lr(h: Tensor) -> Tensor:
            if kept:
                return -(kept[0] @ by_theta)
            # Without momentum p = -lr ∂L/∂θ', so that <g, ∂L/∂θ'> follows from h = <g, p>, and no gradient need be kept.
            return (h + self.weight_decay * (theta @ p) if self.weight_decay else h) / lr

        return Pulled(p, decayed, (self.momentum * p,) if self.momentum else (), by_lr)


@dataclass(frozen=True)
class Adam(Optimiser):
    """`torch.optim.Adam`, or `torch.optim.AdamW` if the weight decay is decoupled.

        g~ = g + weight_decay θ      m' = β1 m + (1 - β1) g~      v' = β2 v + (1 - β2) g~²
        θ' = θ - lr m' / (c1 (r + ε)),   r = √(v' / c2),   c1 = 1 - β1^n,   c2 = 1 - β2^n

    Decoupled (Loshchilov and Hutter 2019), g~ = g, and θ is first multiplied by 1 - lr weight_decay.

    Attributes:
        betas: decay of the two moments.
        eps: ε.
        weight_decay: L2 coefficient, or the decoupled decay.
        decoupled: whether the decay is decoupled.

    Example:
        >>> theta, gradient = torch.tensor([1.0]), torch.tensor([2.0])
        >>> adam = Adam()
        >>> adam.step(theta, adam.start(theta), gradient, torch.tensor(0.25), 1).theta
        tensor([0.7500])
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    @property
    def vectors(self) -> int:
        return 4

    def start(self, theta: Tensor) -> Buffers:
        return torch.zeros_like(theta), torch.zeros_like(theta)

    def step(self, theta: Tensor, buffers: Buffers, gradient: Tensor, lr: Tensor, number: int) -> Stepped:
        beta1, beta2 = self.betas
        if self.weight_decay and not self.decoupled:
            gradient = gradient + self.weight_decay * theta
        if (kernels := _kernels(theta)) is not None:
            return self._fused_step(kernels, theta, buffers, gradient, float(lr), number)
        first = beta1 * buffers[0] + (1 - beta1) * gradient
        second = torch.addcmul(beta2 * buffers[1], gradient, gradient, value=1 - beta2)
        start = theta * (1 - lr * self.weight_decay) if self.weight_decay and self.decoupled else theta
        update = first / (_root(second / (1 - beta2**number)) + self.eps)
        return Stepped(start - lr / (1 - beta1**number) * update, (first, second), (gradient, first, second))

    def _fused_step(
        self, kernels: Kernels, theta: Tensor, buffers: Buffers, gradient: Tensor, lr: float, number: int
    ) -> Stepped:
        (beta1, beta2), outputs = self.betas, [torch.empty_like(theta) for _ in range(3)]
        decay = 1 - lr * self.weight_decay if self.decoupled else 1.0
        rate, c2 = lr / (1 - beta1**number), 1 - beta2**number
        numbers = (rate, decay, beta1, beta2, c2, self.eps, theta.numel())
        kernels.call("adam_step", theta, *buffers, gradient, *outputs, *numbers)
        stepped, first, second = outputs
        return Stepped(stepped, (first, second), (gradient, first, second))

    def pullback(
        self, theta: Tensor, kept: tuple[Tensor, ...], lr: Tensor, number: int, by_theta: Tensor, by_buffers: Buffers
    ) -> Pulled:
        p, by_first, by_second, update = self._pull(kept, lr, number, by_theta, by_buffers)
        by_lr, decayed = -(update @ by_theta), by_theta
        if self.weight_decay and self.decoupled:
            by_lr = by_lr - self.weight_decay * (theta @ by_theta)
            decayed = by_theta * (1 - lr * self.weight_decay)
        elif self.weight_decay:
            decayed = by_theta + self.weight_decay * p
        return Pulled(p, decayed, (by_first, by_second), lambda _: by_lr)

    def _pull(
        self, kept: tuple[Tensor, ...], lr: Tensor, number: int, by_theta: Tensor, by_buffers: Buffers
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The derivatives by the gradient and by the moments before the step; and m' / (c1 (r + ε)), the step for lr = 1."""
        (beta1, beta2), (gradient, first, second) = self.betas, kept
        c1, c2 = 1 - beta1**number, 1 - beta2**number
        if (kernels := _kernels(gradient)) is not None:
            p, by_first, by_second, update = (torch.empty_like(gradient) for _ in range(4))
            numbers = (float(lr), beta1, beta2, c1, c2, self.eps, gradient.numel())
            kernels.call("adam_pullback", *kept, by_theta, *by_buffers, p, by_first, by_second, update, *numbers)
            return p, by_first, by_second, update
        r = (second / c2).sqrt_()
        inverse = (r + self.eps).reciprocal_()
        update, scaled = first * inverse / c1, by_theta * inverse * lr
        by_first = by_buffers[0] - scaled / c1
        # Where r = 0 there has been no gradient yet, and the step does not depend on its square.
        by_second = by_buffers[1] + torch.where(r > 0, scaled * update / (2 * c2 * r), 0)
        p = (1 - beta1) * by_first + 2 * (1 - beta2) * gradient * by_second
        return p, beta1 * by_first, beta2 * by_second, update


def _kernels(like: Tensor) -> Kernels | None:
    """The native kernels where they can run: on contiguous vectors of a CPU that autograd does not follow."""
    suitable = like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64) and like.is_contiguous()
    return kernels() if suitable and not torch.is_grad_enabled() else None


def _root(x: Tensor) -> Tensor:
    """√x with derivative 0 at 0, where autograd's would be infinite."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), 0)


def optimiser(name: str, *, momentum: float = 0.0, weight_decay: float = 0.0) -> Optimiser:
    """An optimiser by its name.

    Args:
        name: `sgd`, `adam` or `adamw`.
        momentum: momentum of SGD; Adam has its own.
        weight_decay: weight decay.

    Raises:
        DstillError: the name is unknown.

    Example:
        >>> optimiser("adamw", weight_decay=0.1)
        Adam(betas=(0.9, 0.999), eps=1e-08, weight_decay=0.1, decoupled=True)
    """
    match name:
        case "sgd":
            return Sgd(momentum, weight_decay)
        case "adam" | "adamw":
            return Adam(weight_decay=weight_decay, decoupled=name == "adamw")
    raise DstillError(f"unknown optimiser {name!r}: take sgd, adam or adamw")


def sgd_step(parameter: Tensor, buffer: Tensor, gradient: Tensor, lr: Tensor | float, momentum: float) -> tuple[Tensor, Tensor]:
    """One step of `torch.optim.SGD` as a pure function: b' = momentum b + g, θ' = θ - lr b'.

    Args:
        parameter: θ.
        buffer: the momentum buffer b; zero before the first step.
        gradient: g.
        lr: learning rate.
        momentum: 0 for plain gradient descent.

    Returns:
        θ' and b'.

    Example:
        >>> sgd_step(torch.tensor(1.0), torch.tensor(0.0), torch.tensor(2.0), 0.25, 0.9)
        (tensor(0.5000), tensor(2.))
    """
    buffer = momentum * buffer + gradient
    return parameter - lr * buffer, buffer
