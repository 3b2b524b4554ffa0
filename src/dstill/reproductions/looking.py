"""What looking at test images buys: the sets on the way of a run, measured on the validation part and on the test images.

The best of many looks at the test images lies above their mean, since the looks scatter, and above what its own set reaches,
since networks do. Here the looks are made, the best one is shown as what it is, and their spread says how far above it lies.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dstill.api.evaluate import measure_sets, protocol_of
from dstill.artifacts import files, set_file, whitening
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.record import KEPT_NAME, Curve
from dstill.artifacts.result import Score
from dstill.config.settings import canonical, digest
from dstill.data.real import Split
from dstill.errors import DamagedFileError, DstillError
from dstill.evaluation.networks import prepared, score_network, train_on_set, trials_of
from dstill.jobs.job import Job
from dstill.jobs.options import Evaluation

_LOOKS = "looks-{}.jsonl"  # a digest of how they are made
_POINTS = 20_000  # of the integral over the quantiles of a maximum


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Look(_Frozen):
    """A set on the way, measured by fresh networks, each of them on both kinds of images.

    Attributes:
        iteration: iterations done.
        validation: accuracy of each network on the validation part.
        test: accuracy of each network on the test images.
    """

    iteration: int
    validation: tuple[float, ...]
    test: tuple[float, ...]


class Looks(_Frozen):
    """The looks of one run, and two sets that could be handed out instead of the last one.

    Attributes:
        each: one look for each set that was kept.
        chosen: the kept set that is best on the validation part, measured on the test images by other networks.
        averaged: the mean of the sets that were kept in the second half of the run, measured likewise.
    """

    each: tuple[Look, ...]
    chosen: Score
    averaged: Score

    @property
    def best(self) -> float:
        """The best look at the test images in the second half of the run: what is reported by whoever chooses there."""
        return max(statistics.fmean(look.test) for look in _second_half(self.each))

    @property
    def curve(self) -> Curve:
        """The looks at the test images over the iterations, in percent."""
        values = tuple(100 * statistics.fmean(look.test) for look in self.each)
        return Curve(iterations=tuple(float(look.iteration) for look in self.each), values=values)

    @property
    def predicted(self) -> float:
        """What `best` should be, from the spread."""
        settled = _second_half(self.each)
        return self.spread.best_of(len(settled), len(settled[0].test))

    @property
    def spread(self) -> Spread:
        """How the looks at the test images scatter in the second half of the run."""
        return Spread.of([look.test for look in _second_half(self.each)])


@dataclass(frozen=True)
class Spread:
    """How looks scatter: the accuracy of network k in look i is μ + a_i + e_ik, with independent normal a_i and e_ik.

    A slow rise or fall of the run counts as scatter of the images, and neighbouring looks are less independent than this says.

    Attributes:
        mean: μ.
        images: standard deviation of a_i, from the changes of the images between looks.
        networks: standard deviation of e_ik, from the training of each network.

    Example:
        >>> spread = Spread(mean=0.44, images=0.0, networks=0.01)
        >>> round(spread.best_of(50, networks=1), 4), round(spread.best_of(50, networks=5), 4)
        (0.4625, 0.4501)
        >>> round(spread.illusion_of(50, networks=1), 4)
        0.0225
    """

    mean: float
    images: float
    networks: float

    @classmethod
    def of(cls, looks: Sequence[Sequence[float]]) -> Spread:
        """From the accuracies of each look's networks, by the analysis of variance.

        Args:
            looks: at least two looks of equally many networks. With one network each, all scatter counts as that of networks.
        """
        count, means = len(looks[0]), [statistics.fmean(look) for look in looks]
        between = statistics.variance(means)
        within = statistics.fmean(statistics.variance(look) for look in looks) if count > 1 else between
        return cls(statistics.fmean(means), math.sqrt(max(0.0, between - within / count)), math.sqrt(within))

    def best_of(self, looks: int, networks: int) -> float:
        """The accuracy to be expected of the best of so many looks, each the mean of so many networks."""
        return self.mean + largest_of(looks) * self._deviation(networks)

    def illusion_of(self, looks: int, networks: int) -> float:
        """How far the best look is expected to lie above what its own set reaches, which is the share of the networks."""
        deviation = self._deviation(networks)
        return largest_of(looks) * self.networks**2 / networks / deviation if deviation else 0.0

    def _deviation(self, networks: int) -> float:
        """The standard deviation of looks of so many networks."""
        return math.sqrt(self.images**2 + self.networks**2 / networks)


@functools.cache
def largest_of(count: int) -> float:
    """The expectation of the largest of `count` independent standard normal numbers, ∫₀¹ Φ⁻¹(u^(1/count)) du.

    Example:
        >>> round(largest_of(2), 3), round(largest_of(50), 2)
        (0.564, 2.25)
    """
    normal = statistics.NormalDist()
    return statistics.fmean(normal.inv_cdf(((k + 0.5) / _POINTS) ** (1 / count)) for k in range(_POINTS))


def averaged(sets: Sequence[DistilledSet]) -> DistilledSet:
    """The mean of the images, of soft labels and of α of several sets on the way of one run."""
    first = sets[0]

    def mean(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).mean(0)

    labels = mean([one.labels for one in sets]) if first.labels.is_floating_point() else first.labels
    rates = [one.alpha for one in sets if one.alpha is not None]
    return replace(
        first, images=mean([one.images for one in sets]), labels=labels, alpha=statistics.fmean(rates) if rates else None
    )


def look(folder: Path, job: Job, validation: Split, networks: int, fresh: int | None) -> Looks:
    """Looks at every set that a run has kept. After an interruption, the looks that were made are read from the folder.

    Args:
        folder: the folder of the set.
        job: the job, whose training images do not contain the validation part.
        validation: the part that was set aside.
        networks: networks for each look.
        fresh: networks that measure the sets that could be handed out; the protocol's number if None.

    Raises:
        DstillError: the run kept fewer than three sets; or a file of the folder is damaged.
    """
    kept = {int(path.stem.rpartition("-")[2]): path for path in sorted(folder.glob(KEPT_NAME.replace("{:07d}", "*")))}
    if len(kept) < 3:
        raise DstillError(
            f"{folder} has {len(kept)} set(s) that were kept on the way, too few to choose from: remove {folder.parent} to "
            "distil anew"
        )
    sets = {done: _read(path, job) for done, path in kept.items()}
    each = _looked(folder, sets, job, validation, networks)
    best = max(each, key=lambda one: statistics.fmean(one.validation))

    def score(one: DistilledSet) -> Score:
        return measure_sets([one], job.real, job.place, Evaluation(networks=fresh, random=False), job.seeds.images).accuracy

    return Looks(
        each=each,
        chosen=score(sets[best.iteration]),
        averaged=score(averaged([sets[one.iteration] for one in _second_half(each)])),
    )


def _second_half(each: Sequence[Look]) -> Sequence[Look]:
    return each[len(each) // 2 :]


def _read(path: Path, job: Job) -> DistilledSet:
    return whitening.completed(set_file.read(path), job.real, job.place.cache)


def _looked(folder: Path, sets: dict[int, DistilledSet], job: Job, validation: Split, networks: int) -> tuple[Look, ...]:
    """The looks at all sets. Each is stored once it is made, in a file for this protocol, seed and number of networks."""
    first, device = next(iter(sets.values())), job.place.device
    protocol = protocol_of(first, None)
    path = folder / _LOOKS.format(digest({"protocol": canonical(protocol), "seed": job.seeds.images, "networks": networks}))
    made, splits = _made(path), [prepared(split, first.preprocess, device) for split in (validation, job.real.test)]
    for number, (done, one) in enumerate(sets.items()):
        if done in made:
            continue
        rows = []
        for trial in trials_of(one, networks, seed=job.seeds.images, stream=("look", done)):
            network = train_on_set(trial, protocol, device)
            rows.append([score_network(network, split, one.classes).accuracy for split in splits])
        ours, theirs = zip(*rows, strict=True)
        made[done] = Look(iteration=done, validation=ours, test=theirs)
        files.write_text(path, "".join(look.model_dump_json() + "\n" for look in made.values()))
        job.place.reporter.progress("looks", number + 1, len(sets))
    return tuple(made[done] for done in sets)


def _made(path: Path) -> dict[int, Look]:
    """The looks in a file, by iteration."""
    if not path.exists():
        return {}
    try:
        looks = [Look.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged ({error}): remove it, and the looks are made anew") from error
    return {look.iteration: look for look in looks}
