"""Commands that measure, compare, plan and reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from dstill.cli.app import app
from dstill.cli.options import Choice, Common, Data, OptionalOut, Out, Rows, Set, assignments, numbers
from dstill.jobs.options import Budget, Evaluation, Flag, Machine, Recording, Whole, names

_DATA, _COMMON, _CHOICE = Data(), Common(), Choice()
_EVALUATION, _RECORDING, _MACHINE, _ROWS = Evaluation(), Recording(), Machine(), Rows()


@app.command
def evaluate(
    distilled: Path,
    source: str,
    *,
    protocol: str | None = None,
    evaluation: Evaluation = _EVALUATION,
    augmentation: str | None = None,
    hard: Flag = False,
    out: OptionalOut = None,
    data: Data = _DATA,
    machine: Machine = _MACHINE,
    common: Common = _COMMON,
) -> None:
    """Train fresh networks on a distilled set and measure them once on the whole test set.

    Args:
        distilled: distilled.safetensors, its folder, or the folder of a run with one set.
        source: see `dstill run`.
        protocol: ast, mtt, datm, rat, frepo, quick, or a YAML file (default: the recipe's).
        evaluation: how the set is measured.
        augmentation: DSA operations joined by _, or none (default: the set's own).
        hard: train on the most likely class of soft labels.
        out: folder or file for result.json.
        data: how the real data are read.
        machine: where the work is done.
        common: how the command behaves.
    """
    from dstill.api.evaluate import evaluate
    from dstill.artifacts import set_file
    from dstill.cli import summary

    options, one = common.arguments(machine), set_file.read(distilled)
    one = one.with_hard_labels() if hard else one
    one = one.with_augmentation(augmentation) if augmentation else one
    summary.print_result(evaluate(one, data.load(source, common), protocol=protocol, out=out, **vars(evaluation), **options))


@app.command
def judge(
    distilled: Path,
    source: str,
    *,
    nets: str | None = None,
    augmentations: str | None = None,
    protocol: str | None = None,
    networks: Whole | None = None,
    whole: bool = True,
    out: OptionalOut = None,
    data: Data = _DATA,
    machine: Machine = _MACHINE,
    common: Common = _COMMON,
) -> None:
    """Test how much of a set's accuracy comes from its images, its labels, its augmentation and its network.

    Args:
        distilled: distilled.safetensors, its folder, or the folder of a run with one set.
        source: see `dstill run`.
        nets: evaluation networks, joined by commas.
        augmentations: DSA strategies, joined by commas (default: the set's own, and none).
        protocol: ast, mtt, frepo, quick, or a YAML file (default: the recipe's).
        networks: fresh networks per row (default: the protocol's).
        whole: also train on the whole training set, for each network and augmentation.
        out: folder for judgement.json and judgement.md.
        data: how the real data are read.
        machine: where the work is done.
        common: how the command behaves.
    """
    from dstill.api.judge import judge
    from dstill.cli import summary

    options = {"protocol": protocol, "networks": networks, "whole": whole, "out": out, **common.arguments(machine)}
    real = data.load(source, common)
    summary.print_judgement(judge(distilled, real, nets=names(nets), augmentations=names(augmentations), **options))


@app.command
def leaderboard(
    distilled: Path,
    source: str,
    *,
    net: str | None = None,
    protocol: str | None = None,
    networks: Whole | None = None,
    label_weight: float = 0.5,
    augmentation_weight: float = 0.5,
    out: OptionalOut = None,
    data: Data = _DATA,
    machine: Machine = _MACHINE,
    common: Common = _COMMON,
) -> None:
    """Give a set the label-robust and the augmentation-robust score of DD-Ranking.

    Args:
        distilled: distilled.safetensors, its folder, or the folder of a run with one set.
        source: see `dstill run`.
        net: evaluation network (default: the set's own).
        protocol: ast, mtt, frepo, quick, or a YAML file (default: the recipe's).
        networks: fresh networks for each accuracy but that of the whole set (default: the protocol's).
        label_weight: from 0 to 1, how much the lead over random images counts in the label-robust score.
        augmentation_weight: from 0 to 1, how much the lead with augmentation counts in the augmentation-robust score.
        out: folder for leaderboard.json and leaderboard.md.
        data: how the real data are read.
        machine: where the work is done.
        common: how the command behaves.
    """
    from dstill.api.leaderboard import leaderboard
    from dstill.cli import summary

    weights = {"label_weight": label_weight, "augmentation_weight": augmentation_weight}
    options = {"net": net, "protocol": protocol, "networks": networks, "out": out, **weights, **common.arguments(machine)}
    summary.print_leaderboard(leaderboard(distilled, data.load(source, common), **options))


@app.command
def plan(
    source: str,
    *,
    choice: Choice = _CHOICE,
    sets: Whole = 1,
    evaluation: Evaluation = _EVALUATION,
    recording: Recording = _RECORDING,
    data: Data = _DATA,
    machine: Machine = _MACHINE,
    common: Common = _COMMON,
) -> None:
    """Estimate what `dstill run` with the same options would take: time, memory and disk, stage by stage.

    Args:
        source: see `dstill run`; data of a known name are not loaded for this, unless they are embedded.
        choice: which settings it takes.
        sets: synthetic sets to distil and evaluate.
        evaluation: how the sets are measured.
        recording: what is recorded while distilling.
        data: how the real data are read.
        machine: where the work would be done.
        common: how the command behaves.
    """
    from dstill.cli import summary
    from dstill.data.catalog import named
    from dstill.planning.plan import plan

    options = {"sets": sets, "evaluation": evaluation, "recording": recording, **common.arguments(machine)}
    entry = named(source)
    known = entry is not None and entry.hub and data == _DATA
    summary.print_plan(plan(source if known else data.load(source, common), **choice.arguments(), **options))


@app.command
def compare(
    source: str,
    *,
    methods: str | None = None,
    ipc: str = "1",
    recipe: str | None = None,
    changes: Set = (),
    out: OptionalOut = None,
    sets: Whole = 1,
    networks: Whole | None = None,
    protocol: str = "ast",
    whole: bool | None = None,
    minutes: float | None = None,
    checkpoint_every: Whole = 25,
    data: Data = _DATA,
    machine: Machine = _MACHINE,
    where: Rows = _ROWS,
    common: Common = _COMMON,
) -> None:
    """Run several methods and put them in one table.

    After an interruption, the same command resumes. The exit code is 1 if a row failed.

    Args:
        source: see `dstill run`.
        methods: names of `dstill ls methods`, joined by commas (default: all).
        ipc: synthetic images per class: one number, or several joined by commas.
        recipe: smoke for runs of seconds (default: each method's own).
        changes: section.key=value for every row, for example `--set net.width=32`.
        out: folder of the tables and of a run folder for each row (default runs/DATA-compare-seedS).
        sets: synthetic sets per row.
        networks: fresh networks per set (default: the protocol's).
        protocol: ast, mtt, frepo, quick, or a YAML file, for every row.
        whole: also train on the whole training set (default: unless there are --minutes).
        minutes: time of the whole table if one row follows another, shared equally; whatever is not set is chosen to fit.
        checkpoint_every: store the state every so many iterations.
        data: how the real data are read.
        machine: where the work is done.
        where: where the rows run.
        common: how the command behaves.
    """
    from dstill.api.compare import compare
    from dstill.cli import summary

    budget = Budget.of(minutes)  # before the data are read
    rows = {"methods": names(methods), "ipc": numbers(ipc, "--ipc"), "recipe": recipe, "changes": changes, "sets": sets}
    judging = {"networks": networks, "protocol": protocol, "whole": whole, "minutes": budget}
    options = {"executor": where.chosen(), "out": out, "checkpoint_every": checkpoint_every, **common.arguments(machine)}
    comparison = compare(data.load(source, common, out or Path("runs")), **rows, **judging, **options)  # type: ignore[arg-type]
    summary.print_comparison(comparison)
    if any(row.result is None for row in comparison.rows):
        raise SystemExit(1)


@app.command
def reproduce(
    what: str,
    *,
    scale: Literal["smoke", "cpu", "gpu", "paper"] = "smoke",
    source: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    only: str | None = None,
    cases: str | None = None,
    sets: Whole | None = None,
    plan: Annotated[bool, Parameter(name="--plan", negative="")] = False,
    out: Out = Path("results"),
    runs: Path = Path("runs/reproduce"),
    checkpoint_every: Whole = 25,
    machine: Machine = _MACHINE,
    where: Rows = _ROWS,
    common: Common = _COMMON,
) -> None:
    """Run a table or figure of the paper, or an experiment beside it, and show our figures beside the published ones.

    After an interruption, the same command resumes.

    Args:
        what: table1 to table8, fig3 to fig11, or another experiment (`dstill ls reproductions`).
        scale: smoke: seconds on the digits; cpu: hours on a few cores; gpu: minutes per row on a large card (for some);
            paper: as published.
        source: NAME=SOURCE for data that are not to be taken from the hub, for example cifar10=data/cifar10-*.parquet.
        only: names of rows to run, joined by commas; the others are shown if they exist.
        cases: the same for cases, such as cifar100-ipc10.
        sets: distilled sets per row (default: the scale's number); a later call with more makes only those that are missing.
        plan: estimate what it would take if nothing existed yet, and stop.
        out: folder of results.
        runs: folder of run folders, shared by all reproductions.
        checkpoint_every: store the state every so many iterations.
        machine: where the work is done.
        where: where the rows run.
        common: how the command behaves.
    """
    from dstill.cli import summary
    from dstill.reproductions.run import plan_reproduction, reproduce

    executor, options = where.chosen(), common.arguments(machine)
    chosen: dict[str, Any] = {"scale": scale, "only": names(only), "cases": names(cases), "sets": sets}
    if plan:
        summary.print_plan(plan_reproduction(what, **chosen, machine=options["machine"]))
        return
    sources = assignments(source, "--source")
    folders: dict[str, Any] = {"executor": executor, "out": out, "runs": runs, "checkpoint_every": checkpoint_every}
    print(reproduce(what, sources=sources, **chosen, **folders, **options) / "page.md")


@app.command
def tune(
    source: str,
    *,
    budget: float,
    choice: Choice = _CHOICE,
    out: OptionalOut = None,
    data: Data = _DATA,
    machine: Machine = _MACHINE,
    common: Common = _COMMON,
) -> None:
    """Search lr_images, T+ and α₀ on the validation part, and write a recipe file.

    Args:
        source: see `dstill run`.
        budget: minutes.
        choice: which settings it takes.
        out: recipe file to write.
        data: how the real data are read.
        machine: where the work is done.
        common: how the command behaves.
    """
    from dstill.api.tune import tune

    options = common.arguments(machine)
    print(tune(data.load(source, common), budget=budget, out=out, **choice.arguments(), **options))
