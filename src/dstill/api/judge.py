"""`judge` tests how much of a set's accuracy comes from its images, labels, augmentation and network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from dstill.api import findings
from dstill.api.evaluate import measure_sets, networks_of, protocol_of, telling
from dstill.artifacts import set_file, whitening
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.files import check_writable, write_text
from dstill.artifacts.result import Result, Score
from dstill.config.settings import NetConfig
from dstill.data import siamese
from dstill.data.real import RealSet, Source, load_real
from dstill.evaluation.networks import measure, prepared, trials_of
from dstill.jobs.job import Workplace
from dstill.jobs.options import Evaluation, Machine, Network, Networks, at_least_one
from dstill.planning.announce import announce_evaluation
from dstill.support.console import Progress
from dstill.support.progress import Pieces
from dstill.support.tables import bulleted, markdown

_LOOKS = 3  # networks that compare two ways of training on the validation part
HEADING = ["network", "labels", "augmentation", "accuracy %", "n", "over random", "% of whole"]


class Judged(BaseModel):
    """One way of training on the set.

    Attributes:
        net: name of the network.
        labels: `soft` or `hard`.
        augmentation: strategy for training on the set, on random images and on the whole training set.
        result: the accuracy, and those of random images and the whole training set, trained in the same way with hard labels.
        validation: the accuracy on a part of the training images, by which ways of training are told apart; None if a class
            has too few images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    net: str
    labels: str
    augmentation: str
    result: Result
    validation: Score | None = None

    def texts(self) -> list[str]:
        """The row under `HEADING`."""
        score, random, whole = self.result.accuracy, self.result.random, self.result.whole
        return [
            *(self.net, self.labels, self.augmentation, score.percent, str(score.n)),
            f"{100 * (score.mean - random.mean):+.1f}" if random else "–",
            f"{100 * score.mean / whole.mean:.1f}" if whole else "–",
        ]


class Judgement(BaseModel):
    """All ways of training, and the stored size of the set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[Judged, ...]
    stored_bytes: int

    def texts(self) -> list[list[str]]:
        """Heading and rows."""
        return [HEADING, *(row.texts() for row in self.rows)]

    @property
    def findings(self) -> list[str]:
        """Which labels and which augmentation are better on the validation part, in sentences."""
        return findings.of_judgement(self.rows)

    def save(self, folder: Path) -> None:
        """Writes `judgement.json` and `judgement.md`."""
        write_text(folder / "judgement.json", self.model_dump_json(indent=2) + "\n")
        table = markdown(self.texts(), left=("network", "labels", "augmentation"))
        write_text(folder / "judgement.md", table + bulleted(self.findings))


def judge(
    distilled: DistilledSet | str | Path,
    source: Source,
    *,
    nets: Networks = (),
    augmentations: Sequence[str] = (),
    protocol: str | None = None,
    networks: int | None = None,
    whole: bool = True,
    out: str | Path | None = None,
    seed: int = 0,
    machine: Machine = Machine(),
    progress: Progress = None,
) -> Judgement:
    """Evaluates a set with its own and with hard labels, with and without augmentation, on several networks.

    The accuracy of a set may come from soft labels, from the augmentation, or from the network that it was made with, rather
    than from its images. Each row shows what remains without one of them. Random images and the whole training set are
    measured with the same augmentation and network, with hard labels.

    Args:
        distilled: a set, its file or folder, or the folder of a run with one set; `import_set` reads sets of other programs.
        source: the real data, see `load_real`.
        nets: evaluation networks; the set's own if left out.
        augmentations: DSA strategies; the set's own and `none` if left out.
        protocol: name or file; the recipe's if left out.
        networks: fresh networks per row.
        whole: also measure the whole training set, once for each network and augmentation.
        out: folder for `judgement.json` and `judgement.md`.
        seed: determines initial weights, order and augmentation.
        machine: where the work is done.
        progress: whether progress is shown.

    Returns:
        The rows.

    Raises:
        DstillError: see `evaluate`.

    Example:
        >>> import dstill
        >>> syn = dstill.distill("digits", method="random", recipe="smoke", progress=False)
        >>> once = {"networks": 1, "whole": False, "progress": False}
        >>> judgement = dstill.judge(syn, "digits", augmentations=["none"], **once)
        >>> [row.augmentation for row in judgement.rows]
        ['none']
    """
    place = Workplace.of(machine, progress)
    one = set_file.read(distilled) if isinstance(distilled, str | Path) else distilled
    real = load_real(source, progress=place.reporter)
    one = whitening.completed(one, real, place.cache)
    variants = [one, one.with_hard_labels()] if one.labels.is_floating_point() else [one]
    strategies = list(augmentations) or list(dict.fromkeys([one.augmentation, "none"]))
    for strategy in strategies:
        siamese.parse(strategy)
    if out is not None:
        check_writable(Path(out))
    at_least_one(networks=networks)
    fewest = int(torch.bincount(real.train.labels, minlength=real.classes).min())
    held = real.holdout(seed) if fewest > 1 else None
    rows: list[Judged] = []
    chosen: list[list[Network]] = [[net] for net in nets] or [[]]  # if none, the set's own, whose import is checked
    for named, variant, strategy in itertools.product(chosen, variants, strategies):
        way, evaluation = variant.with_augmentation(strategy), Evaluation(named, networks, True, whole)
        rounds = 0 if rows else max(1, len(nets)) * len(variants) * len(strategies)
        rows.append(judged(way, real, place, evaluation, seed, protocol, rounds, held))
    judgement = Judgement(rows=tuple(rows), stored_bytes=rows[0].result.stored_bytes)
    if out is not None:
        judgement.save(Path(out))
    return judgement


def judged(
    way: DistilledSet,
    real: RealSet,
    place: Workplace,
    evaluation: Evaluation,
    seed: int,
    protocol: str | None = None,
    rounds: int = 0,
    held: RealSet | None = None,
) -> Judged:
    """One way of training: a set with the labels and the augmentation in question.

    Args:
        way: the set.
        real: the real data.
        place: where the work is done.
        evaluation: what is measured, with one network.
        seed: determines initial weights, order and augmentation.
        protocol: name or file; the recipe's if left out.
        rounds: for how many ways like this one it is said how long they take; 0 if that was said before.
        held: real data with a validation part, on which the way is then measured as well.
    """
    net = networks_of(way, evaluation)[0]  # refuses what must not be imported, before the announcement builds it
    labels = "soft" if way.labels.is_floating_point() else "hard"
    place.reporter.note(f"{net.name}, {labels} labels, augmentation {way.augmentation}")
    if rounds:
        looks = _LOOKS if held is not None else 0
        announce_evaluation(way, 1, real, protocol_of(way, protocol), evaluation, place, rounds, looks)
    result = measure_sets([way], real, place, evaluation, seed, protocol)
    validation = None if held is None else _on_validation(way, held, net, seed, place, protocol)
    return Judged(net=net.name, labels=labels, augmentation=way.augmentation, result=result, validation=validation)


def _on_validation(
    way: DistilledSet, held: RealSet, net: NetConfig, seed: int, place: Workplace, protocol: str | None
) -> Score:
    """The accuracy of a few networks on the validation part."""
    chosen = protocol_of(way, protocol)
    trials = trials_of(way, _LOOKS, net=net, seed=seed, stream=("judge",))
    tell = telling(Pieces(place.reporter, "validation", _LOOKS), chosen)
    test = prepared(held.test, way.preprocess, place.device)
    return Score.of([[one.accuracy for one in measure(trials, test, chosen, workers=place.workers, progress=tell)]])
