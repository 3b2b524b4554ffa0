"""The public functions: every command of `dstill` is one of these, with the same arguments."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dstill import native, recipes
from dstill.artifacts import header as files
from dstill.artifacts import pictures
from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.artifacts.result import ProtocolId, Result, Score
from dstill.config import NetConfig, Recipe, canonical
from dstill.console import Reporter, Silent
from dstill.data.real import RealSet, check_ipc, load_real
from dstill.devices import resolve_device
from dstill.distillation import Cadence, run_method
from dstill.engine import supports
from dstill.errors import DstillError
from dstill.evaluation.baselines import random_baseline, whole_set
from dstill.evaluation.networks import Trial, measure, prepared, trials_of
from dstill.evaluation.protocols import load_protocol
from dstill.experts.trajectory import Trajectories
from dstill.methods import method_info
from dstill.methods.base import Problem
from dstill.nets import network_class
from dstill.preparation import (
    at_least_one,
    cache_folder,
    check_early,
    ensure_experts,
    feature_expert,
    fitted_preprocess,
    resolve_recipe,
)
from dstill.runs import RunFolder
from dstill.version import __version__
from dstill.workers import Workers

RESULT_NAME = "result.json"


def train_experts(
    source: Any,
    *,
    recipe: str | Recipe | None = None,
    method: str | None = None,
    ipc: int | None = None,
    net: str | None = None,
    changes: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    cache: str | Path | None = None,
    only: Sequence[int] | None = None,
    workers: Workers = 1,
    reporter: Reporter | None = None,
) -> Trajectories:
    """Trains the expert trajectories that a recipe needs and that the cache does not hold yet.

    Args:
        source: a `RealSet`, or anything `load_real` takes.
        recipe: name, file or `Recipe`; left out: the data set's own.
        method: must agree with the recipe's; `ast` where there is neither.
        ipc: overrides the recipe's.
        net: a network instead of the recipe's, with its own defaults: a name, or your `package.module:Class`.
        changes: `section.key=value` assignments, such as `experts.count=4`.
        seed: expert i depends on it and on i alone.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts for every run that can use them.
        only: train just these experts, for a share of the work elsewhere.
        workers: processes that train experts and networks at once; `auto`: one a core where the work is worth it.
        reporter: receives progress.

    Returns:
        The trajectories. An interrupted call, repeated, trains the missing experts only.
    """
    reporter, where = reporter or Silent(), resolve_device(device)
    real = load_real(source)
    resolved = resolve_recipe(real, recipe, method, ipc, net, changes, where, reporter)
    if resolved.experts is None and not method_info(resolved.method).needs_experts:
        raise DstillError(f"method {resolved.method!r} needs no experts")
    return ensure_experts(real, resolved, seed, where, cache_folder(cache), reporter, only=only, workers=workers)


def distill(
    source: Any,
    *,
    experts: Trajectories | str | Path | None = None,
    recipe: str | Recipe | None = None,
    method: str | None = None,
    ipc: int | None = None,
    net: str | None = None,
    changes: Sequence[str] = (),
    seed: int = 0,
    expert_seed: int | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    cache: str | Path | None = None,
    validate_every: int = 0,
    checkpoint_every: int = 25,
    workers: Workers = 1,
    reporter: Reporter | None = None,
) -> DistilledSet:
    """Distils a real image set.

    Args:
        source: a `RealSet`, or anything `load_real` takes.
        experts: trajectories or their folder; left out: those of the recipe, trained if the cache lacks them.
        recipe: name, file or `Recipe`; left out: the data set's own.
        method: must agree with the recipe's; `ast` where there is neither.
        ipc: images per class; overrides the recipe's.
        net: a network instead of the recipe's, with its own defaults: a name, or your `package.module:Class`.
        changes: `section.key=value` assignments, such as `distill.iterations=300`.
        seed: decides initial images and every draw.
        expert_seed: seed of the experts; `seed` if left out.
        out: folder for metrics, checkpoints, pictures and the set. A call with the same arguments continues there.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts for every run that can use them.
        validate_every: measure the set on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations; 0 for never.
        workers: processes that train experts and networks at once; `auto`: one a core where the work is worth it.
        reporter: receives progress.

    Raises:
        DstillError: whatever the user can put right, in a sentence.
    """
    reporter, where = reporter or Silent(), resolve_device(device)
    real = load_real(source)
    resolved = resolve_recipe(real, recipe, method, ipc, net, changes, where, reporter)
    check_ipc(real, resolved.ipc)
    check_early(real, resolved)
    store = cache_folder(cache)
    trained_with = seed if expert_seed is None else expert_seed
    trajectories: Trajectories | None = None
    if experts is not None:
        trajectories = experts if isinstance(experts, Trajectories) else Trajectories(Path(experts))
    elif method_info(resolved.method).needs_experts:
        trajectories = ensure_experts(real, resolved, trained_with, where, store, reporter, workers=workers)
    preprocess = fitted_preprocess(resolved.preprocess, real, store)
    describing = feature_expert(real, resolved, trajectories, trained_with, where, store, reporter)
    problem = Problem(real, preprocess, resolved, trajectories, where, seed, describing)
    cadence = Cadence(checkpoint=checkpoint_every, validate=validate_every)
    if out is None:
        return run_method(problem, cadence=cadence, observer=_watch(reporter))
    return _distill_into(Path(out), problem, cadence, reporter)


def _distill_into(out: Path, problem: Problem, cadence: Cadence, reporter: Reporter) -> DistilledSet:
    experts = problem.trajectories.folder.name if problem.trajectories else None
    identity = {
        "recipe": canonical(problem.recipe, exclude={"note"}),
        "data": problem.real.fingerprint,
        "seed": problem.seed,
        "experts": experts,
    }
    folder = RunFolder(out, identity)
    finished = out / FILE_NAME
    if finished.exists():
        reporter.note(f"{finished} is finished: nothing to do")
        distilled = DistilledSet.load(finished)
    else:
        reporter.note(_how(problem))
        distilled = run_method(problem, folder, cadence=cadence, observer=_watch(reporter))
        distilled.save(out)
    settings = out / "recipe.yaml"
    if settings.exists():
        return distilled
    pictures.save_grid(distilled, out / "distilled.png")
    rows = folder.metrics()
    if rows:
        pictures.save_curves(
            rows, out / "curves.png", f"{problem.recipe.method}, {problem.real.name}, IPC {problem.recipe.ipc}"
        )
    files.write_text(settings, recipes.dump(problem.recipe))  # last: it says that everything beside the set is there
    folder.finish()
    return distilled


def _how(problem: Problem) -> str:
    """What the numbers are worked out by, in a line."""
    settings = problem.recipe.distill
    if settings is None or problem.device.type != "cpu":
        return f"distilling on {problem.device}"
    engine = native.describe() if supports(problem.network()) else "library double backward"
    exact = settings.gradient != "tesla" and settings.precision == "float32"
    kind = f"{settings.gradient} in {settings.precision}, {'exact' if exact else 'inexact'}"
    return f"distilling on {torch.get_num_threads()} CPU thread(s), {engine}, {kind}"


def _watch(reporter: Reporter) -> Callable[[int, int, dict[str, float]], None]:
    def observe(iteration: int, total: int, row: dict[str, float]) -> None:
        parts = [f"loss {row['loss']:.3f}", f"α {row['alpha']:.4g}"] if "loss" in row else []
        if "gradient_cosine" in row:
            cosine = f"{row['gradient_cosine']:.7f}"
            reporter.note(f"inexact precision: at the start, cosine {cosine} to the exact gradient of the images")
        if row.get("skipped"):
            parts.append(f"{row['skipped']:.0f} skipped")
        if "validation_accuracy" in row:
            parts.append(f"validation {row['validation_accuracy']:.1%}")
        reporter.progress("distilling", iteration + 1, total, "  ".join(parts))

    return observe


def evaluate(
    distilled: DistilledSet | str | Path | Sequence[DistilledSet],
    source: Any,
    *,
    protocol: str | None = None,
    nets: Sequence[str] = (),
    networks: int | None = None,
    random: bool = True,
    whole: bool = False,
    seed: int = 0,
    device: str = "auto",
    cache: str | Path | None = None,
    out: str | Path | None = None,
    workers: Workers = 1,
    reporter: Reporter | None = None,
) -> Result:
    """Trains fresh networks on one or several sets of a method and measures each once on the whole test set.

    Args:
        distilled: a set, its file or folder, or several sets of one method and IPC.
        source: a `RealSet`, or anything `load_real` takes.
        protocol: name or file; the recipe's if left out.
        nets: evaluation networks; the set's own if left out. The first gives `accuracy`.
        networks: fresh networks a set; the protocol's number if left out.
        random: also measure random real images of the same IPC, with the first network.
        whole: also measure the whole training set with the first network (cached by data, network and preprocessing).
        seed: decides initial weights, order and augmentation.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps the whole set's accuracy.
        out: file or folder for `result.json`.
        workers: processes that train experts and networks at once; `auto`: one a core where the work is worth it.
        reporter: receives progress.

    Raises:
        DstillError: the set was made for other classes or another image size than `source` has.
    """
    reporter, where, started = reporter or Silent(), resolve_device(device), time.perf_counter()
    at_least_one(networks=networks)
    if isinstance(distilled, str | Path):
        distilled = DistilledSet.load(distilled)
    sets = [distilled] if isinstance(distilled, DistilledSet) else list(distilled)
    first = sets[0]
    real = load_real(source)
    _check_fits(first, real)
    chosen = load_protocol(protocol or (first.recipe.protocol if first.recipe else "ast"))
    test = prepared(real.test, first.preprocess, where)
    count = networks or chosen.networks
    configs = [first.net if name == first.net.name else NetConfig(name=name) for name in nets] or [first.net]
    for config in configs:
        network_class(config.name)

    scores: dict[str, Score] = {}
    for config in configs:
        trials = [
            trial
            for i, one in enumerate(sets)
            for k in range(count)
            for trial in trials_of(one, 1, net=config, seed=seed, stream=(one.seed, i, k))
        ]
        done = itertools.count(1)

        def watch(trial: Trial, score: float, done: Iterator[int] = done, total: int = len(trials)) -> None:
            reporter.progress(f"evaluating {trial.net.name}", next(done), total, f"{trial.net.name} {score:.1%}")

        values = measure(trials, test, chosen, workers=workers, progress=watch)
        rates = {one.alpha or chosen.lr for one in sets}
        by_set = [values[i * count : (i + 1) * count] for i in range(len(sets))]
        scores[config.name] = Score.of(by_set, lr=rates.pop() if len(rates) == 1 else None)
    evaluated = time.perf_counter()

    beside = None
    if random and real.judged_on == "test":
        beside = random_baseline(
            first, real, test, chosen, net=configs[0], networks=networks, seed=seed, workers=workers, tick=reporter.note
        )
    full = _whole_cached(first, configs[0], real, test, seed, cache_folder(cache)) if whole else None
    stages = {"evaluate": evaluated - started, "baselines": time.perf_counter() - evaluated}
    result = Result(
        method=first.method,
        data=real.name,
        data_fingerprint=real.fingerprint,
        ipc=first.ipc,
        sets=len(sets),
        protocol=ProtocolId(name=chosen.name, version=chosen.version),
        measured_on=real.judged_on,
        accuracy=scores[configs[0].name],
        random=beside,
        whole=full,
        nets=scores,
        alpha=first.alpha,
        stored_bytes=first.images.numel() + first.labels.numel() * (4 if first.labels.is_floating_point() else 1),
        seconds=sum(stages.values()),
        stages=stages,
        dstill=__version__,
    )
    if out is not None:
        target = Path(out)
        result.save(target if target.suffix == ".json" else target / RESULT_NAME)
    return result


def _check_fits(distilled: DistilledSet, real: RealSet) -> None:
    if distilled.class_names != real.class_names:
        raise DstillError(
            f"the distilled set has the classes {', '.join(distilled.class_names[:4])}…, {real.name} has "
            f"{', '.join(real.class_names[:4])}…: evaluate it on the data it was distilled from"
        )
    theirs, ours = tuple(distilled.images.shape[1:]), (real.channels, *real.size)
    if theirs != ours:
        raise DstillError(f"distilled images are {theirs} and real ones {ours} (channels, height, width): pass --image-size")


def _whole_cached(
    like: DistilledSet, config: NetConfig, real: RealSet, test: tuple[torch.Tensor, torch.Tensor], seed: int, cache: Path
) -> Score:
    version = load_protocol("whole").version
    net = "-".join(str(value) for value in canonical(config, exclude_none=True).values())
    name = f"{real.fingerprint}-{like.preprocess.kind}-{like.augmentation}-{net}-seed{seed}-v{version}.json"
    path = cache / "whole" / name.replace("/", "_").replace(":", "_")
    if path.exists():
        return Score.model_validate_json(path.read_text(encoding="utf-8"))
    score = whole_set(config, like, real, test, seed=seed)
    files.write_text(path, score.model_dump_json())
    return score


def run(
    source: Any,
    *,
    method: str | None = None,
    ipc: int | None = None,
    recipe: str | Recipe | None = None,
    net: str | None = None,
    changes: Sequence[str] = (),
    out: str | Path | None = None,
    sets: int = 1,
    nets: Sequence[str] = (),
    networks: int | None = None,
    whole: bool = False,
    validate_every: int = 0,
    checkpoint_every: int = 25,
    seed: int = 0,
    device: str = "auto",
    cache: str | Path | None = None,
    workers: Workers = 1,
    reporter: Reporter | None = None,
) -> Result:
    """Experts, distillation, evaluation, summary. Interrupted, the same call continues where it stopped.

    Args:
        source: a `RealSet`, or anything `load_real` takes.
        method: must agree with the recipe's; `ast` where there is neither.
        ipc: images per class; 1 where neither this nor the recipe says.
        recipe: name, file or `Recipe`; `smoke` for a run of seconds; left out: the data set's own, else derived.
        net: a network instead of the recipe's, with its own defaults: a name, or your `package.module:Class`.
        changes: `section.key=value` assignments, such as `experts.count=4`.
        out: run folder; `runs/<data>-<method>-ipc<k>-seed<s>` if left out. Holds `result.json`, and in `set-<k>/` the
            distilled set, its picture, its metrics and its curves.
        sets: synthetic sets to distil, with seeds `seed`, `seed + 1` …, from the same experts.
        nets: evaluation networks; the recipe's own if left out.
        networks: fresh networks a set; the protocol's number if left out.
        whole: also measure the whole training set.
        validate_every: measure on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations; 0 for never.
        seed: decides everything random.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts for every run that can use them.
        workers: processes that train experts and networks at once; `auto`: one a core where the work is worth it.
        reporter: receives progress.

    Raises:
        DstillError: whatever the user can put right, in a sentence.
    """
    reporter, where, started = reporter or Silent(), resolve_device(device), time.perf_counter()
    at_least_one(sets=sets, networks=networks)
    real = load_real(source)
    resolved = resolve_recipe(real, recipe, method, ipc, net, changes, where, reporter)
    check_ipc(real, resolved.ipc)
    check_early(real, resolved, nets)
    folder = Path(out) if out else Path("runs") / f"{real.name}-{resolved.method}-ipc{resolved.ipc}-seed{seed}"
    reporter.note(f"run folder: {folder}")
    trajectories: Trajectories | None = None
    if method_info(resolved.method).needs_experts:
        trajectories = train_experts(
            real, recipe=resolved, seed=seed, device=device, cache=cache, workers=workers, reporter=reporter
        )
    trained = time.perf_counter()
    distilled = [
        distill(
            real,
            experts=trajectories,
            recipe=resolved,
            seed=seed + k,
            expert_seed=seed,
            out=folder / f"set-{k}",
            device=device,
            cache=cache,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
            workers=workers,
            reporter=reporter,
        )
        for k in range(sets)
    ]
    matched = time.perf_counter()
    result = evaluate(
        distilled,
        real,
        nets=nets,
        networks=networks,
        whole=whole,
        seed=seed,
        device=device,
        cache=cache,
        workers=workers,
        reporter=reporter,
    )
    stages = {"experts": trained - started, "distill": matched - trained, **result.stages}
    result = result.model_copy(update={"seconds": time.perf_counter() - started, "stages": stages})
    result.save(folder / RESULT_NAME)
    claim = {
        **result.accuracy.model_dump(include={"mean", "std", "n"}),
        "protocol": result.protocol.model_dump(),
        "measured_on": result.measured_on,
    }
    for k, one in enumerate(distilled):
        one.with_accuracy(claim).save(folder / f"set-{k}")
    return result
