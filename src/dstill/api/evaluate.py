"""`evaluate` measures distilled sets on the test set with fresh networks, beside baselines."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dstill.artifacts import files, set_file, whitening
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.record import RESULT_NAME
from dstill.artifacts.result import ProtocolId, Result, Score
from dstill.config.settings import NetConfig, Protocol, canonical, digest
from dstill.data.real import RealSet, Source, load_real
from dstill.errors import DstillError
from dstill.evaluation.baselines import random_baseline, random_trainings, whole_set
from dstill.evaluation.networks import Measured, Trial, TrialProgress, learning_rate, measure, prepared, trials_of
from dstill.evaluation.protocols import further_protocols, load_protocol
from dstill.experts.trained import Labeller
from dstill.jobs.job import Workplace
from dstill.jobs.options import Evaluation, Machine, Names, Networks, at_least_one
from dstill.nets.networks import evaluation_nets, network_class
from dstill.planning.announce import announce_evaluation
from dstill.support.console import Progress
from dstill.support.progress import Pieces
from dstill.version import __version__


def evaluate(
    distilled: DistilledSet | str | Path | Sequence[DistilledSet],
    source: Source,
    *,
    protocol: str | None = None,
    nets: Networks = (),
    networks: int | None = None,
    random: bool = True,
    whole: bool = False,
    also: Names = (),
    out: str | Path | None = None,
    seed: int = 0,
    machine: Machine = Machine(),
    progress: Progress = None,
) -> Result:
    """Trains fresh networks on one or several sets of a method, and measures each once on the whole test set.

    Args:
        distilled: a set, its file or folder, the folder of a run with one set, or several sets of one method and IPC.
        source: the real data, see `load_real`.
        protocol: name or file; the recipe's if left out.
        nets: evaluation networks, `timm:NAME` for those of timm; the set's own if left out. The first gives `accuracy`.
        networks: fresh networks per set; the protocol's number if left out.
        random: also measure random real images of the same IPC, with the first network (cached like the whole set).
        whole: also measure the whole training set with the first network (cached by data, network and preprocessing).
        also: further protocols that the first network is measured under.
        out: file or folder for `result.json`.
        seed: determines initial weights, order and augmentation.
        machine: where the work is done.
        progress: whether progress is shown.

    Returns:
        The result, as in `result.json`.

    Raises:
        DstillError: the classes or the image size of the set are not those of `source`; or several sets differ in method,
            IPC or preprocessing; or the set was made with a network of your own that you have not imported, since a file
            must not decide what is imported.
        CollapseError: a learned α is not positive.

    Example:
        >>> import dstill
        >>> syn = dstill.distill("digits", method="random", recipe="smoke", progress=False)
        >>> dstill.evaluate(syn, "digits", networks=2, random=False, progress=False).accuracy.n
        2
    """
    place = Workplace.of(machine, progress)
    at_least_one(networks=networks)
    target = None if out is None else Path(out) if Path(out).suffix == ".json" else Path(out) / RESULT_NAME
    if target is not None:
        files.check_writable(target.parent)
    if isinstance(distilled, str | Path):
        distilled = set_file.read(distilled)
    sets = [distilled] if isinstance(distilled, DistilledSet) else list(distilled)
    real, evaluation = load_real(source, progress=place.reporter), Evaluation(nets, networks, random, whole, also)
    result = measure_sets(sets, real, place, evaluation, seed, protocol, announced=True)
    if target is not None:
        result.save(target)
    return result


def measure_sets(
    sets: Sequence[DistilledSet],
    real: RealSet,
    place: Workplace,
    evaluation: Evaluation,
    seed: int,
    protocol: str | None = None,
    announced: bool = False,
) -> Result:
    """`evaluate`, resolved.

    Args:
        sets: sets of one method and IPC.
        real: the real data.
        place: where the work is done.
        evaluation: what is measured.
        seed: determines initial weights, order and augmentation.
        protocol: name or file; the recipe's if left out.
        announced: whether it is said how long this takes.
    """
    started = time.perf_counter()
    _check_sets(sets, real, place)
    sets = [whitening.completed(one, real, place.cache) for one in sets]
    if len({(one.method, one.ipc, one.parts, _fitted(one)) for one in sets}) > 1:
        raise DstillError("several sets are evaluated together only if method, IPC, parts and preprocessing agree")
    first = sets[0]
    chosen = protocol_of(first, protocol)
    count, configs = evaluation.networks or chosen.networks, networks_of(first, evaluation)
    others = further_protocols(chosen, evaluation.also)
    if announced:
        announce_evaluation(first, len(sets), real, chosen, evaluation, place)
    test = prepared(real.test, first.preprocess, place.device)
    trainings = count * len(configs) + sum(evaluation.networks or other.networks for other in others)
    pieces = Pieces(place.reporter, "evaluation", len(sets) * trainings)
    measured = {config.name: _measured(sets, config, count, test, chosen, seed, place, pieces) for config in configs}
    rates = {learning_rate(one, chosen) for one in sets}
    rate = rates.pop() if len(rates) == 1 else None
    scores = {name: Score.of([[one.accuracy for one in some] for some in by_set], lr=rate) for name, by_set in measured.items()}
    also = {str(_id(other)): _score_under(sets, configs[0], evaluation, test, other, seed, place, pieces) for other in others}
    confusions = [one.confusion for some in measured[configs[0].name] for one in some]
    evaluated = time.perf_counter()
    baselines = Baselines(first, configs[0], real, test, seed, place)
    random = baselines.random(chosen, count) if evaluation.random and real.judged_on == "test" else None
    whole = baselines.whole() if evaluation.whole else None
    stages = {"evaluate": evaluated - started, "baselines": time.perf_counter() - evaluated}
    return Result(
        method=first.method,
        data=real.name,
        data_fingerprint=real.fingerprint,
        ipc=first.ipc,
        sets=len(sets),
        protocol=_id(chosen),
        measured_on=real.judged_on,
        accuracy=scores[configs[0].name],
        random=random,
        whole=whole,
        nets=scores,
        also=also,
        confusion=torch.tensor(confusions).sum(0).tolist(),
        alpha=first.alpha,
        labels="soft" if first.labels.is_floating_point() else "hard",
        parts=first.parts,
        stored_bytes=first.stored_bytes,
        file_bytes=first.file_bytes,
        whole_bytes=real.train.images.numel() + len(real.train),
        seconds=sum(stages.values()),
        stages=stages,
        dstill=__version__,
    )


def protocol_of(distilled: DistilledSet, protocol: str | None) -> Protocol:
    """The protocol of this name, or else that of a set's recipe, which may be a file that was left behind.

    Raises:
        DstillError: the protocol cannot be loaded.
    """
    if protocol is not None:
        return load_protocol(protocol)
    try:
        return load_protocol(distilled.recipe.protocol if distilled.recipe else "ast")
    except DstillError as error:
        raise DstillError(f"the set does not bring its own protocol with it: {error}. Name one: --protocol ast") from error


def _id(protocol: Protocol) -> ProtocolId:
    return ProtocolId(name=protocol.name, version=protocol.version)


def _score_under(
    sets: Sequence[DistilledSet],
    net: NetConfig,
    evaluation: Evaluation,
    test: tuple[Tensor, Tensor],
    protocol: Protocol,
    seed: int,
    place: Workplace,
    pieces: Pieces,
) -> Score:
    """The score of the sets under another protocol."""
    by_set = _measured(sets, net, evaluation.networks or protocol.networks, test, protocol, seed, place, pieces)
    return Score.of([[one.accuracy for one in some] for some in by_set])


def _check_sets(sets: Sequence[DistilledSet], real: RealSet, place: Workplace) -> None:
    """Refuses sets that cannot be measured on these data or together, and notes the limits of the accuracy."""
    if not sets:
        raise DstillError("there is no distilled set to evaluate: pass at least one")
    for one in sets:
        one.check_fits(real)
    if any(one.data_fingerprint != real.fingerprint for one in sets):
        place.reporter.note(
            f"the set was not distilled from {real.name} (another size, share, choice of classes or split): if it was "
            "distilled from images that are tested here, the accuracy is too high"
        )
    unseen = [real.class_names[c] for c in range(real.classes) if not bool((real.test.labels == c).any())]
    if unseen:
        place.reporter.note(f"{real.name} has no test image of {', '.join(unseen)}: the accuracy says nothing about it")


def networks_of(first: DistilledSet, evaluation: Evaluation, option: str = "--nets") -> list[NetConfig]:
    """The evaluation networks; refuses those that cannot be imported. `option` is the command's for naming one."""
    configs = evaluation_nets(first.net, evaluation.nets)
    for config in configs:
        if not evaluation.nets:
            _check_imported(config.name, option)
        network_class(config.name)
    return configs


def _measured(
    sets: Sequence[DistilledSet],
    config: NetConfig,
    count: int,
    test: tuple[Tensor, Tensor],
    protocol: Protocol,
    seed: int,
    place: Workplace,
    pieces: Pieces,
) -> list[list[Measured]]:
    """The score of `count` fresh networks of one kind, for each set."""
    trials = [
        trial
        for i, one in enumerate(sets)
        for k in range(count)
        for trial in trials_of(one, 1, net=config, seed=seed, stream=(one.seed, i, k))
    ]
    measured = measure(trials, test, protocol, workers=place.workers, progress=telling(pieces, protocol))
    return [measured[i * count : (i + 1) * count] for i in range(len(sets))]


def telling(pieces: Pieces, protocol: Protocol) -> TrialProgress:
    """Tells the progress of networks that are trained under a protocol, with the accuracy of the last one."""

    def tell(trial: Trial, share: float, accuracy: float | None) -> None:
        detail = "" if accuracy is None else f"{trial.net.name} {accuracy:.1%}"
        pieces((protocol.name, trial.net.name, trial.lr, trial.stream), share, detail)

    return tell


class Baselines:
    """The baselines of a set: random images and the whole training set, each measured once for all sets that share them.

    Args:
        like: the set, whose preprocessing, augmentation and IPC they use.
        net: the evaluation network.
        real: the real data.
        test: the prepared test images.
        seed: seed of the evaluation.
        place: where the work is done.
    """

    def __init__(
        self, like: DistilledSet, net: NetConfig, real: RealSet, test: tuple[Tensor, Tensor], seed: int, place: Workplace
    ) -> None:
        self.like, self.net, self.real, self.test, self.seed, self.place = like, net, real, test, seed, place

    def random(self, protocol: Protocol, networks: int, labeller: Labeller | None = None) -> Score:
        """Random real images under the protocol, with their classes as labels or with those of a labeller."""
        labelled = f"-labels-{labeller.name}" if labeller else ""
        return _cached(
            self.place.cache / f"random/{self._shared()}-ipc{self.like.ipc}-{_named(protocol)}-{networks}{labelled}.json",
            lambda: random_baseline(
                self.like,
                self.real,
                self.test,
                protocol,
                net=self.net,
                networks=networks,
                seed=self.seed,
                labeller=labeller,
                workers=self.place.workers,
                note=self.place.reporter.note,
                progress=telling(self._pieces(protocol, networks), protocol),
            ),
        )

    def _pieces(self, protocol: Protocol, networks: int) -> Pieces:
        return Pieces(self.place.reporter, "random images", random_trainings(self.real, protocol, networks))

    def whole(self) -> Score:
        """The whole training set under the protocol `whole`."""
        protocol = load_protocol("whole")
        total = protocol.networks * protocol.passes

        def tell(done: float) -> None:
            self.place.reporter.progress("whole set", done, total)

        def measure() -> Score:
            tell(0)
            score = whole_set(self.net, self.like, self.real, self.test, seed=self.seed, tick=tell)
            tell(total)
            return score

        return _cached(self.place.cache / f"whole/{self._shared()}-{_named(protocol)}.json", measure)

    def _shared(self) -> str:
        """A name for everything that the baselines depend on."""
        settings = "-".join(f"{key}={value}" for key, value in canonical(self.net, exclude_none=True).items())
        name = f"{self.real.fingerprint}-{_fitted(self.like)}-{self.like.augmentation}-{settings}-seed{self.seed}"
        return name.replace("/", "_").replace(":", "_")


def _check_imported(net: str, option: str) -> None:
    """Refuses to import a network that only a file names: the user decides which code runs."""
    module, separator, _ = net.partition(":")
    if separator and module not in sys.modules:
        raise DstillError(
            f"the distilled set was made with the network {net}, which is not part of dstill, and a file must not decide "
            f"what is imported: if you trust that module, pass {option} {net}, or import it first"
        )


def _named(protocol: Protocol) -> str:
    """A name for a protocol by its whole content, since a file can change and keep its name and version."""
    return f"{protocol.name}-{digest(canonical(protocol))}"


def _fitted(distilled: DistilledSet) -> str:
    """A name for a set's preprocessing by kind and numbers, since an imported set may have its own numbers."""
    return f"{distilled.preprocess.kind}-{files.checksum(distilled.preprocess.tensors())[:8]}"


def _cached(path: Path, measure: Callable[[], Score]) -> Score:
    if (found := _read(path)) is not None:
        return found
    with files.alone(path):
        if (found := _read(path)) is not None:  # another process has measured it meanwhile
            return found
        score = measure()
        files.write_text(path, score.model_dump_json())
    return score


def _read(path: Path) -> Score | None:
    """The score of a file; None if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return Score.model_validate_json(path.read_text(encoding="utf-8"))
    return None
