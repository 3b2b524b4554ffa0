"""How long a batch takes on this machine, for the estimates of `dstill plan`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstill.config.settings import ExpertConfig, NetConfig, Passes, Precision
from dstill.data.catalog import Shape
from dstill.derivatives.cuda_graphs import CALLS_BEFORE
from dstill.derivatives.engine import derivatives_of
from dstill.experts.train import expert_objective
from dstill.nets import networks as nets
from dstill.training.fit import Batch, cross_entropy_objective, fit, predictions
from dstill.unrolling.student import Student

_LEAST_SLOPE = 0.5  # of the time of a batch that is measured, the share that grows with its size at least
_PROBES = (4, 32, 256)  # images; for larger batches, time is assumed proportional to size


class Pains(NamedTuple):
    """How long a clock measures.

    Attributes:
        seconds: least time of all repetitions of a batch.
        most: most repetitions.
        epochs: of `fit`, for slow and for quick steps, whose time its setup would distort.
    """

    seconds: float
    most: int
    epochs: tuple[int, int]


CAREFUL, QUICK = Pains(0.2, 20, (4, 64)), Pains(0.03, 3, (2, 8))


class Clock:
    """Seconds per batch on this machine; each kind of work is measured once.

    Args:
        shape: shape of the data.
        device: device to measure.
        pains: how long it measures.
    """

    def __init__(self, shape: Shape, device: torch.device, pains: Pains = CAREFUL) -> None:
        self.shape, self.device, self.pains = shape, device, pains
        self._measured: dict[tuple[Any, ...], float] = {}

    def passes(self, own: NetConfig, passes: Passes, threads: int | None = None) -> float:
        """Seconds of these passes, on so many threads, or all; `own` is the recipe's network."""
        net, precision = passes.net or own, passes.precision

        def seconds(images: int) -> float:
            key = (passes.kind, images, net.model_dump_json(), precision, threads)
            return self._time(key, lambda: self._work(net, passes.kind, images, precision), threads)

        found = self._scaled(passes.images, seconds)
        if passes.kind == "tangent":  # the first order is counted separately
            found = max(0.0, found - self.passes(net, Passes("gradient", 1, passes.images), threads))
        return found * passes.times

    def _work(self, net: NetConfig, kind: str, count: int, precision: Precision) -> Callable[[], Any]:
        network = self._network(net)
        images, labels = self._batch(count)
        batch = Batch(images, images, labels, torch.arange(count), 0)
        match kind:
            case "forward":
                return lambda: predictions(network, images)
            case "library-forward":
                return torch.no_grad()(lambda: network(images))
            case "gradient" | "library":
                objective = cross_entropy_objective(derivatives_of(network) if kind == "gradient" else None)
                return self._recorded(lambda: objective(network, batch))
        student = Student(network, precision=precision)
        theta = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
        keep = student.written
        return self._recorded(
            lambda: student.tangents(theta, theta, images, labels, student.gradient(theta, images, labels, keep=keep)[2])
        )

    def _scaled(self, images: int, seconds: Callable[[int], float]) -> float:
        """Seconds of a batch of `images`, extrapolated linearly from two small batches that take long enough to measure."""
        for probe in _PROBES:
            small = min(images, probe)
            found = seconds(small)
            if small == images:
                return found
            if found > self.pains.seconds / 2:
                break
        larger = min(images, 3 * small)
        # Both include costs that do not grow with the batch, such as the transforms of the filters. But if a batch takes so
        # long, its images take the larger part; a lower slope means that the machine was busy during the first.
        slope = max(_LEAST_SLOPE * found / small, (seconds(larger) - found) / (larger - small))
        return found + slope * (images - small)

    def training(self, net: NetConfig, images: int, augmentation: str, threads: int) -> float:
        """Seconds of one step on a batch of `images`: augmentation, gradient, and the SGD update."""

        def make(probe: int, epochs: int) -> Callable[[], Any]:
            network = self._network(net)
            sgd = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)
            batch, labels = self._batch(probe)
            generator = torch.Generator().manual_seed(0)
            options: dict[str, Any] = {"batch_size": probe, "optimiser": sgd, "generator": generator}
            return lambda: fit(network, batch, labels, epochs=epochs, augmentation=augmentation, **options)

        def seconds(probe: int) -> float:
            key = ("training", probe, net.model_dump_json(), augmentation, threads)
            few, many = self.pains.epochs
            quick = self._time((*key, "glance"), lambda: make(probe, 1), threads, 1) < self.pains.seconds / 8
            epochs = many if quick else few
            return self._time(key, lambda: make(probe, epochs), threads) / epochs

        return self._scaled(images, seconds)

    def expert(self, net: NetConfig, config: ExpertConfig, threads: int) -> float:
        """Seconds of one expert step at the experts' batch size, including the gradient penalty."""

        def make(probe: int) -> Callable[[], Any]:
            network = self._network(net)
            work = expert_objective(network, config)
            images, labels = self._batch(probe)
            batch = Batch(images, images, labels, torch.arange(probe), config.planned_epochs)
            return self._recorded(lambda: work(network, batch))

        def seconds(probe: int) -> float:
            key = ("expert", probe, net.model_dump_json(), config.model_dump_json(), threads)
            return self._time(key, lambda: make(probe), threads)

        return self._scaled(config.batch_size, seconds)

    def _network(self, net: NetConfig) -> torch.nn.Module:
        shape, generator = self.shape, torch.Generator().manual_seed(0)
        return nets.build(net, shape.channels, shape.classes, shape.size, generator).to(self.device)

    def _batch(self, count: int) -> tuple[Tensor, Tensor]:
        shape, generator = self.shape, torch.Generator().manual_seed(0)
        images = torch.randn(count, shape.channels, *shape.size, generator=generator)
        return images.to(self.device), torch.randint(shape.classes, (count,), generator=generator).to(self.device)

    def _time(
        self, key: tuple[Any, ...], make: Callable[[], Callable[[], Any]], threads: int | None = None, most: int | None = None
    ) -> float:
        """The median of a few repetitions, after one to warm up."""
        if key in self._measured:
            return self._measured[key]
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            work, times = make(), list[float]()
            work()
            self._wait()
            while sum(times) < self.pains.seconds and len(times) < (most or self.pains.most):
                started = time.perf_counter()
                work()
                self._wait()
                times.append(time.perf_counter() - started)
        finally:
            torch.set_num_threads(before)
        self._measured[key] = statistics.median(times)
        return self._measured[key]

    def _recorded(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """The work, after enough calls for its CUDA graph to be recorded, as in training."""
        for _ in range(CALLS_BEFORE + 1 if self.device.type == "cuda" else 0):
            work()
        return work

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
