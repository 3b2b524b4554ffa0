"""FRePo: neural feature regression with a pool (Zhou et al. 2022).

Kernel ridge regression predicts the labels of real images from the synthetic set, on the features of a network trained on
that set. Images and labels are optimised to lower the error. The network is drawn from a pool of networks of different
ages; each use trains it one step further.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, Self, final

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.config.settings import Case, Count, DistillConfig, NetConfig, Passes, Positive
from dstill.errors import CollapseError
from dstill.methods.base import Metrics, Problem, State
from dstill.methods.drawing import DrawingMethod, Drawn, Mean, Told, averaged, move_averages, with_averages
from dstill.methods.initialisation import initial_images
from dstill.methods.lamb import cosine, lamb_step
from dstill.nets import networks as nets
from dstill.training.fit import described

_SMALLEST_PROBABILITY = 1e-4
_MEMBER = ("weights", "buffers", "first", "second", "age")  # of a network of the pool


class FrepoConfig(DistillConfig):
    """Neural feature regression with a pool (FRePo)."""

    optimises_images: ClassVar[bool] = True
    late: ClassVar[frozenset[str]] = DistillConfig.late | {"image_ema"}

    iterations: Count = 500_000
    """Updates of images and labels, each with one network of the pool."""
    batch_real: Count = 1024
    """Real images per step, of all classes."""
    lr: Positive = 3e-4
    """Step size of LAMB on images and labels; falls to a tenth along a cosine."""
    initialisation: Literal["random", "noise"] = "random"
    """Real images drawn at random, or standard normal noise in preprocessed units."""
    learn_labels: bool = True
    """Whether the labels are learned as well."""
    flip: bool = False
    """Whether mirror images are used as further synthetic images (published for IPC 1)."""
    net: NetConfig = NetConfig(name="convnet-widening", norm="batch")
    """Network of the pool; the recipe's own `net` is used for the evaluation."""
    pool: Count = 10
    """Networks in the pool."""
    max_age: Count = 100
    """Training steps after which a network is replaced by a fresh one. The first networks start at staggered ages."""
    lr_net: Positive = 3e-4
    """Learning rate of the networks' Adam."""
    batch_train: Count = 500
    """Synthetic images per step of the networks' training."""
    ridge: Positive = 1e-6
    """λ of the regression, as a share of the kernel's mean diagonal."""
    image_ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the images and learned labels, which becomes the result; left out: the last ones."""

    @model_validator(mode="after")
    def _draws_have_networks_of_their_own(self) -> Self:
        if self.draws > self.pool:
            raise ValueError(f"draws {self.draws} must not exceed pool {self.pool}: each draw trains networks of its own")
        return self

    def adapted(self, case: Case) -> Self:
        net = self.net.model_copy(update={"depth": case.net.depth})
        return self.model_copy(update={"net": net, "flip": self.flip and case.mirror and case.ipc == 1})

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        images = ipc * classes * (2 if self.flip else 1)
        learning = Passes("library", 1, images, self.net)
        training = Passes("library", 1, min(ipc * classes, self.batch_train), self.net)
        return [Passes("library-forward", 1, self.batch_real, self.net), learning, training]

    def smoke(self) -> Self:
        small = {"iterations": 10, "batch_real": 64, "pool": 2, "max_age": 5, "net": self.net.model_copy(update={"width": 8})}
        return self.model_copy(update=small)


def centred(labels: Tensor, classes: int) -> Tensor:
    """One-hot labels `[B, K]` minus 1/K: the targets of the regression."""
    return F.one_hot(labels, classes).float() - 1 / classes


def kernel_regression(real: Tensor, synthetic: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """Predictions K_ts (K_ss + λ I)^-1 Y_s for real features (FRePo, Eq. 4), λ = ridge x the mean diagonal of K_ss.

    Args:
        real: features `[B, F]` of real images.
        synthetic: features `[S, F]` of synthetic ones.
        labels: Y_s `[S, K]`.
        ridge: relative to the kernel's diagonal.

    Raises:
        CollapseError: the kernel is not positive definite.
    """
    # In float64: with more images than features, rounding makes a float32 kernel indefinite, and large numbers cancel in the
    # product. (Apple's MPS has no float64.)
    wide = synthetic if synthetic.device.type == "mps" else synthetic.double()
    kernel = wide @ wide.t()
    kernel = kernel + ridge * kernel.trace() / len(kernel) * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    factor, failed = torch.linalg.cholesky_ex(kernel)
    if int(failed):
        raise CollapseError("the kernel of the synthetic features is not positive definite: raise distill.ridge")
    return (real.to(wide) @ wide.t() @ torch.cholesky_solve(labels.to(wide), factor)).to(labels)


def label_margin(labels: Tensor) -> Tensor:
    """Mean over labels `[S, K]` of -min(largest - second largest, 1/K), so that a label keeps its class."""
    top = labels.topk(2, dim=1).values
    return -(top[:, 0] - top[:, 1]).clamp_max(1 / labels.shape[1]).mean()


def uncentred_logits(labels: Tensor) -> Tensor:
    """Learned labels `[S, K]` as logits, without their centring and scaling; probabilities are at least 1e-4."""
    classes = labels.shape[1]
    probabilities = (labels * math.sqrt(classes / 10) + 1 / classes).clamp_min(_SMALLEST_PROBABILITY)
    return (probabilities / probabilities.sum(1, keepdim=True)).log()


@final
class Frepo(DrawingMethod):
    """State: `images`, and `labels` (Y_s) of what they hold, with LAMB's moments, and moving averages if they are kept; the
    pool's weights, buffers, Adam's moments and ages. A draw is one network of the pool. With K draws, draw k takes one of the
    networks k, k + K, k + 2K …
    """

    Settings = FrepoConfig

    def start(self, problem: Problem) -> None:
        self.problem, self.settings = problem, problem.settings(FrepoConfig)
        self.net = problem.fresh_network(torch.Generator().manual_seed(0), self.settings.net)
        self.targets = centred(problem.real.train.labels, problem.real.classes)

    def initialise(self, generator: torch.Generator) -> State:
        settings, classes = self.settings, self.problem.real.classes
        images = initial_images(self.problem, settings.initialisation, generator)
        labels = centred(self.problem.labels(), classes) / math.sqrt(classes / 10)
        state = {"images": images, "labels": labels}
        for name in ("images", "labels"):
            state[f"{name}.first"] = torch.zeros_like(state[name])
            state[f"{name}.second"] = torch.zeros_like(state[name])
        self._fresh(generator)
        for name, value in self._member().items():
            state[f"pool.{name}"] = torch.zeros(settings.pool, *value.shape, device=self.problem.device)
        for i in range(settings.pool):
            self._fresh(generator)
            self._keep(state, i, self._member())
            for _ in range(i * settings.max_age // settings.pool):
                self._keep(state, i, self._trained(state, i, generator))
        return with_averages(state, ["images", "labels"], settings.image_ema)

    def draw(self, state: State, iteration: int, number: int, generator: torch.Generator) -> Iterator[Drawn]:
        settings = self.settings
        own = range(number, settings.pool, settings.draws)
        i = own[int(torch.randint(len(own), (), generator=generator))]
        self._take(state, i)
        rows = torch.randint(len(self.problem.real.train), (settings.batch_real,), generator=generator)
        real = described(self.net, self.problem.prepared(rows))
        targets = self.targets[rows].to(real.device)
        images = state["images"].detach().requires_grad_()
        labels = state["labels"].detach().requires_grad_()
        self.net.eval()
        with torch.enable_grad():
            decoded = self.problem.decoded(images)
            features = nets.features(self.net, torch.cat([decoded, decoded.flip(3)]) if settings.flip else decoded)
            both = torch.cat([labels, labels]) if settings.flip else labels
            predicted = kernel_regression(real, features, both, settings.ridge)
            error, margin = (predicted - targets).square().mean(), label_margin(labels)
            by_images, by_labels = torch.autograd.grad(error + margin, [images, labels])
        right = (predicted.argmax(1) == targets.argmax(1)).float().mean()
        yield Drawn({"images": by_images, "labels": by_labels}, last=False)
        age = int(state["pool.age"][i])
        if age > settings.max_age:
            self._fresh(generator)
            member = self._member()
        else:
            member = self._trained(state, i, generator)
        metrics = {"loss": float(error.detach()), "margin": float(margin.detach()), "fit_accuracy": float(right), "age": age}
        yield Drawn(metrics=metrics, kept={"number": torch.tensor(i), **member})

    def update(self, state: State, iteration: int, drawn: Sequence[Told], mean: Mean) -> Metrics:
        """One step of LAMB on images and labels; then, once they have been trained on these, keeps the draws' networks.

        Raises:
            CollapseError: the images or labels would no longer be finite.
        """
        settings = self.settings
        if drawn[0].last:
            for one in drawn:
                self._keep(state, int(one.kept["number"]), {name: one.kept[name] for name in _MEMBER})
            return {}
        gradients = mean(drawn)
        lr = cosine(settings.lr, iteration, settings.iterations) * settings.draw_factor
        lamb_step(state, "images", gradients["images"], lr, iteration + 1)
        if settings.learn_labels:
            lamb_step(state, "labels", gradients["labels"], lr, iteration + 1)
        if not (bool(torch.isfinite(state["images"]).all()) and bool(torch.isfinite(state["labels"]).all())):
            raise CollapseError("the synthetic images or labels are no longer finite: lower distill.lr or raise distill.ridge")
        move_averages(state, settings.image_ema)
        return {}

    def result(self, state: State) -> DistilledSet:
        labels = uncentred_logits(averaged(state, "labels")) if self.settings.learn_labels else self.problem.labels()
        return self.problem.result(averaged(state, "images"), labels, None)

    def _fresh(self, generator: torch.Generator) -> None:
        self.net = self.problem.fresh_network(generator, self.settings.net)

    def _buffers(self) -> list[Tensor]:
        return [buffer for buffer in self.net.buffers() if buffer.is_floating_point()]

    def _member(self) -> dict[str, Tensor]:
        """The current network as a fresh member of the pool."""
        weights = nn.utils.parameters_to_vector(self.net.parameters()).detach()
        buffers = torch.cat([torch.zeros(0, device=weights.device), *(buffer.reshape(-1) for buffer in self._buffers())])
        zero = torch.zeros_like(weights)
        return {"weights": weights, "buffers": buffers, "first": zero, "second": zero, "age": zero.new_zeros(())}

    @staticmethod
    def _keep(state: State, i: int, member: dict[str, Tensor]) -> None:
        for name, value in member.items():
            state[f"pool.{name}"][i] = value

    def _take(self, state: State, i: int) -> None:
        """Loads the weights and buffers of member i into the network."""
        nn.utils.vector_to_parameters(state["pool.weights"][i].clone(), self.net.parameters())
        buffers = self._buffers()
        parts = state["pool.buffers"][i].split([buffer.numel() for buffer in buffers]) if buffers else ()
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def _trained(self, state: State, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Member i after one Adam step on the squared error to the synthetic labels."""
        settings = self.settings
        self._take(state, i)
        labels = state["labels"]
        rows = torch.randperm(len(labels), generator=generator)[: settings.batch_train].to(labels.device)
        self.net.train()
        with torch.enable_grad():
            loss = (self.net(self.problem.decoded(state["images"])[rows]) - labels[rows]).square().mean()
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(self.net.parameters()))])
        weights = state["pool.weights"][i].clone()
        weights.grad = gradient
        adam = torch.optim.Adam([weights], lr=settings.lr_net)
        first, second = state["pool.first"][i].clone(), state["pool.second"][i].clone()
        adam.state[weights] = {"step": state["pool.age"][i].cpu().clone(), "exp_avg": first, "exp_avg_sq": second}
        adam.step()
        buffers = self._member()["buffers"]
        age = state["pool.age"][i] + 1
        return {"weights": weights.detach(), "buffers": buffers, "first": first, "second": second, "age": age}
