"""The public function that asks what a distilled set owes to its images, its labels, its augmentation and its network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dstill.api.evaluate import evaluate
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.files import check_writable, write_text
from dstill.artifacts.result import Result
from dstill.data import siamese
from dstill.data.real import load_real
from dstill.support.console import Reporter, Silent
from dstill.support.tables import markdown
from dstill.support.workers import Workers

HEADING = ["network", "labels", "augmentation", "accuracy %", "n", "over random", "% of whole"]


class Judged(BaseModel):
    """One way of training on the set.

    Attributes:
        net: name of the network.
        labels: `soft` or `hard`.
        augmentation: strategy that the set, random images and the whole set are all trained with.
        result: its accuracy, and that of random images and of the whole set trained in the same way with hard labels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    net: str
    labels: str
    augmentation: str
    result: Result

    def texts(self) -> list[str]:
        """The row under `HEADING`."""
        score, random, whole = self.result.accuracy, self.result.random, self.result.whole
        return [
            *(self.net, self.labels, self.augmentation, f"{100 * score.mean:.1f} ± {100 * score.std:.1f}", str(score.n)),
            f"{100 * (score.mean - random.mean):+.1f}" if random else "–",
            f"{100 * score.mean / whole.mean:.1f}" if whole else "–",
        ]


class Judgement(BaseModel):
    """All ways, and what the set takes to store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: tuple[Judged, ...]
    stored_bytes: int

    def texts(self) -> list[list[str]]:
        """Heading and rows."""
        return [HEADING, *(row.texts() for row in self.rows)]

    def save(self, folder: Path) -> None:
        """Writes `judgement.json` and `judgement.md`."""
        write_text(folder / "judgement.json", self.model_dump_json(indent=2) + "\n")
        write_text(folder / "judgement.md", markdown(self.texts(), left=("network", "labels", "augmentation")))


def judge(
    distilled: DistilledSet | str | Path,
    source: Any,
    *,
    nets: Sequence[str] = (),
    augmentations: Sequence[str] = (),
    protocol: str | None = None,
    networks: int | None = None,
    whole: bool = True,
    seed: int = 0,
    device: str = "auto",
    cache: str | Path | None = None,
    out: str | Path | None = None,
    workers: Workers = 1,
    reporter: Reporter | None = None,
) -> Judgement:
    """Evaluates a set with its own and with hard labels, with and without augmentation, on several networks.

    A set may owe its accuracy to soft labels, to the augmentation that it is trained with, or to the network that it was made
    with, rather than to its images. Each row says what is left when one of them is taken away; random images and the whole
    set are measured under the same augmentation and network, with hard labels.

    Args:
        distilled: a set, its file or folder; foreign ones through `import_set`.
        source: a `RealSet`, or anything `load_real` takes.
        nets: evaluation networks; the set's own if left out.
        augmentations: DSA strategies; the set's own and `none` if left out.
        protocol: name or file; the recipe's if left out.
        networks: fresh networks a row.
        whole: also measure the whole training set, once for each network and augmentation.
        seed: decides initial weights, order and augmentation.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps the accuracies of random images and of the whole set.
        out: folder for `judgement.json` and `judgement.md`.
        workers: processes that train networks at once.
        reporter: receives progress.

    Raises:
        DstillError: see `evaluate`.
    """
    reporter = reporter or Silent()
    one = DistilledSet.load(distilled) if isinstance(distilled, str | Path) else distilled
    real = load_real(source)
    variants = {"soft": one, "hard": one.with_hard_labels()} if one.labels.is_floating_point() else {"hard": one}
    strategies = list(augmentations) or list(dict.fromkeys([one.augmentation, "none"]))
    for strategy in strategies:
        siamese.parse(strategy)
    if out is not None:
        check_writable(Path(out))
    rows = []
    chosen = [[net] for net in nets] or [[]]  # nothing: the set's own, which `evaluate` takes with care
    for named, (labels, variant), strategy in itertools.product(chosen, variants.items(), strategies):
        net = named[0] if named else one.net.name
        reporter.note(f"{net}, {labels} labels, augmentation {strategy}")
        result = evaluate(
            variant.with_augmentation(strategy),
            real,
            protocol=protocol,
            nets=named,
            networks=networks,
            whole=whole,
            seed=seed,
            device=device,
            cache=cache,
            workers=workers,
            reporter=reporter,
        )
        rows.append(Judged(net=net, labels=labels, augmentation=strategy, result=result))
    judgement = Judgement(rows=tuple(rows), stored_bytes=rows[0].result.stored_bytes)
    if out is not None:
        judgement.save(Path(out))
    return judgement
