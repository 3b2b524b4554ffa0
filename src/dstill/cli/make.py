"""Commands that make sets: experts, distillation, and both with an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dstill.cli.app import app
from dstill.cli.options import Choice, Common, Data, Whole, names, numbers

_DATA, _COMMON, _CHOICE = Data(), Common(), Choice()


@app.command
def run(
    source: str,
    *,
    choice: Choice = _CHOICE,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    sets: Whole = 1,
    nets: str | None = None,
    networks: Whole | None = None,
    random: bool = True,
    whole: bool = False,
    validate_every: Whole = 0,
    checkpoint_every: Whole = 25,
    picture_every: Whole = 0,
    log: str | None = None,
    expert_seed: Whole | None = None,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Experts, distillation, evaluation and a summary. Interrupted, the same command continues.

    Args:
        source: digits, cifar10, another name of `dstill ls datasets`, a hub id, a folder of images, or Parquet files.
        out: run folder (default runs/DATA-METHOD-ipcK-seedS).
        sets: synthetic sets to distil and evaluate.
        nets: evaluation networks, joined by commas.
        networks: fresh networks a set (default: the protocol's).
        random: also measure random real images.
        whole: also train on the whole training set.
        validate_every: measure on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations.
        picture_every: keep a picture of the images every so many iterations, and an animation of all; 0 for none.
        log: where metrics go besides, joined by commas: tensorboard, wandb.
        expert_seed: seed of the experts (default: --seed), for sets of other seeds from the same experts.
        choice: which settings it takes.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill.api import run as commands
    from dstill.cli import summary

    reporter = common.start()
    result = commands.run(
        data.load(source, out or Path("runs")),
        out=out,
        sets=sets,
        nets=names(nets),
        networks=networks,
        random=random,
        whole=whole,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
        picture_every=picture_every,
        logs=names(log),
        expert_seed=expert_seed,
        **choice.arguments(),
        **common.arguments(reporter),
    )
    summary.print_result(result)


@app.command
def train_experts(
    source: str,
    *,
    choice: Choice = _CHOICE,
    only: str | None = None,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Train the expert trajectories that a recipe needs and the cache lacks.

    Args:
        source: see `dstill run`.
        only: numbers of the experts to train, joined by commas, for a share of the work elsewhere.
        choice: which settings it takes.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill.api import run as commands

    reporter = common.start()
    chosen = numbers(only, "--only") or None
    real = data.load(source)
    trajectories = commands.train_experts(real, only=chosen, **choice.arguments(), **common.arguments(reporter))
    print(trajectories.summary())


@app.command
def distill(
    source: str,
    *,
    choice: Choice = _CHOICE,
    experts: Path | None = None,
    init: Path | None = None,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("distilled"),
    validate_every: Whole = 0,
    checkpoint_every: Whole = 25,
    picture_every: Whole = 0,
    log: str | None = None,
    expert_seed: Whole | None = None,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Distil one set, without evaluating it.

    Args:
        source: see `dstill run`.
        experts: folder of trajectories (default: the recipe's, trained if the cache lacks them).
        init: a distilled set to start from, instead of the recipe's initialisation.
        out: folder for the set, its picture, its metrics and its checkpoints.
        validate_every: measure on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations.
        picture_every: keep a picture of the images every so many iterations, and an animation of all; 0 for none.
        log: where metrics go besides, joined by commas: tensorboard, wandb.
        expert_seed: seed of the experts (default: --seed), for sets of other seeds from the same experts.
        choice: which settings it takes.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill.api import run as commands

    reporter = common.start()
    commands.distill(
        data.load(source, out),
        experts=experts,
        init=init,
        out=out,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
        picture_every=picture_every,
        logs=names(log),
        expert_seed=expert_seed,
        **choice.arguments(),
        **common.arguments(reporter),
    )
    print(out)
