"""Where synthetic images start: random real images, representative ones (paper IV-C1), or noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.data.real import RealSet, Split
from dstill.errors import DstillError
from dstill.methods.base import Problem
from dstill.support import seeding
from dstill.training.fit import described

_BLOCK = 512


def random_rows(split: Split, classes: int, ipc: int, generator: torch.Generator) -> Tensor:
    """Rows of `ipc` distinct real images of each class (all of them where there are fewer), class by class."""
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:ipc]] for rows in split.by_class(classes)])


def clusters(ipc: int, *, released: bool) -> int:
    """How many K-Means clusters a class has.

    Paper: K = IPC up to 10; IPC 50 has 10 clusters with 5 images each, and other multiples of 10 likewise (our extension).
    Released: always 10, which below IPC 10 would give no image at all; K = IPC there.
    """
    if ipc < 10:
        return ipc
    return 10 if released or ipc % 10 == 0 else ipc


def nearest_to_centroids(features: np.ndarray, ipc: int, count: int, seed: int) -> np.ndarray:
    """`ipc` distinct rows of one class: for each K-Means centroid in turn, the nearest images not yet taken.

    Args:
        features: `[n, F]`, n >= ipc.
        ipc: rows wanted.
        count: number of clusters; each gets ipc / count images, the first ones one more where that is no integer.
        seed: of K-Means.
    """
    from sklearn.cluster import KMeans

    centroids = KMeans(count, n_init=4, random_state=seed).fit(features).cluster_centers_
    free = np.ones(len(features), dtype=bool)
    chosen: list[int] = []
    for i, centroid in enumerate(centroids):
        share = ipc // count + (i < ipc % count)
        distance = np.where(free, ((features - centroid) ** 2).sum(1), np.inf)
        nearest = np.argsort(distance, kind="stable")[:share]
        free[nearest] = False
        chosen += nearest.tolist()
    return np.asarray(chosen)


@torch.no_grad()
def expert_network(problem: Problem) -> nn.Module:
    """The network that describes real images: the last recorded epoch of the feature expert, else of the first expert."""
    trajectories = problem.feature_expert or problem.trajectories
    if trajectories is None:
        raise DstillError("representative initialisation needs expert trajectories: take a method that has them")
    theta = trajectories.rows(0, trajectories.epochs, trajectories.epochs + 1)[0]
    return problem.network(theta).eval()


@torch.no_grad()
def representative_rows(problem: Problem, generator: torch.Generator, *, released: bool) -> Tensor:
    """Rows of the real images nearest to the K-Means centroids of each class (paper IV-C1).

    The features are what enters the fully connected layer of a trained expert; the released code takes its logits instead.
    """
    net, real = expert_network(problem), problem.real
    chosen: list[Tensor] = []
    for rows in real.train.by_class(real.classes):
        picks = _representatives(problem, _described(problem, net, rows, released=released), generator, released=released)
        chosen.append(rows[torch.from_numpy(picks)])
    return torch.cat(chosen)


def _described(problem: Problem, net: nn.Module, rows: Tensor, *, released: bool) -> np.ndarray:
    blocks = [problem.prepared(block) for block in rows.split(_BLOCK)]
    return torch.cat([net(block) if released else described(net, block) for block in blocks]).cpu().numpy()


def _representatives(problem: Problem, features: np.ndarray, generator: torch.Generator, *, released: bool) -> np.ndarray:
    if not np.isfinite(features).all():
        raise DstillError(
            "the expert that describes real images gives features that are not finite: lower experts.lr, or pass "
            "--set distill.initialisation=random"
        )
    seed, ipc = int(torch.randint(2**31, (), generator=generator)), problem.recipe.ipc
    return nearest_to_centroids(features, ipc, clusters(ipc, released=released), seed)


@torch.no_grad()
def initialisation_map(problem: Problem, classes: int = 3, points: int = 200) -> list[dict[str, Any]]:
    """The first classes' features on their first two principal components, and which images were chosen (Fig. 10).

    Args:
        problem: as the run had it, so that the same images are found.
        classes: how many classes.
        points: how many images of a class besides the chosen ones.

    Returns:
        For each class its `name`, and `points`, `[[x, y], …]`, of the images and of the `chosen` ones.
    """
    from sklearn.decomposition import PCA

    released = getattr(problem.recipe.distill, "initialisation", "") == "representative-released"
    generator, net, real = seeding.generator(problem.seed, "initialise"), expert_network(problem), problem.real
    found: list[dict[str, Any]] = []
    for name, rows in zip(real.class_names[:classes], real.train.by_class(real.classes), strict=False):
        features = _described(problem, net, rows, released=released)
        picks = _representatives(problem, features, generator, released=released)
        axes = min(2, *features.shape) if len(features) > 1 else 0  # a single image has no spread
        flat = PCA(axes, random_state=0).fit_transform(features) if axes else features[:, :0]
        flat = np.pad(flat, ((0, 0), (0, 2 - axes))).round(3)
        found.append({"name": name, "points": flat[:points].tolist(), "chosen": flat[picks].tolist()})
    return found


def check_initial(initial: DistilledSet, real: RealSet, ipc: int) -> Tensor:
    """The class that each image of a set to start from stands for, `[S]`.

    With soft labels an image belongs to no class: then the order in the set says which it was made for.

    Raises:
        DstillError: the set has images of another shape, or not `ipc` of them in each class.
    """
    ids = initial.class_ids
    if initial.labels.is_floating_point() and len(ids) == real.classes * ipc:
        ids = torch.arange(real.classes).repeat_interleave(ipc)
    counts = torch.bincount(ids, minlength=real.classes)
    shape = (real.channels, *real.size)
    if tuple(initial.images.shape[1:]) != shape or bool((counts != ipc).any()):
        raise DstillError(
            f"the initial set has {counts.tolist()[:4]}… images of {tuple(initial.images.shape[1:])} in its classes, "
            f"{ipc} of {shape} are wanted in each"
        )
    return ids


def _images_of(problem: Problem, initial: DistilledSet) -> Tensor:
    """The images of another set, class by class, in the problem's preprocessing."""
    images = initial.images[check_initial(initial, problem.real, problem.recipe.ipc).argsort(stable=True)]
    before, now = initial.preprocess.tensors(), problem.preprocess.tensors()
    if before.keys() != now.keys() or not all(torch.equal(before[name], now[name]) for name in now):
        images = problem.preprocess.forward(initial.preprocess.invert(images))
    return images.to(problem.device)


def initial_images(problem: Problem, kind: str, generator: torch.Generator) -> Tensor:
    """Preprocessed start of the synthetic set, `[ipc * classes, C, H, W]`, class by class.

    Args:
        problem: data, recipe and experts.
        kind: `random`, `representative`, `representative-released` or `noise` (standard normal in preprocessed units).
        generator: source of every draw.
    """
    real, ipc = problem.real, problem.recipe.ipc
    if problem.initial is not None:
        return _images_of(problem, problem.initial)
    if kind == "noise":
        shape = (ipc * real.classes, real.channels, *real.size)
        return torch.randn(shape, generator=generator).to(problem.device)
    if kind == "random":
        rows = random_rows(real.train, real.classes, ipc, generator)
    else:
        rows = representative_rows(problem, generator, released=kind == "representative-released")
    return problem.prepared(rows)
