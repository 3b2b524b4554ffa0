"""The public function that judges distilled sets: fresh networks, one look at the test set, baselines beside it."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstill.api.job import at_least_one, cache_folder
from dstill.artifacts import files
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.record import RESULT_NAME
from dstill.artifacts.result import ProtocolId, Result, Score
from dstill.config.settings import NetConfig, Protocol, canonical, digest, evaluation_nets
from dstill.data.real import RealSet, load_real
from dstill.errors import DstillError
from dstill.evaluation.baselines import random_baseline, whole_set
from dstill.evaluation.networks import Measured, Trial, learning_rate, measure, prepared, trials_of
from dstill.evaluation.protocols import load_protocol
from dstill.nets.networks import network_class
from dstill.support.console import Reporter, Silent
from dstill.support.devices import resolve_device
from dstill.support.workers import Workers
from dstill.version import __version__


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
        random: also measure random real images of the same IPC, with the first network (cached like the whole set).
        whole: also measure the whole training set with the first network (cached by data, network and preprocessing).
        seed: decides initial weights, order and augmentation.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps the accuracies of random images and of the whole set.
        out: file or folder for `result.json`.
        workers: processes that train experts and networks at once; `auto`: one a core where the work is worth it.
        reporter: receives progress.

    Raises:
        DstillError: the set was made for other classes or another image size than `source` has, or with a network of somebody's
            own, which is not imported because a file names it; several sets differ in method, IPC or preprocessing.
        CollapseError: a learned α is not positive.
    """
    reporter, where, started = reporter or Silent(), resolve_device(device), time.perf_counter()
    at_least_one(networks=networks, workers=None if workers == "auto" else workers)
    target = None if out is None else Path(out) if Path(out).suffix == ".json" else Path(out) / RESULT_NAME
    if target is not None:
        files.check_writable(target.parent)
    if isinstance(distilled, str | Path):
        distilled = DistilledSet.load(distilled)
    sets = [distilled] if isinstance(distilled, DistilledSet) else list(distilled)
    if not sets:
        raise DstillError("there is no distilled set to evaluate: pass at least one")
    first = sets[0]
    real = load_real(source)
    for one in sets:
        one.check_fits(real)
    if any(one.data_fingerprint != real.fingerprint for one in sets):
        reporter.note(
            f"{real.name} is not what the set was distilled from (another size, share, choice of classes or split): if images "
            "tested here were trained on there, the accuracy is too high"
        )
    unseen = [real.class_names[c] for c in range(real.classes) if not bool((real.test.labels == c).any())]
    if unseen:
        reporter.note(f"{real.name} has no test image of {', '.join(unseen)}: the accuracy says nothing of it")
    if len(sets) > 1 and len({(one.method, one.ipc, _fitted(one)) for one in sets}) > 1:
        raise DstillError("several sets are evaluated together only if method, IPC and preprocessing agree")
    chosen = load_protocol(protocol or (first.recipe.protocol if first.recipe else "ast"))
    test = prepared(real.test, first.preprocess, where)
    count = networks or chosen.networks
    configs = evaluation_nets(first.net, nets)
    for config in configs:
        if not nets:
            _check_imported(config.name)
        network_class(config.name)

    measured = {
        config.name: _measure_sets(sets, config, count, test, chosen, seed=seed, workers=workers, reporter=reporter)
        for config in configs
    }
    rates = {learning_rate(one, chosen) for one in sets}
    rate = rates.pop() if len(rates) == 1 else None
    scores = {name: Score.of([[one.accuracy for one in some] for some in by_set], lr=rate) for name, by_set in measured.items()}
    confusions = [one.confusion for some in measured[configs[0].name] for one in some]
    evaluated = time.perf_counter()

    store, shared = cache_folder(cache), _shared_by(first, configs[0], real, seed)
    beside = full = None
    if random and real.judged_on == "test":
        name = f"random/{shared}-ipc{first.ipc}-{_named(chosen)}-{count}.json"
        beside = _cached(
            store / name,
            lambda: random_baseline(
                first, real, test, chosen, net=configs[0], networks=count, seed=seed, workers=workers, tick=reporter.note
            ),
        )
    if whole:
        name = f"whole/{shared}-{_named(load_protocol('whole'))}.json"
        full = _cached(store / name, lambda: whole_set(configs[0], first, real, test, seed=seed))
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
        confusion=torch.tensor(confusions).sum(0).tolist(),
        alpha=first.alpha,
        labels="soft" if first.labels.is_floating_point() else "hard",
        stored_bytes=first.images.numel() + first.labels.numel() * (4 if first.labels.is_floating_point() else 1),
        whole_bytes=real.train.images.numel() + len(real.train),
        seconds=sum(stages.values()),
        stages=stages,
        dstill=__version__,
    )
    if target is not None:
        result.save(target)
    return result


def _measure_sets(
    sets: Sequence[DistilledSet],
    config: NetConfig,
    count: int,
    test: tuple[Tensor, Tensor],
    protocol: Protocol,
    *,
    seed: int,
    workers: Workers,
    reporter: Reporter,
) -> list[list[Measured]]:
    """For each set, what `count` fresh networks of one kind reach."""
    trials = [
        trial
        for i, one in enumerate(sets)
        for k in range(count)
        for trial in trials_of(one, 1, net=config, seed=seed, stream=(one.seed, i, k))
    ]
    done = itertools.count(1)

    def watch(trial: Trial, score: float) -> None:
        reporter.progress(f"evaluating {trial.net.name}", next(done), len(trials), f"{trial.net.name} {score:.1%}")

    measured = measure(trials, test, protocol, workers=workers, progress=watch)
    return [measured[i * count : (i + 1) * count] for i in range(len(sets))]


def _check_imported(net: str) -> None:
    """Refuses to import what a file names: the user says which code runs."""
    module, separator, _ = net.partition(":")
    if separator and module not in sys.modules:
        raise DstillError(
            f"the distilled set was made with the network {net}, which is not part of dstill, and a file does not decide what "
            f"is imported: if you trust that module, pass --nets {net}, or import it first"
        )


def _shared_by(like: DistilledSet, net: NetConfig, real: RealSet, seed: int) -> str:
    """Names what the baselines of a set depend on, and so the sets that share them."""
    settings = "-".join(f"{key}={value}" for key, value in canonical(net, exclude_none=True).items())
    name = f"{real.fingerprint}-{_fitted(like)}-{like.augmentation}-{settings}-seed{seed}"
    return name.replace("/", "_").replace(":", "_")


def _named(protocol: Protocol) -> str:
    """Names a protocol by all that it says, since a file of that name and version can change."""
    return f"{protocol.name}-{digest(canonical(protocol))}"


def _fitted(distilled: DistilledSet) -> str:
    """Names a set's preprocessing by kind and numbers, of which an imported set may bring its own."""
    return f"{distilled.preprocess.kind}-{files.checksum(distilled.preprocess.tensors())[:8]}"


def _cached(path: Path, measure: Callable[[], Score]) -> Score:
    with contextlib.suppress(OSError, ValueError):  # missing or damaged: measured anew
        return Score.model_validate_json(path.read_text(encoding="utf-8"))
    score = measure()
    files.write_text(path, score.model_dump_json())
    return score
