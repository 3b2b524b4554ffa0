"""Settings for data that nobody published settings for: a search on the validation part within a time budget."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dstill.api.evaluate import evaluate
from dstill.api.job import check_early, resolve_recipe
from dstill.api.run import distill, train_experts
from dstill.artifacts.files import check_writable, write_text
from dstill.artifacts.record import read_metrics
from dstill.config import recipes
from dstill.config.settings import Recipe, canonical, digest
from dstill.data.real import RealSet, load_real
from dstill.errors import CollapseError, DstillError
from dstill.experts.trajectory import Trajectories
from dstill.methods.settings import MatchingConfig
from dstill.support import seeding
from dstill.support.console import Reporter, Silent
from dstill.support.devices import resolve_device
from dstill.support.workers import Workers

_RATE_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
_ALPHA_FACTORS = (0.3, 1.0, 3.0, 10.0)


def tune(
    source: Any,
    *,
    budget: float,
    method: str | None = None,
    ipc: int | None = None,
    recipe: str | Recipe | None = None,
    net: str | None = None,
    changes: tuple[str, ...] = (),
    out: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    cache: str | Path | None = None,
    workers: Workers = 1,
    reporter: Reporter | None = None,
) -> Path:
    """Searches lr_images, T+ and α₀ and writes the best recipe found.

    Everything is judged on a stratified tenth of the training images that experts and images never see; the test set is not
    touched. The first candidate is the recipe itself; the others change the three settings by factors around the best so
    far. A candidate that collapses is out. What was tried is written beside the recipe, and the same call goes on from there.

    Args:
        source: a `RealSet`, or anything `load_real` takes.
        budget: minutes of this call; the candidate under way when it ends is finished.
        method: must agree with the recipe's; `ast` where there is neither.
        ipc: overrides the recipe's.
        recipe: where to start; left out: the data set's own, else derived.
        net: a network instead of the recipe's.
        changes: `section.key=value` assignments; `distill.iterations` bounds a candidate's length.
        out: recipe file to write; `<data>-<method>-ipc<k>.yaml` if left out.
        seed: decides the validation part and the candidates.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts.
        workers: processes that train experts at once; `auto`: one a core where the work is worth it.
        reporter: receives progress.

    Returns:
        The recipe file, which `--recipe FILE` takes. It is written after every candidate, the best so far; `<name>.tried.jsonl`
        has a line for each of them.

    Raises:
        DstillError: the method has nothing to tune, every candidate collapsed, or whatever `distill` raises.
    """
    reporter, started = reporter or Silent(), time.monotonic()
    where = resolve_device(device)
    real = load_real(source)
    base = resolve_recipe(real, recipe, method, ipc, net, changes, where, reporter)
    if not isinstance(base.distill, MatchingConfig):
        raise DstillError(f"tune searches settings of trajectory matching, and method {base.method!r} is none: take ast or mtt")
    target = Path(out) if out else Path(f"{real.name}-{base.method}-ipc{base.ipc}.yaml")
    if target.is_dir():
        raise DstillError(f"{target} is a folder: pass the recipe file to write, such as {target / 'tuned.yaml'}")
    check_writable(target.absolute().parent)
    held = real.holdout(seed)
    check_early(held, base)
    # Experts long enough for the largest T+ of the search serve every candidate.
    largest = 2 * base.distill.max_start_epoch
    if base.experts and base.experts.epochs is not None:
        largest = min(largest, base.experts.epochs - base.distill.expert_epochs + 1)
    longest = base.model_copy(update={"distill": base.distill.model_copy(update={"max_start_epoch": largest})})
    experts = train_experts(held, recipe=longest, seed=seed, device=device, cache=cache, workers=workers, reporter=reporter)
    journal = _Journal(target, {"recipe": canonical(base, exclude={"note"}), "data": held.fingerprint, "seed": seed})
    if journal.rows:
        reporter.note(f"{journal.path} has {len(journal.rows)} candidates of this search: it goes on from there")
    best, tried = base, 0
    best_score: float | None = None
    for candidate in _candidates(seed):
        known = tried < len(journal.rows)
        if tried and not known and time.monotonic() - started > 60 * budget:
            break
        settings = _around(best, candidate, largest) if tried else base
        score = journal.rows[tried]["score"] if known else _judge(settings, held, experts, seed, device, cache)
        tried += 1
        leads = score is not None and (best_score is None or score > best_score)
        if leads:
            best, best_score = settings, score
        if known:
            continue
        journal.add(settings, score)
        said = "collapsed" if score is None else f"validation {score:.1%}{' (best so far)' if leads else ''}"
        reporter.note(f"candidate {tried}: {_named(settings)}: {said}")
        if best_score is not None:
            _write(target, best, real, best_score, tried)
    if best_score is None:
        raise DstillError(
            f"all of {tried} candidates collapsed: start from a smaller distill.lr_images, or give it more --budget"
        )
    _write(target, best, real, best_score, tried)
    reporter.note(f"wrote {target}: pass it as --recipe {target}")
    return target


class _Journal:
    """What was tried, a line a candidate, beside the recipe: a search that was broken off has lost none of it.

    Candidates are drawn from the seed alone, so that the scores of the same search are those of its first candidates.
    """

    def __init__(self, target: Path, search: dict[str, Any]) -> None:
        self.path, self.search = target.with_suffix(".tried.jsonl"), digest(search)
        found = read_metrics(self.path)
        self.rows = [row for row in found if row.get("search") == self.search]
        self._others = [row for row in found if row.get("search") != self.search]

    def add(self, settings: Recipe, score: float | None) -> None:
        """Writes down one more."""
        self.rows.append({"search": self.search, "tried": _named(settings), "score": score})
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (*self._others, *self.rows)))


def _named(settings: Recipe) -> str:
    distill = _matching(settings)
    return f"lr_images {distill.lr_images:.3g}, T+ {distill.max_start_epoch}, α₀ {distill.alpha_init:.3g}"


def _write(target: Path, best: Recipe, real: RealSet, score: float, tried: int) -> None:
    note = f"{best.note + '; ' if best.note else ''}tuned on the validation part: {score:.1%}, best of {tried} candidates"
    write_text(target, recipes.dump(best.model_copy(update={"data": real.name, "note": note})))


def _candidates(seed: int) -> Iterator[tuple[float, float, float]]:
    """Endless factors on (lr_images, T+, α₀), drawn without a memory; the first is ignored."""
    generator = seeding.generator(seed, "tune")

    def pick(values: tuple[float, ...]) -> float:
        return values[int(torch.randint(len(values), (), generator=generator))]

    while True:
        yield pick(_RATE_FACTORS), pick((0.5, 1.0, 2.0)), pick(_ALPHA_FACTORS)


def _matching(recipe: Recipe) -> MatchingConfig:
    assert isinstance(recipe.distill, MatchingConfig)
    return recipe.distill


def _around(best: Recipe, factors: tuple[float, float, float], largest: int) -> Recipe:
    """The best recipe so far with its settings multiplied, T+ within what the experts were trained for."""
    rate, span, alpha = factors
    distill = _matching(best)
    start = min(largest, max(distill.min_start_epoch + 1, math.ceil(distill.max_start_epoch * span)))
    update = {"lr_images": distill.lr_images * rate, "max_start_epoch": start, "alpha_init": distill.alpha_init * alpha}
    return best.model_copy(update={"distill": distill.model_copy(update=update)})


def _judge(
    settings: Recipe, held: RealSet, experts: Trajectories, seed: int, device: str, cache: str | Path | None
) -> float | None:
    """The accuracy on the validation part; None for settings that collapse."""
    # No further than the finished recipe's experts will go: the last epoch describes the images of the start.
    experts = Trajectories(experts.folder, len(experts), settings.expert_config.epochs)
    try:
        candidate = distill(held, experts=experts, recipe=settings, seed=seed, device=device, cache=cache)
        if not bool(torch.isfinite(candidate.images).all()):
            return None
        return evaluate(candidate, held, random=False, seed=seed, device=device, cache=cache).accuracy.mean
    except CollapseError:
        return None
