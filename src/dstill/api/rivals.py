"""Coresets that compete with a distilled set on images set aside, so that the better one is handed out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.record import DataSource
from dstill.artifacts.result import Score
from dstill.config.registry import method_info
from dstill.config.settings import Recipe, TrainingConfig, settings_class
from dstill.data.real import RealSet
from dstill.distillation.folder import distill_into
from dstill.distillation.loop import Cadence
from dstill.evaluation.networks import Trial, measure, prepared, trials_of
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.job import Job
from dstill.planning.budget import Rivals
from dstill.support.progress import Pieces, Silent

_FOLDER = "candidates"


def candidate(folder: Path, method: str) -> Path:
    """Where the set of a method lies until one is chosen."""
    return folder / _FOLDER / method.rpartition(":")[2]


def can_compete(job: Job) -> bool:
    """Whether the classes are large enough for a part to be set aside and coresets to be chosen from the rest."""
    counts = torch.bincount(job.real.train.labels, minlength=job.real.classes)
    return int(counts.min()) >= 2 * job.recipe.decoded_ipc


def best_of(distilled: DistilledSet, job: Job, rivals: Rivals, folder: Path, real: RealSet) -> DistilledSet:
    """The best of a distilled set and coresets of the same IPC, by networks that are measured on images set aside.

    The winner's folder is copied to `set-0`.

    Args:
        distilled: the set, in its folder `candidate(folder, method)`.
        job: the job on the data without the images set aside, which take the place of its test images.
        rivals: which coresets, and how they are measured.
        folder: the run folder.
        real: all of the data, which the winner is said to come from.
    """
    sets = [distilled, *(_coreset(job, method, rivals.epochs, folder) for method in rivals.methods)]
    scores = _measured(sets, job, rivals.networks)
    best = max(range(len(sets)), key=lambda i: scores[i].mean)
    told = ", ".join(f"{one.method} {score.percent} %" for one, score in zip(sets, scores, strict=True))
    job.place.reporter.note(f"on {len(job.real.test)} images set aside: {told}")
    if best:
        job.place.reporter.note(
            f"{distilled.method} does not beat the coreset in this time, so the one of {sets[best].method} is handed out; the "
            f"distilled set is in {candidate(folder, distilled.method)}"
        )
    source, target = candidate(folder, sets[best].method), folder / "set-0"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    winner = replace(sets[best], data=real.name, data_fingerprint=real.fingerprint)
    winner.save(target)
    if real.read_as:
        DataSource.of(real.read_as).save(target)
    return winner


def _coreset(job: Job, method: str, epochs: int, folder: Path) -> DistilledSet:
    """The coreset of a method, chosen by a network that is trained for so many epochs."""
    quiet = replace(job, recipe=_settings(job.recipe, method, epochs))
    problem = quiet.problem(job.seeds.images, None)
    identity = quiet.identity(job.seeds.images)
    return distill_into(candidate(folder, method), problem, identity, Cadence(), Silent())


def _settings(recipe: Recipe, method: str, epochs: int) -> Recipe:
    needs = method_info(method).needs == "trained network"
    changes = {"training": TrainingConfig(epochs=epochs)} if needs else {}
    distill = settings_class(method)().model_copy(update=changes)
    return recipe.model_copy(update={"method": method, "experts": None, "distill": distill})


def _measured(sets: list[DistilledSet], job: Job, networks: int) -> list[Score]:
    """Scores under the protocol `quick`. The sets share the generators of their networks."""
    protocol, place = load_protocol("quick"), job.place
    images = prepared(job.real.test, sets[0].preprocess, place.device)
    trials = [trial for one in sets for trial in trials_of(one, networks, seed=job.seeds.images, stream=("rivals",))]
    pieces = Pieces(place.reporter, "coresets", len(trials))

    def tell(trial: Trial, share: float, accuracy: float | None) -> None:
        detail = "" if accuracy is None else f"{trial.distilled.method} {accuracy:.1%}"
        pieces((trial.distilled.method, trial.stream), share, detail)

    scores = [one.accuracy for one in measure(trials, images, protocol, workers=place.workers, progress=tell)]
    return [Score.of([scores[i * networks : (i + 1) * networks]]) for i in range(len(sets))]
