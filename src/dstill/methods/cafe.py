"""CAFE: condensation by aligning features (Wang et al. 2022).

The images minimise the sum of two losses. Alignment: in every layer, the mean features of a class agree between real and
synthetic images. Discrimination: the synthetic means of the last features, used as a classifier, classify real features.
Between updates the network is trained on the synthetic set. Its accuracy on a batch of real images, the query, determines
how long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Self, final

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dstill.config.settings import Count, Passes, Positive
from dstill.methods.base import Problem, State
from dstill.methods.batches import ImageMethod, InnerConfig, mean_distance, train_on_synthetic
from dstill.methods.drawing import Drawn
from dstill.nets import networks as nets
from dstill.training.fit import accuracy


class CafeConfig(InnerConfig):
    """Feature alignment (CAFE)."""

    iterations: Count = 2000
    """Networks, each with its own loop of updates."""
    initialisation: Literal["random", "noise"] = "noise"
    """Real images drawn at random, or standard normal noise in preprocessed units."""
    augment: bool = False
    """Whether real and synthetic images share one draw of the augmentation (the paper's CAFE + DSA)."""
    deep_weight: Positive = 1.0
    """Weight of the last block's maps and of the features before the classifier."""
    shallow_weight: Positive = 0.1
    """Weight of the maps of the blocks before the last."""
    discrimination: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the discrimination loss."""
    batch_query: Count = 128
    """Real images per class in the query, on which the accuracy is measured."""
    window: Annotated[int, Field(ge=2)] = 10
    """Number of latest accuracies that decide when a loop ends."""
    settled: Positive = 0.04
    """λ1: the outer loop ends once the accuracies of the window spread by less than this."""
    moved: Positive = 0.03
    """λ2: the inner loop, the network's training, ends once they spread by more than this."""
    max_outer: Count = 30
    """Most updates of the images per network."""
    max_inner: Count = 50
    """Most passes of training between two updates."""
    halve_at: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = (0.6, 0.8, 0.9)
    """Shares of the iterations after which `lr_images` is halved."""

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        """Assumes loops as long as on CIFAR-10 at IPC 1; no loop is shorter than a window."""
        outer, inner = min(1.6 * self.window, self.max_outer), min(2.0 * self.window, self.max_inner)
        matching = [Passes("library-forward", outer * classes, self.batch_real), Passes("library", outer * classes, ipc)]
        training = self.training(ipc * classes)
        query = Passes("forward", outer * (inner + 1), self.batch_query * classes)
        return [*matching, training._replace(times=training.times * outer * inner), query]

    def smoke(self) -> Self:
        return super().smoke().model_copy(update={"batch_query": 8, "window": 2, "max_outer": 3, "max_inner": 3})


def discrimination(real: Tensor, real_labels: Tensor, centres: Tensor) -> Tensor:
    """Cross-entropy, summed over real features `[B, F]`, of their products with the synthetic centres `[K, F]` (Eq. 6)."""
    return F.cross_entropy(real @ centres.t(), real_labels, reduction="sum")


def spread_of(values: Sequence[float], window: int) -> float | None:
    """Largest minus smallest of the last `window` values; None while there are fewer."""
    return max(values[-window:]) - min(values[-window:]) if len(values) >= window else None


@final
class Cafe(ImageMethod):
    """A draw is one network with its outer and inner loops; it contributes to each update of the outer loop."""

    Settings = CafeConfig

    def start(self, problem: Problem) -> None:
        super().start(problem)
        self.settings = problem.settings(CafeConfig)

    def draw(self, state: State, iteration: int, number: int, generator: torch.Generator) -> Iterator[Drawn]:
        settings, net = self.settings, self.problem.fresh_network(generator)
        losses, accuracies, last = list[float](), list[float](), False
        while not last:
            loss, gradient = self._loss(net, state["images"], generator)
            losses.append(float(loss))
            accuracies.append(self._query(net, generator))
            spread = spread_of(accuracies, settings.window)
            last = len(losses) == settings.max_outer or (spread is not None and spread < settings.settled)
            metrics = {"loss": losses[0], "loss_last": losses[-1], "updates": len(losses), "query_accuracy": accuracies[-1]}
            yield Drawn({"images": gradient}, metrics, last=last)
            self._train(net, state["images"], generator)

    def lr_images(self, iteration: int) -> float:
        halvings = sum(iteration >= share * self.settings.iterations for share in self.settings.halve_at)
        return self.settings.lr_images * 0.5**halvings

    def _loss(self, net: nn.Module, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The objective and its gradient by the synthetic images, which are ordered class by class."""
        settings, classes = self.settings, self.problem.real.classes
        loss, features, centres, sources = torch.zeros((), device=images.device), list[Tensor](), list[Tensor](), list[Tensor]()
        with torch.enable_grad():
            for c in range(classes):
                batch = self.batches.draw(c, images, generator)
                with torch.no_grad():
                    of_real = nets.layers(net, batch.real)
                of_synthetic = nets.layers(net, batch.synthetic)
                # Deepest first: the features, the last block, and the blocks before it.
                weights = [settings.deep_weight] * 2 + [settings.shallow_weight] * len(of_real)
                for weight, r, s in zip(weights, reversed(of_real), reversed(of_synthetic), strict=False):
                    loss = loss + weight * mean_distance(r, s)
                # The centres used for discrimination have their own alignment term.
                loss = loss + mean_distance(of_real[-1], of_synthetic[-1])
                features.append(of_real[-1])
                centres.append(of_synthetic[-1].mean(0))
                sources.append(batch.source)
            sizes = torch.tensor([len(some) for some in features], device=images.device)
            labels = torch.arange(classes, device=images.device).repeat_interleave(sizes)
            loss = loss + settings.discrimination * discrimination(torch.cat(features), labels, torch.stack(centres))
            return loss.detach(), torch.cat(torch.autograd.grad(loss, sources))

    def _query(self, net: nn.Module, generator: torch.Generator) -> float:
        """Accuracy on a fresh batch of real training images, with equally many of each class where possible."""
        classes = self.problem.real.classes
        drawn = [self.batches.real(c, generator, self.settings.batch_query) for c in range(classes)]
        labels = torch.cat([torch.full((len(some),), c) for c, some in enumerate(drawn)])
        return accuracy(net, torch.cat(drawn), labels.to(self.problem.device))

    def _train(self, net: nn.Module, images: Tensor, generator: torch.Generator) -> None:
        """Trains on the synthetic set until the network has changed enough: its query accuracies spread."""
        settings, accuracies = self.settings, list[float]()
        for _ in range(settings.max_inner):
            train_on_synthetic(net, images, self.batches, settings, 1, generator)
            accuracies.append(self._query(net, generator))
            spread = spread_of(accuracies, settings.window)
            if spread is not None and spread > settings.moved:
                return
