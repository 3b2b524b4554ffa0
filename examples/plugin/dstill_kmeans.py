"""Prototypes by mini-batch K-Means (Sculley 2010): the synthetic images are centroids of each class's pixels.

A method is a class: `initialise` makes the state, `step` updates it, `result` turns it into a set. Its settings tell dstill
what it must know before a run, and `info` is its entry in the table of methods.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from dstill import DistilledSet, Method, MethodInfo
from dstill.config.settings import Count, DistillConfig, Passes
from dstill.methods.base import Metrics, Problem, State
from dstill.methods.initialisation import initial_images


class KMeansConfig(DistillConfig):
    """Settings of the method, the section `distill` of a recipe."""

    iterations: Count = 200
    """Batches of each class."""
    batch_real: Count = 256
    """Real images of a class in a batch; all of them if the class has fewer."""

    def work(self, *, ipc: int, classes: int) -> list[Passes]:
        """The cost of an iteration, which is at most that of a forward pass of one image per class."""
        return [Passes("forward", classes, 1)]

    def smoke(self) -> Self:
        return self.model_copy(update={"iterations": 5, "batch_real": min(self.batch_real, 16)})


class KMeans(Method):
    """State: `images` `[S, C, H, W]`, and `counts` `[S]`, the number of real images assigned to each so far."""

    Settings = KMeansConfig
    info = MethodInfo(
        "dstill_kmeans:KMeans",
        family="clustering",
        needs="real images",
        labels="hard",
        paper="Sculley 2010",
        note="centroids of each class's pixels, by mini-batch K-Means",
        curves={"moved": "Movement of the centroids"},
    )

    def start(self, problem: Problem) -> None:
        super().start(problem)
        self.settings = problem.settings(KMeansConfig)
        self.rows = problem.real.train.by_class(problem.real.classes)

    def initialise(self, generator: torch.Generator) -> State:
        images = initial_images(self.problem, "random", generator)
        return {"images": images, "counts": torch.zeros(len(images), device=images.device)}

    def step(self, state: State, iteration: int, generator: torch.Generator) -> Metrics:
        images, counts, ipc = state["images"].clone(), state["counts"].clone(), self.problem.recipe.ipc
        distances = list[Tensor]()
        for c, rows in enumerate(self.rows):
            batch = self.problem.prepared(rows[torch.randperm(len(rows), generator=generator)[: self.settings.batch_real]])
            own = images[c * ipc : (c + 1) * ipc]  # views: what is written here is written into `images`
            own_counts = counts[c * ipc : (c + 1) * ipc]
            distance = torch.cdist(batch.flatten(1), own.flatten(1)).square()
            nearest = distance.argmin(1)
            distances.append(distance.amin(1))
            for k in nearest.unique():
                members = batch[nearest == k]
                own_counts[k] += len(members)
                own[k] += (members.mean(0) - own[k]) * len(members) / own_counts[k]
        moved = float((images - state["images"]).norm())
        state["images"], state["counts"] = images, counts
        return {"loss": float(torch.cat(distances).mean()), "moved": moved}

    def result(self, state: State) -> DistilledSet:
        return self.problem.result(state["images"], self.problem.labels(), None)
