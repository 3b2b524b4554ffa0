"""`leaderboard` gives a set the two scores of DD-Ranking, which take out what labels and augmentation do for its accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from dstill.api.evaluate import Baselines, networks_of, protocol_of
from dstill.api.judge import Judged, Judgement, judged
from dstill.artifacts import set_file, whitening
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.files import check_writable, write_text
from dstill.artifacts.result import ProtocolId, Score
from dstill.config.settings import NetConfig, TrainingConfig
from dstill.data import preprocess as preprocessing
from dstill.data.real import RealSet, Source, load_real
from dstill.errors import DstillError
from dstill.evaluation.networks import prepared
from dstill.experts.trained import Labeller, NetworkTask, labeller, trained_network
from dstill.jobs.job import Workplace
from dstill.jobs.options import Evaluation, Machine, Network, at_least_one
from dstill.planning.announce import announce_scores
from dstill.support.console import Progress
from dstill.support.progress import Pieces
from dstill.support.tables import bulleted, markdown
from dstill.training.fit import EpochReport

HEADING = ["", "%", "n"]


def robust_score(balance: float) -> float:
    """What DD-Ranking makes of a weighted sum of differences between accuracies: (e^x - e^-1) / (e - e^-1).

    Args:
        balance: the sum, a fraction in [-1, 1].

    Returns:
        0 for -1, 1 for 1, and 0.269 if nothing differs.

    Example:
        >>> [round(robust_score(x), 3) for x in (-1, 0, 1)]
        [0.0, 0.269, 1.0]
    """
    return (math.exp(balance) - math.exp(-1)) / (math.e - math.exp(-1))


class Rated(BaseModel):
    """A score and its spread.

    Attributes:
        score: a fraction in [0, 1].
        error: its standard error over networks, from those accuracies that several networks have; None if none has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: float
    error: float | None

    @classmethod
    def of(cls, weights: Mapping[str, float], accuracies: Mapping[str, Score]) -> Rated:
        """The score of a weighted sum of accuracies, which are independent of one another."""
        used = [(weight, accuracies[name]) for name, weight in weights.items()]
        balance = sum(weight * one.mean for weight, one in used)
        errors = [weight * one.std / math.sqrt(one.n) for weight, one in used if one.n > 1]
        slope = math.exp(balance) / (math.e - math.exp(-1))  # of `robust_score`
        return cls(score=robust_score(balance), error=slope * math.hypot(*errors) if errors else None)

    def __str__(self) -> str:
        return f"{100 * self.score:.1f}" + ("" if self.error is None else f" ± {100 * self.error:.1f}")


class Leaderboard(BaseModel):
    """The scores of DD-Ranking (Li et al. 2025, arXiv 2505.13300), and the accuracies behind them. All are fractions.

    Attributes:
        method: name of the method.
        data: name of the real set.
        ipc: stored images per class.
        net: name of the evaluation network.
        protocol: how networks are trained.
        augmentation: the set's augmentation.
        labels: `soft` or `hard`.
        label_weight: w, the weight of `improvement_over_random` in `label_robust`.
        augmentation_weight: γ, the weight of the lead with augmentation in `augmentation_robust`.
        label_robust: the label-robust score, of α = w·IOR - (1 - w)·HLR.
        augmentation_robust: the augmentation-robust score, of β = γ·(lead with augmentation) + (1 - γ)·(lead without).
        whole: the whole training set with hard labels, under the protocol `whole`.
        hard: the set with hard labels.
        own: the set with its own labels.
        random: random images with labels of the same kind.
        plain: the set with its own labels, without augmentation.
        plain_random: random images with labels of the same kind, without augmentation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    data: str
    ipc: int
    net: str
    protocol: ProtocolId
    augmentation: str
    labels: str
    label_weight: float
    augmentation_weight: float
    label_robust: Rated
    augmentation_robust: Rated
    whole: Score
    hard: Score
    own: Score
    random: Score
    plain: Score
    plain_random: Score

    @classmethod
    def of(
        cls,
        judgement: Judgement,
        augmentation: str,
        random: Mapping[str, Score] | None = None,
        *,
        label_weight: float = 0.5,
        augmentation_weight: float = 0.5,
    ) -> Leaderboard:
        """The scores of a judgement.

        Args:
            judgement: rows of one network: the set with its own and with hard labels, with its augmentation and with none, and
                beside the second the whole training set.
            augmentation: the set's augmentation.
            random: for each augmentation, random images with labels of the same kind; for hard labels those of the judgement,
                if left out.
            label_weight: w.
            augmentation_weight: γ.

        Raises:
            DstillError: a weight is not in [0, 1]; the judgement is of several networks, or lacks one of these accuracies.
        """
        w, g = _checked(label_weight, "label"), _checked(augmentation_weight, "augmentation")
        rows, nets = {(row.labels, row.augmentation): row for row in judgement.rows}, {row.net for row in judgement.rows}
        if len(nets) > 1:
            raise DstillError(f"the scores are those of one network, the judgement has {', '.join(sorted(nets))}")
        labels = "soft" if any(kind == "soft" for kind, _ in rows) else "hard"
        own, hard = _row(rows, labels, augmentation), _row(rows, "hard", augmentation)
        plain = _row(rows, labels, "none")
        hard_drawn = {row.augmentation: row.result.random for row in (own, plain)} if labels == "hard" else {}
        drawn: Mapping[str, Score | None] = hard_drawn if random is None else random
        accuracies = {
            "whole": _measured(hard.result.whole, "the whole training set"),
            "hard": hard.result.accuracy,
            "own": own.result.accuracy,
            "random": _measured(drawn.get(augmentation), f"random images with {labels} labels"),
            "plain": plain.result.accuracy,
            "plain_random": _measured(drawn.get("none"), "random images without augmentation"),
        }
        # Where two of them are one measurement, its weights add up, so that its spread counts once.
        set_hard = "hard" if labels == "soft" else "own"
        bare, bare_random = ("plain", "plain_random") if augmentation != "none" else ("own", "random")
        return cls(
            method=own.result.method,
            data=own.result.data,
            ipc=own.result.ipc,
            net=own.net,
            protocol=own.result.protocol,
            augmentation=augmentation,
            labels=labels,
            label_weight=w,
            augmentation_weight=g,
            label_robust=Rated.of(_sum((w, "own"), (-w, "random"), (w - 1, "whole"), (1 - w, set_hard)), accuracies),
            augmentation_robust=Rated.of(_sum((g, "own"), (-g, "random"), (1 - g, bare), (g - 1, bare_random)), accuracies),
            **accuracies,
        )

    @property
    def hard_label_recovery(self) -> float:
        """HLR: how far hard labels on the set stay behind the whole training set; less is better."""
        return self.whole.mean - self.hard.mean

    @property
    def improvement_over_random(self) -> float:
        """IOR: the lead of the set over random images that are trained in the same way."""
        return self.own.mean - self.random.mean

    @property
    def improvement_without_augmentation(self) -> float:
        """The same lead where neither is augmented."""
        return self.plain.mean - self.plain_random.mean

    @property
    def title(self) -> str:
        """What was scored."""
        return f"{self.method}, {self.ipc} image(s) per class of {self.data}, {self.net}, protocol {self.protocol}"

    def texts(self) -> list[list[str]]:
        """Heading and rows."""
        lead, bare = f"{self.labels} labels, {self.augmentation}", f"{self.labels} labels, no augmentation"
        measured = {
            "whole training set, hard labels": self.whole,
            "set, hard labels": self.hard,
            f"set, {lead}": self.own,
            f"random images, {lead}": self.random,
            f"set, {bare}": self.plain,
            f"random images, {bare}": self.plain_random,
        }
        return [
            HEADING,
            ["label-robust score (LRS)", str(self.label_robust), ""],
            ["augmentation-robust score (ARS)", str(self.augmentation_robust), ""],
            ["hard label recovery (HLR)", f"{100 * self.hard_label_recovery:.1f}", ""],
            ["improvement over random (IOR)", f"{100 * self.improvement_over_random:+.1f}", ""],
            ["improvement without augmentation", f"{100 * self.improvement_without_augmentation:+.1f}", ""],
            *([name, score.percent, str(score.n)] for name, score in measured.items()),
        ]

    @property
    def notes(self) -> list[str]:
        """How to read the table, in sentences."""
        return [
            f"weights: w = {self.label_weight:g} for IOR against HLR, γ = {self.augmentation_weight:g} for the lead with "
            "augmentation against that without",
            "± of a score is a standard error over networks, of an accuracy a standard deviation",
        ]

    def save(self, folder: Path) -> None:
        """Writes `leaderboard.json` and `leaderboard.md`."""
        write_text(folder / "leaderboard.json", self.model_dump_json(indent=2) + "\n")
        write_text(folder / "leaderboard.md", f"{self.title}\n\n" + markdown(self.texts()) + bulleted(self.notes))


def _checked(weight: float, name: str) -> float:
    if not 0 <= weight <= 1:
        raise DstillError(f"the {name} weight is a share from 0 to 1, got {weight:g}")
    return weight


def _sum(*terms: tuple[float, str]) -> dict[str, float]:
    """A weighted sum, each name once."""
    weights: dict[str, float] = {}
    for weight, name in terms:
        weights[name] = weights.get(name, 0.0) + weight
    return weights


def _row(rows: Mapping[tuple[str, str], Judged], labels: str, augmentation: str) -> Judged:
    if (labels, augmentation) not in rows:
        raise DstillError(f"the judgement has no row with {labels} labels and augmentation {augmentation}: judge it once more")
    return rows[labels, augmentation]


def _measured(score: Score | None, what: str) -> Score:
    if score is None:
        raise DstillError(f"the scores need {what}, which this judgement has not measured: dstill leaderboard measures it")
    return score


def leaderboard(
    distilled: DistilledSet | str | Path,
    source: Source,
    *,
    net: Network | None = None,
    protocol: str | None = None,
    networks: int | None = None,
    label_weight: float = 0.5,
    augmentation_weight: float = 0.5,
    out: str | Path | None = None,
    seed: int = 0,
    machine: Machine = Machine(),
    progress: Progress = None,
) -> Leaderboard:
    """The label-robust and the augmentation-robust score of DD-Ranking (Li et al. 2025) for a set.

    Ways of training are measured as `judge` does, each once with the final network. Random images of a set with soft labels get
    soft labels, too: the answers of a network of the same kind that is trained on the real images (30 passes without
    augmentation, kept in the cache).

    Args:
        distilled: a set, its file or folder, or the folder of a run with one set; `import_set` reads sets of other programs.
        source: the real data, see `load_real`.
        net: the evaluation network; the set's own if left out.
        protocol: name or file; the recipe's if left out.
        networks: fresh networks for each accuracy but that of the whole set; the protocol's number if left out.
        label_weight: w, from 0 to 1: how much the lead over random images counts in the label-robust score.
        augmentation_weight: γ, from 0 to 1: how much the lead with augmentation counts in the augmentation-robust score.
        out: folder for `leaderboard.json` and `leaderboard.md`.
        seed: determines initial weights, order and augmentation.
        machine: where the work is done.
        progress: whether progress is shown.

    Returns:
        The scores and the accuracies behind them.

    Raises:
        DstillError: see `evaluate`; or a weight is not in [0, 1]; `source` is a validation part; or the labels are soft and the
            network has running statistics or dropout, so that it cannot label random images.

    Example:
        >>> import dstill
        >>> syn = dstill.distill("digits", method="random", recipe="smoke", progress=False)
        >>> scores = dstill.leaderboard(syn, "digits", protocol="quick", networks=1, progress=False)
        >>> 0 < scores.label_robust.score < 0.5
        True
    """
    place = Workplace.of(machine, progress)
    at_least_one(networks=networks)
    w, g = _checked(label_weight, "label"), _checked(augmentation_weight, "augmentation")
    one = set_file.read(distilled) if isinstance(distilled, str | Path) else distilled
    if out is not None:
        check_writable(Path(out))
    real = load_real(source, progress=place.reporter)
    if real.judged_on != "test":
        raise DstillError(f"the scores are those of a test set, and {real.name} is judged on its {real.judged_on} part")
    one.check_fits(real)
    one = whitening.completed(one, real, place.cache)
    evaluation = Evaluation([] if net is None else [net], networks)
    judgement, random = _measurements(one, real, place, evaluation, seed, protocol)
    found = Leaderboard.of(judgement, one.augmentation, random, label_weight=w, augmentation_weight=g)
    if out is not None:
        found.save(Path(out))
    return found


def _measurements(
    one: DistilledSet, real: RealSet, place: Workplace, evaluation: Evaluation, seed: int, protocol: str | None
) -> tuple[Judgement, dict[str, Score] | None]:
    """The rows that the scores need, and random images with soft labels if the set has such."""
    net, chosen, soft = networks_of(one, evaluation, "--net")[0], protocol_of(one, protocol), one.labels.is_floating_point()
    strategies, labelling = list(dict.fromkeys((one.augmentation, "none"))), TrainingConfig() if soft else None
    hard = one.with_hard_labels()
    ways = [*([one, hard] if soft else [hard]), *(one.with_augmentation(other) for other in strategies[1:])]
    counts = {"ways": len(ways), "augmentations": len(strategies)}
    announce_scores(one, real, chosen, evaluation, place, labelling=labelling, **counts)
    teacher = None if labelling is None else _labeller(real, net, labelling, seed, place)
    rows = [judged(way, real, place, replace(evaluation, random=not soft, whole=way is hard), seed, protocol) for way in ways]
    judgement = Judgement(rows=tuple(rows), stored_bytes=rows[0].result.stored_bytes)
    if teacher is None:
        return judgement, None
    test, count = prepared(real.test, one.preprocess, place.device), evaluation.networks or chosen.networks
    likes = {strategy: one.with_augmentation(strategy) for strategy in strategies}
    random = {
        strategy: Baselines(like, net, real, test, seed, place).random(chosen, count, teacher)
        for strategy, like in likes.items()
    }
    return judgement, random


def _labeller(real: RealSet, net: NetConfig, config: TrainingConfig, seed: int, place: Workplace) -> Labeller:
    """A network trained on the real images, which labels random ones."""
    task = NetworkTask(real, preprocessing.fit("standardise", real.train.images), net, config, seed)
    place.reporter.note(f"random images get soft labels of a {net.name} that is trained on {real.name}: {config.epochs} passes")
    pieces = Pieces(place.reporter, "network epochs", config.epochs)

    def observe(report: EpochReport) -> None:
        pieces(0, report.epochs_done, f"loss {report.loss:.3f}")

    def tick(done: float) -> None:
        pieces(0, done)

    return labeller(task, trained_network(task, place.cache / "networks", place.device, observe, tick), place.device)
