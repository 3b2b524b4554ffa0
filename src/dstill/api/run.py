"""Public functions that train experts, distil and run: the commands of the same names have the same arguments."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstill.api.evaluate import evaluate
from dstill.api.job import (
    at_least_one,
    cache_folder,
    check_early,
    check_experts,
    ensure_experts,
    feature_expert,
    fitted_preprocess,
    resolve_recipe,
    trained_on_all,
)
from dstill.artifacts import files
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.record import RESULT_NAME
from dstill.artifacts.result import Claim, Cost, Result
from dstill.artifacts.run_folder import refuse_other_run
from dstill.config.registry import method_info
from dstill.config.settings import Recipe
from dstill.data.real import load_real
from dstill.distillation.folder import Watcher, distill_into, known_identity
from dstill.distillation.loop import Cadence, run_method
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories
from dstill.methods.base import Problem
from dstill.reporting.page import REPORT_NAME, report
from dstill.support.console import Reporter, Silent
from dstill.support.devices import resolve_device
from dstill.support.workers import Workers


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
    check_early(real, resolved)
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
    init: DistilledSet | str | Path | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    cache: str | Path | None = None,
    validate_every: int = 0,
    checkpoint_every: int = 25,
    picture_every: int = 0,
    logs: Sequence[str] = (),
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
        init: a set, its file or folder, whose images are started from instead of the recipe's initialisation.
        out: folder for metrics, checkpoints, pictures and the set. A call with the same arguments continues there.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts for every run that can use them.
        validate_every: measure the set on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations; 0 for never.
        picture_every: keep a picture of the images every so many iterations, and an animation of all; 0 for none.
        logs: where the metrics go besides, `tensorboard` and `wandb`.
        workers: processes that train experts and networks at once; `auto`: one a core where the work is worth it.
        reporter: receives progress.

    Raises:
        DstillError: whatever the user can put right, in a sentence.
    """
    reporter, where = reporter or Silent(), resolve_device(device)
    real = load_real(source)
    resolved = resolve_recipe(real, recipe, method, ipc, net, changes, where, reporter)
    initial = DistilledSet.load(init) if isinstance(init, str | Path) else init
    check_early(real, resolved, logs=logs, own_experts=experts is None, validates=validate_every > 0, initial=initial)
    store = cache_folder(cache)
    trained_with = seed if expert_seed is None else expert_seed
    known = known_identity(real, resolved, seed, trained_with)
    files.check_writable(store)
    if out is not None:
        refuse_other_run(Path(out), known)
        files.check_writable(Path(out))
    trajectories: Trajectories | None = None
    if experts is not None:
        trajectories = experts if isinstance(experts, Trajectories) else Trajectories(Path(experts))
        check_experts(trajectories, real, resolved)
    elif method_info(resolved.method).needs_experts:
        trajectories = ensure_experts(
            real, resolved, trained_with, where, store, reporter, workers=workers, describing=init is None
        )
    preprocess = fitted_preprocess(resolved.preprocess, real, store)
    describing = None if init else feature_expert(real, resolved, trajectories, trained_with, where, store, reporter)
    trained = trained_on_all(real, resolved, trained_with, where, store, reporter)
    problem = Problem(real, preprocess, resolved, trajectories, where, seed, describing, trained, initial)
    cadence = Cadence(checkpoint=checkpoint_every, validate=validate_every, picture=picture_every if out else 0)
    if out is None:
        return run_method(problem, cadence=cadence, observer=Watcher(problem, reporter))
    return distill_into(Path(out), problem, known, cadence, reporter, logs)


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
    random: bool = True,
    whole: bool = False,
    validate_every: int = 0,
    checkpoint_every: int = 25,
    picture_every: int = 0,
    logs: Sequence[str] = (),
    seed: int = 0,
    expert_seed: int | None = None,
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
        random: also measure random real images.
        whole: also measure the whole training set.
        validate_every: measure on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations; 0 for never.
        picture_every: keep a picture of the images every so many iterations, and an animation of all; 0 for none.
        logs: where the metrics go besides, `tensorboard` and `wandb`.
        seed: decides everything random.
        expert_seed: seed of the experts; `seed` if left out. Sets of other seeds from the same experts, one run each.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts for every run that can use them.
        workers: processes that train experts and networks at once; `auto`: one a core where the work is worth it.
        reporter: receives progress.

    Raises:
        DstillError: whatever the user can put right, in a sentence.
    """
    reporter, where, started = reporter or Silent(), resolve_device(device), time.perf_counter()
    at_least_one(sets=sets, networks=networks, workers=None if workers == "auto" else workers)
    real = load_real(source)
    resolved = resolve_recipe(real, recipe, method, ipc, net, changes, where, reporter)
    check_early(real, resolved, nets, logs, validates=validate_every > 0)
    folder = Path(out) if out else Path("runs") / f"{real.name}-{resolved.method}-ipc{resolved.ipc}-seed{seed}"
    trained_with = seed if expert_seed is None else expert_seed
    for k in range(sets):
        refuse_other_run(folder / f"set-{k}", known_identity(real, resolved, seed + k, trained_with))
    files.check_writable(folder)
    files.check_writable(cache_folder(cache))
    reporter.note(f"run folder: {folder}")
    trajectories: Trajectories | None = None
    if method_info(resolved.method).needs_experts:
        trajectories = train_experts(
            real, recipe=resolved, seed=trained_with, device=device, cache=cache, workers=workers, reporter=reporter
        )
    trained = time.perf_counter()
    distilled = [
        distill(
            real,
            experts=trajectories,
            recipe=resolved,
            seed=seed + k,
            expert_seed=trained_with,
            out=folder / f"set-{k}",
            device=device,
            cache=cache,
            validate_every=validate_every,
            checkpoint_every=checkpoint_every,
            picture_every=picture_every,
            logs=logs,
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
        random=random,
        whole=whole,
        seed=seed,
        device=device,
        cache=cache,
        workers=workers,
        reporter=reporter,
    )
    stages = {"experts": trained - started, "distill": matched - trained, **result.stages}
    cost = Cost.load(folder / "set-0")
    result = result.model_copy(update={"seconds": time.perf_counter() - started, "stages": stages, "cost": cost})
    result.save(folder / RESULT_NAME)
    for k, one in enumerate(distilled):
        one.with_accuracy(Claim.of(result)).save(folder / f"set-{k}")
    reporter.note(f"report: {report([folder], folder / REPORT_NAME)}")
    return result
