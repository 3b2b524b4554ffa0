"""How synthetic images are initialised: random real images, representative ones (paper IV-C1), or noise."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dstill.artifacts.distilled import DistilledSet
from dstill.data import formation
from dstill.data.real import RealSet, Split
from dstill.errors import DstillError
from dstill.methods.base import Problem
from dstill.methods.expert_labels import last_weights
from dstill.support import seeding
from dstill.training.fit import described, predictions

_BLOCK = 512
_FEW = 64  # images that are tried at once where a few are wanted


def random_rows(split: Split, classes: int, ipc: int, generator: torch.Generator) -> Tensor:
    """Rows of `ipc` distinct real images of each class (all of them if there are fewer), class by class."""
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[:ipc]] for rows in split.by_class(classes)])


def clusters(ipc: int, *, released: bool) -> int:
    """Number K of K-Means clusters per class.

    Paper: K = IPC up to 10; 10 clusters of 5 images each at IPC 50, and likewise at other multiples of 10 (our extension).
    Released: always 10. Below IPC 10 that would give no images, so that K = IPC there.
    """
    if ipc < 10:
        return ipc
    return 10 if released or ipc % 10 == 0 else ipc


def nearest_to_centroids(features: np.ndarray, ipc: int, count: int, seed: int) -> np.ndarray:
    """`ipc` distinct rows of one class: for each K-Means centroid in turn, the nearest images not yet taken.

    Args:
        features: `[n, F]`, n >= ipc.
        ipc: number of rows to choose.
        count: number of clusters; each gets ipc / count images, rounded down; the first ones get the remainder.
        seed: seed of K-Means.
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
    """The network that gives the features of real images: the feature expert, else the first one, at its last epoch."""
    trajectories = problem.feature_expert or problem.trajectories
    if trajectories is None:
        raise DstillError("representative initialisation needs expert trajectories: use a method that has them")
    return problem.network(last_weights(trajectories, 0)).eval()


@torch.no_grad()
def representative_rows(problem: Problem, generator: torch.Generator, *, released: bool) -> Tensor:
    """Rows of the real images nearest to the K-Means centroids of each class (paper IV-C1).

    The features are the inputs of a trained expert's fully connected layer; the released code uses its logits instead.
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
            "the expert used for the initialisation gives features that are not finite: lower experts.lr, or pass "
            "--set distill.initialisation=random"
        )
    seed, ipc = int(torch.randint(2**31, (), generator=generator)), problem.recipe.decoded_ipc
    return nearest_to_centroids(features, ipc, clusters(ipc, released=released), seed)


@torch.no_grad()
def classified_rows(problem: Problem, generator: torch.Generator) -> Tensor:
    """Rows of random real images that an expert classifies correctly at its last epoch (DATM), class by class.

    Where the first expert classifies too few images of a class correctly, the next ones are asked, and at last any image will
    do. Images are tried a block at a time, since a good expert accepts most of them.
    """
    trajectories, chosen = problem.trajectories, list[Tensor]()
    if trajectories is None:
        raise DstillError("initialisation=classified needs expert trajectories: use a method that has them")
    network = functools.cache(lambda expert: problem.network(last_weights(trajectories, expert)))
    for c, rows in enumerate(problem.real.train.by_class(problem.real.classes)):
        free, taken, wanted = rows[torch.randperm(len(rows), generator=generator)], rows[:0], problem.recipe.decoded_ipc
        for expert in range(len(trajectories)):
            right = _first_right(problem, network(expert), free, c, wanted - len(taken))
            taken = torch.cat([taken, right])
            free = free[~torch.isin(free, right)]
            if len(taken) == wanted:
                break
        chosen.append(torch.cat([taken, free[: wanted - len(taken)]]))
    return torch.cat(chosen)


def _first_right(problem: Problem, net: nn.Module, rows: Tensor, label: int, count: int) -> Tensor:
    """The first `count` of these rows whose images a network classifies as `label`."""
    right = rows[:0]
    for block in rows.split(_FEW):
        if len(right) >= count:
            break
        right = torch.cat([right, block[(predictions(net, problem.prepared(block)) == label).cpu()]])
    return right[:count]


@torch.no_grad()
def initialisation_map(problem: Problem, classes: int = 3, points: int = 200) -> list[dict[str, Any]]:
    """Features of the first classes on two principal components, and which images were chosen (Fig. 10).

    Args:
        problem: the same as in the run, so that the same images are chosen.
        classes: number of classes.
        points: number of images per class besides the chosen ones.

    Returns:
        For each class its `name`, and the coordinates `[[x, y], …]` of some images (`points`) and of those `chosen`.
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
    """The class of each image of an initial set, `[S]`.

    With soft labels an image has no class. It then follows from the image's position in the set.

    Raises:
        DstillError: the classes have other names or another order, the images have another shape, or their number in a class is
            not `ipc`. Classes that are called by numbers have no names.
    """
    if initial.class_names not in (real.class_names, tuple(map(str, range(real.classes)))):
        raise DstillError(
            f"the initial set has the classes {', '.join(initial.class_names[:4])}…, {real.name} has "
            f"{', '.join(real.class_names[:4])}…: start from a set of these classes, in this order"
        )
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
    """The images of another set, class by class, converted to the problem's preprocessing and parts.

    They are taken as they are stored, or, if preprocessing or parts differ, as networks see them.
    """
    recipe, parts = problem.recipe, problem.recipe.distill.parts
    before, now = initial.preprocess.tensors(), problem.preprocess.tensors()
    alike = before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in now)
    stored = alike and initial.parts == parts
    given, ipc = (initial, recipe.ipc) if stored else (initial.decoded, recipe.decoded_ipc)
    images = given.images[check_initial(given, problem.real, ipc).argsort(stable=True)]
    if not alike:
        images = problem.preprocess.forward(initial.preprocess.invert(images))
    return (images if stored else formation.encode(images, parts)).to(problem.device)


def initial_images(problem: Problem, kind: str, generator: torch.Generator) -> Tensor:
    """The initial synthetic images, preprocessed, `[ipc * classes, C, H, W]`, class by class.

    Args:
        problem: data, recipe and experts.
        kind: `random`, `representative`, `representative-released`, `classified`, `noise` (standard normal in preprocessed
            units), or `unit-noise` (such noise, each image scaled to norm 1). If stored images hold several, real images are
            shrunk into their parts, and noise is of the stored size.
        generator: generator of all random draws.
    """
    real, recipe = problem.real, problem.recipe
    if problem.initial is not None:
        return _images_of(problem, problem.initial)
    if kind in ("noise", "unit-noise"):
        noise = torch.randn((recipe.ipc * real.classes, real.channels, *real.size), generator=generator)
        norms = noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return (noise / norms if kind == "unit-noise" else noise).to(problem.device)
    if kind == "classified":
        rows = classified_rows(problem, generator)
    elif kind == "random":
        rows = random_rows(real.train, real.classes, recipe.decoded_ipc, generator)
    else:
        rows = representative_rows(problem, generator, released=kind == "representative-released")
    return formation.encode(problem.prepared(rows), recipe.distill.parts)
