"""Commands that make sets: experts, distillation, and both with an evaluation."""

from __future__ import annotations

from pathlib import Path

from dstill.cli.app import app
from dstill.cli.options import Choice, Common, Data, OptionalOut, Out, numbers
from dstill.jobs.options import Budget, Evaluation, Machine, Recording, Whole

_DATA, _COMMON, _CHOICE = Data(), Common(), Choice()
_EVALUATION, _RECORDING, _MACHINE = Evaluation(), Recording(), Machine()


@app.command
def run(
    source: str,
    *,
    choice: Choice = _CHOICE,
    init: Path | None = None,
    out: OptionalOut = None,
    sets: Whole = 1,
    minutes: float | None = None,
    evaluation: Evaluation = _EVALUATION,
    recording: Recording = _RECORDING,
    expert_seed: Whole | None = None,
    data: Data = _DATA,
    machine: Machine = _MACHINE,
    common: Common = _COMMON,
) -> None:
    """Train experts, distil, evaluate, and print a summary. After an interruption, the same command resumes.

    Args:
        source: digits, cifar10, another name of `dstill ls datasets`, a hub id, a folder of images, or Parquet files.
        choice: which settings it takes.
        init: a distilled set to start from, instead of the recipe's initialisation.
        out: run folder (default runs/DATA-METHOD-ipcK-seedS).
        sets: synthetic sets to distil and evaluate.
        minutes: time of the whole command, evaluation included; whatever is not set is chosen to fit, the method too.
        evaluation: how the sets are measured.
        recording: what is recorded while distilling.
        expert_seed: seed of the experts (default: --seed), for sets of other seeds from the same experts.
        data: how the real data are read.
        machine: where the work is done.
        common: how the command behaves.
    """
    from dstill.api.run import run
    from dstill.cli import summary

    budget = Budget.of(minutes)  # before the data are read
    options = {
        "init": init,
        "sets": sets,
        "evaluation": evaluation,
        "recording": recording,
        **common.arguments(machine, expert_seed),
    }
    real = data.load(source, common, out or Path("runs"))
    summary.print_result(run(real, out=out, minutes=budget, **choice.arguments(), **options))


@app.command
def train_experts(
    source: str,
    *,
    choice: Choice = _CHOICE,
    only: str | None = None,
    data: Data = _DATA,
    machine: Machine = _MACHINE,
    common: Common = _COMMON,
) -> None:
    """Train the expert trajectories that a recipe needs and the cache lacks.

    Args:
        source: see `dstill run`.
        choice: which settings it takes.
        only: numbers of the experts to train, joined by commas, to split the work between machines.
        data: how the real data are read.
        machine: where the work is done.
        common: how the command behaves.
    """
    from dstill.api.run import train_experts

    chosen, options = numbers(only, "--only") or None, common.arguments(machine)
    print(train_experts(data.load(source, common), only=chosen, **choice.arguments(), **options).summary())


@app.command
def distill(
    source: str,
    *,
    choice: Choice = _CHOICE,
    experts: Path | None = None,
    init: Path | None = None,
    out: Out = Path("distilled"),
    minutes: float | None = None,
    recording: Recording = _RECORDING,
    expert_seed: Whole | None = None,
    data: Data = _DATA,
    machine: Machine = _MACHINE,
    common: Common = _COMMON,
) -> None:
    """Distil one set, without evaluating it.

    Args:
        source: see `dstill run`.
        choice: which settings it takes.
        experts: folder of trajectories (default: the recipe's, trained if the cache lacks them).
        init: a distilled set to start from, instead of the recipe's initialisation.
        out: folder for the set, its picture, its metrics and its checkpoints.
        minutes: time of the whole command; whatever is not set is chosen to fit.
        recording: what is recorded while distilling.
        expert_seed: seed of the experts (default: --seed), for sets of other seeds from the same experts.
        data: how the real data are read.
        machine: where the work is done.
        common: how the command behaves.
    """
    from dstill.api.run import distill

    budget = Budget.of(minutes)  # before the data are read
    options = {"experts": experts, "init": init, "recording": recording, **common.arguments(machine, expert_seed)}
    distill(data.load(source, common, out), out=out, minutes=budget, **choice.arguments(), **options)
    print(out)
