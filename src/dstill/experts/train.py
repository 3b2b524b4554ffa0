"""Trains experts and records their weight trajectories (paper Algorithm 1)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dstill.artifacts import files
from dstill.config.settings import ExpertConfig, NetConfig, canonical, digest
from dstill.data.preprocess import Preprocess, from_bytes
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.experts.gsam import gsam_objective
from dstill.experts.smooth import smooth_objective, step_lengths
from dstill.experts.trajectory import KIND, expert_path, missing_experts
from dstill.nets import networks as nets
from dstill.support import seeding
from dstill.support.workers import Workers, choose_workers, spread
from dstill.training.checkpoint import Beside, Bookmark, Training
from dstill.training.fit import Batch, EpochReport, Objective, Schedule, Tick, accuracy, fit, step_at

_WRITING_SECONDS = 3600.0  # longer than writing any expert file takes


@dataclass(frozen=True)
class ExpertTask:
    """Everything that determines an expert.

    Attributes:
        real: the real data.
        preprocess: the preprocessing, fitted on the training images.
        net: the network.
        config: the training settings.
        augmentation: DSA strategy for the batches of the cross-entropy.
        seed: master seed. The random draws of an expert depend on the seed and the expert's index alone.
    """

    real: RealSet
    preprocess: Preprocess
    net: NetConfig
    config: ExpertConfig
    augmentation: str
    seed: int

    def identity(self) -> dict[str, Any]:
        """What the stored weights depend on. The numbers of experts and epochs, and compilation, are not part of it."""
        return expert_identity(self.real.fingerprint, self.preprocess.kind, self.net, self.config, self.augmentation, self.seed)

    def fingerprint(self) -> str:
        """The name of the folder with these experts: 16 hex digits of the SHA-256 of their identity."""
        return digest(self.identity())


def expert_identity(
    data: str, preprocess: str, net: NetConfig, config: ExpertConfig, augmentation: str, seed: int
) -> dict[str, Any]:
    """The identity of experts without their data at hand, see `ExpertTask.identity`.

    Args:
        data: fingerprint of the real set.
        preprocess: kind of the preprocessing.
        net: the network.
        config: the training settings.
        augmentation: DSA strategy for the batches of the cross-entropy.
        seed: master seed.
    """
    # `store` is part of the identity if it rounds the weights.
    apart = {"count", "epochs", "compile"} | ({"store"} if config.store == "float32" else set())
    return {
        "data": data,
        "preprocess": preprocess,
        "net": canonical(net, exclude_none=True),
        "experts": canonical(config, exclude=apart, exclude_none=True),
        "augmentation": augmentation,
        "seed": seed,
    }


def optimiser(net: nn.Module, config: ExpertConfig) -> torch.optim.Optimizer:
    """The optimiser of the settings, SGD or Adam."""
    if config.optimiser == "adam":
        return torch.optim.Adam(net.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(net.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def lr_schedule(config: ExpertConfig) -> Schedule | None:
    """The learning-rate schedule of the settings.

    `paper`: the rate is halved at epoch E/2. `released`: it is multiplied by 0.6 after epoch E/2 + 1, and the momentum is
    cleared. `off`: None.
    """
    half = config.planned_epochs // 2
    match config.lr_step:
        case "paper":
            return step_at(half, 0.5)
        case "released":
            return step_at(half + 2, 0.6, reset=True)
        case "off":
            return None


def train_expert(
    task: ExpertTask,
    index: int,
    device: torch.device,
    observer: Callable[[EpochReport, float], None] | None = None,
    bookmark: Bookmark | None = None,
    tick: Tick | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Trains one expert and records a copy of its weights at initialisation and after each epoch.

    Args:
        task: what to train.
        index: index of the expert. With the task's seed, it decides all random draws.
        device: device to train on.
        observer: called after each epoch with the report and the accuracy on `task.real.test`.
        bookmark: the expert's file, stored during the training and at its end. If it holds a training that was interrupted, or
            one with fewer epochs, that training is resumed.
        tick: called about once a second with the number of epochs done so far, such as 2.5.

    Returns:
        The trajectory `[epochs + 1, P]`, and a record with the loss, the accuracy on `real.test` (a diagnostic, which no
        choice depends on) and |θ_t - θ_{t+1}|^2 of each epoch.

    Raises:
        DstillError: a weight is no longer finite.
        ValueError: the number of epochs is not resolved.
    """
    real, config = task.real, task.config
    if config.epochs is None:
        raise ValueError("the number of expert epochs must be resolved first: see Recipe.expert_config")
    generator = seeding.generator(task.seed, "expert", index)
    net = nets.build(task.net, real.channels, real.classes, real.size, generator).to(device)
    images, test = (from_bytes(task.preprocess, split.images, device) for split in (real.train, real.test))
    labels, test_labels = real.train.labels.to(device), real.test.labels.to(device)
    training = Training(net, optimiser(net, config), generator)
    begin, stored, header = bookmark.restore(training) if bookmark else (0, {}, {})
    snapshots = [_snapshot(net)]
    if begin:  # the last snapshot comes from the network, since the trajectory in the file may be rounded
        snapshots = [*stored["trajectory"][:-1].float(), *snapshots]
    record: dict[str, list[float]] = header.get("record") or {"loss": [], "accuracy": [], "step_lengths": []}

    def trajectory() -> Tensor:
        return torch.stack(snapshots).to(getattr(torch, config.store))

    def beside() -> Beside:
        return {"trajectory": trajectory()}, {**task.identity(), "index": index, "record": record}

    def observe(report: EpochReport) -> None:
        snapshot = _snapshot(net)
        if not bool(torch.isfinite(snapshot).all()):
            raise DstillError(
                f"expert {index} has non-finite weights after epoch {report.epochs_done}: lower experts.lr, "
                "or switch the gradient penalty on"
            )
        snapshots.append(snapshot)
        record["loss"].append(report.loss)
        record["accuracy"].append(accuracy(net, test, test_labels))
        record["step_lengths"] += step_lengths(torch.stack(snapshots[-2:])).tolist()
        if bookmark is not None:
            bookmark.store(report.epochs_done, training, beside, last=report.epochs_done == config.epochs)
        if observer is not None:
            observer(report, record["accuracy"][-1])

    fit(
        net,
        images,
        labels,
        epochs=config.epochs,
        batch_size=config.batch_size,
        optimiser=training.optimiser,
        generator=generator,
        objective=expert_objective(net, config),
        augmentation=task.augmentation,
        schedule=lr_schedule(config),
        observer=observe,
        tick=tick,
        begin=begin,
    )
    return trajectory(), record


def expert_objective(net: nn.Module, config: ExpertConfig) -> Objective:
    """The objective of the settings: the clipped loss with the gradient penalty, in GSAM if that is set."""
    objective = smooth_objective(
        net, config.clipped_loss, config.gradient_penalty, precision=config.precision, compiled=config.compile
    )
    return objective if config.gsam is None else gsam_objective(objective, config.gsam.rho, config.gsam.alpha)


def _snapshot(net: nn.Module) -> Tensor:
    """A copy of the weights `[P]` on the CPU. A view would change with the network."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in net.parameters()]).clone().cpu()


def seconds_per_epoch(task: ExpertTask, device: torch.device) -> float:
    """Roughly how long one epoch of an expert takes, from the time of one batch."""
    real, config = task.real, task.config
    generator = torch.Generator().manual_seed(0)
    net = nets.build(task.net, real.channels, real.classes, real.size, generator).to(device)
    images = from_bytes(task.preprocess, real.train.images[: config.batch_size], device)
    labels = real.train.labels[: config.batch_size].to(device)
    batch = Batch(images, images, labels, torch.arange(len(images)), 0)
    started = time.perf_counter()
    expert_objective(net, config)(net, batch)
    return (time.perf_counter() - started) * len(real.train.images) / len(images)


def train_missing(
    task: ExpertTask,
    folder: Path,
    device: torch.device,
    *,
    epochs: Mapping[int, int] | None = None,
    workers: Workers = 1,
    observer: Callable[[int, EpochReport, float], None] | None = None,
    tick: Callable[[int, float], None] | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Path:
    """Trains the experts that are missing in a folder. Each is written atomically as soon as it is finished.

    The number of workers does not change an expert of a ConvNet with instance norm. Other networks are rounded differently by
    another number of threads, which each worker has fewer of. Existing files are checked first; a damaged file is set aside and
    its expert is trained again. An expert with more epochs than needed is used as it is, and one with fewer is trained further,
    since the two differ in nothing else.

    Args:
        task: what to train.
        folder: the folder of this task (named after its fingerprint).
        device: device to train on.
        epochs: number of epochs of each expert to train, by index; all experts with the epochs of the settings if left out.
        workers: number of processes; `auto` for one for each core if there is enough work.
        observer: called after each epoch with the index of the expert, the report and the accuracy.
        tick: called about once a second with the index of an expert and the number of its epochs done so far, such as 2.5.
        note: called with a message for each file that was set aside.

    Returns:
        The folder.

    Raises:
        DstillError: a weight is no longer finite, or a process died.
    """
    wanted = dict.fromkeys(range(task.config.count), task.config.epochs or 1) if epochs is None else epochs
    files.remove_leftovers(folder, older_than=_WRITING_SECONDS)  # other processes may be writing here
    for index in wanted:
        files.set_aside_if_damaged(expert_path(folder, index), KIND, note)
    missing = [(index, count) for index, count in wanted.items() if missing_experts(folder, [index], count)]
    missing.sort(key=lambda item: -item[1])  # the longest first, so that no process waits for it at the end
    if not missing:
        return folder
    several = not isinstance(workers, int) and len(missing) > 1
    seconds = seconds_per_epoch(task, device) * sum(count for _, count in missing) if several else 0.0

    def watch(item: tuple[int, int], told: tuple[EpochReport, float] | float) -> None:
        if isinstance(told, float):
            if tick is not None:
                tick(item[0], told)
        elif observer is not None:
            observer(item[0], *told)

    work, processes = (
        functools.partial(_train_and_save, task, folder, device),
        choose_workers(workers, len(missing), device, seconds),
    )
    mine = spread(functools.partial(work, False), missing, processes, watch)
    others = [item for item, made in zip(missing, mine, strict=True) if not made]
    if others:
        numbers = ", ".join(str(index) for index, _ in sorted(others))
        note(f"experts {numbers} are being trained by another process, which this one waits for")
        spread(functools.partial(work, True), others, 1, watch)
    return folder


def _train_and_save(
    task: ExpertTask,
    folder: Path,
    device: torch.device,
    wait: bool,
    item: tuple[int, int],
    report: Callable[[tuple[EpochReport, float] | float], None],
) -> bool:
    """Whether the expert is there now. If another process is training it, this one waits for it or leaves it to that one."""
    index, epochs = item
    path = expert_path(folder, index)
    task = replace(task, config=task.config.model_copy(update={"epochs": epochs}))
    with files.alone(path, wait=wait) as mine:
        if not mine:
            return False
        if missing_experts(folder, [index], epochs):
            train_expert(task, index, device, lambda epoch, score: report((epoch, score)), Bookmark(path, KIND), report)
        else:
            report(float(epochs))
    return True
