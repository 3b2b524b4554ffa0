"""Commands that measure, compare, plan and reproduce."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from dstill.cli.app import app
from dstill.cli.options import Choice, Common, Data, Set, Whole, assignments, names, numbers

_DATA, _COMMON, _CHOICE = Data(), Common(), Choice()


@app.command
def evaluate(
    distilled: Path,
    source: str,
    *,
    protocol: str | None = None,
    nets: str | None = None,
    networks: Whole | None = None,
    augmentation: str | None = None,
    hard: Annotated[bool, Parameter(negative="")] = False,
    random: bool = True,
    whole: bool = False,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Train fresh networks on a distilled set and measure them once on the whole test set.

    Args:
        distilled: distilled.safetensors or its folder.
        source: see `dstill run`.
        protocol: ast, mtt, frepo, quick, or a YAML file (default: the recipe's).
        nets: evaluation networks, joined by commas, for example convnet,resnet18,vgg11,alexnet.
        networks: fresh networks (default: the protocol's).
        augmentation: DSA operations joined by _, or none (default: the set's own).
        hard: train on the most likely class of soft labels.
        random: also measure random real images.
        whole: also train on the whole training set.
        out: folder or file for result.json.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill.api import evaluate as evaluating
    from dstill.artifacts.distilled import DistilledSet
    from dstill.cli import summary

    reporter, one = common.start(), DistilledSet.load(distilled)
    one = one.with_hard_labels() if hard else one
    result = evaluating.evaluate(
        one.with_augmentation(augmentation) if augmentation else one,
        data.load(source),
        protocol=protocol,
        nets=names(nets),
        networks=networks,
        random=random,
        whole=whole,
        out=out,
        **common.arguments(reporter),
    )
    summary.print_result(result)


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
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Ask what a set owes to its images, its labels, its augmentation and its network.

    Args:
        distilled: distilled.safetensors or its folder.
        source: see `dstill run`.
        nets: evaluation networks, joined by commas.
        augmentations: DSA strategies, joined by commas (default: the set's own, and none).
        protocol: ast, mtt, frepo, quick, or a YAML file (default: the recipe's).
        networks: fresh networks a row (default: the protocol's).
        whole: also train on the whole training set, for each network and augmentation.
        out: folder for judgement.json and judgement.md.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill.api import judge as judging
    from dstill.cli import summary

    reporter = common.start()
    judgement = judging.judge(
        distilled,
        data.load(source),
        nets=names(nets),
        augmentations=names(augmentations),
        protocol=protocol,
        networks=networks,
        whole=whole,
        out=out,
        **common.arguments(reporter),
    )
    summary.print_judgement(judgement)


@app.command
def plan(
    source: str,
    *,
    choice: Choice = _CHOICE,
    sets: Whole = 1,
    nets: str | None = None,
    networks: Whole | None = None,
    random: bool = True,
    whole: bool = False,
    validate_every: Whole = 0,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Say what `dstill run` with the same options would take: time, memory and disk, stage by stage.

    Args:
        source: see `dstill run`; data of a known name that are not embedded are not loaded for this.
        sets: synthetic sets to distil and evaluate.
        nets: evaluation networks, joined by commas.
        networks: fresh networks a set (default: the protocol's).
        random: also measure random real images.
        whole: also train on the whole training set.
        validate_every: measure on the validation part every so many iterations; 0 for never.
        choice: which settings it takes.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill.cli import summary
    from dstill.data.catalog import DATASETS
    from dstill.planning import plan as planning

    reporter = common.start()
    known = source in DATASETS and DATASETS[source].hub and data == _DATA
    summary.print_plan(
        planning.plan(
            source if known else data.load(source),
            sets=sets,
            nets=names(nets),
            networks=networks,
            random=random,
            whole=whole,
            validate_every=validate_every,
            **choice.arguments(),
            **common.arguments(reporter),
        )
    )


@app.command
def compare(
    source: str,
    *,
    methods: str | None = None,
    ipc: str = "1",
    recipe: str | None = None,
    changes: Set = (),
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    sets: Whole = 1,
    networks: Whole | None = None,
    protocol: str = "ast",
    whole: bool = True,
    checkpoint_every: Whole = 25,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Run several methods and put them in one table. Interrupted, the same command continues. The exit code is 1 if a
    row failed.

    Args:
        source: see `dstill run`.
        methods: names of `dstill ls methods`, joined by commas (default: all).
        ipc: synthetic images per class: one number, or several joined by commas.
        recipe: smoke for runs of seconds (default: each method's own).
        changes: section.key=value for every row, for example `--set net.width=32`.
        out: folder of the table and of a run for each row (default runs/DATA-compare-seedS).
        sets: synthetic sets a row.
        networks: fresh networks a set (default: the protocol's).
        protocol: ast, mtt, frepo, quick, or a YAML file, for every row.
        whole: also train on the whole training set.
        checkpoint_every: store the state every so many iterations.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill.api import compare as comparing
    from dstill.cli import summary

    reporter = common.start()
    comparison = comparing.compare(
        data.load(source, out or Path("runs")),
        methods=names(methods),
        ipc=numbers(ipc, "--ipc"),
        recipe=recipe,
        changes=changes,
        out=out,
        sets=sets,
        networks=networks,
        protocol=protocol,
        whole=whole,
        checkpoint_every=checkpoint_every,
        **common.arguments(reporter),
    )
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
    sets: Whole | None = None,
    plan: Annotated[bool, Parameter(name="--plan", negative="")] = False,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("results"),
    runs: Path = Path("runs/reproduce"),
    checkpoint_every: Whole = 25,
    common: Common = _COMMON,
) -> None:
    """Work out a table or figure of the paper, ours beside the published figures. Interrupted, the same command continues.

    Args:
        what: table1 to table8, fig3 to fig11 (`dstill ls reproductions`).
        scale: smoke: seconds on the digits; cpu: hours on a few cores; gpu: minutes a row on a large card (table3, fig6);
            paper: as published.
        source: NAME=SOURCE for data that are not to be taken from the hub, for example cifar10=data/cifar10-*.parquet.
        only: names of rows to run, joined by commas; the others are shown if they are there.
        sets: distilled sets a row (default: the scale's number); a later call with more goes on from those that are there.
        plan: say what it would take if nothing were there yet, and stop.
        out: folder of results.
        runs: folder of run folders, shared by all reproductions.
        checkpoint_every: store the state every so many iterations.
        common: where and how the command runs.
    """
    from dstill.cli import summary
    from dstill.reproductions import run as reproducing

    reporter = common.start()
    if plan:
        planned = reproducing.plan_reproduction(
            what, scale=scale, only=names(only), sets=sets, device=common.device, cache=common.cache, workers=common.workers
        )
        summary.print_plan(planned)
        return
    folder = reproducing.reproduce(
        what,
        scale=scale,
        sources=assignments(source, "--source"),
        only=names(only),
        sets=sets,
        out=out,
        runs=runs,
        checkpoint_every=checkpoint_every,
        **common.arguments(reporter),
    )
    print(folder / "page.md")


@app.command
def tune(
    source: str,
    *,
    budget: float,
    choice: Choice = _CHOICE,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Search lr_images, T+ and α₀ on the validation part, and write a recipe file.

    Args:
        source: see `dstill run`.
        budget: minutes.
        out: recipe file to write.
        choice: which settings it takes.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill.api import tune as tuning

    reporter = common.start()
    real = data.load(source)
    print(
        tuning.tune(
            real,
            budget=budget,
            out=out,
            **choice.arguments(),
            **common.arguments(reporter),
        )
    )
