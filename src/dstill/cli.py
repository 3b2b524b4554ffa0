"""The command line: every command is the public function of the same name. Importing this never imports torch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from dstill.errors import DstillError
from dstill.options import Choice, Common, Data, Set, assignments, names, numbers
from dstill.version import __version__

app = App(
    name="dstill",
    version=__version__,
    help="Dataset distillation: a large labelled image set in, a tiny synthetic one out.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # `main` answers it
)

_DATA, _COMMON, _CHOICE = Data(), Common(), Choice()


@app.command
def run(
    source: str,
    *,
    choice: Choice = _CHOICE,
    out: Annotated[Path | None, Parameter(name=["--out", "-o"])] = None,
    sets: int = 1,
    nets: str | None = None,
    networks: int | None = None,
    whole: bool = False,
    validate_every: int = 0,
    checkpoint_every: int = 25,
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
        whole: also train on the whole training set.
        validate_every: measure on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations.
        choice: which settings it takes.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill import commands, summary

    reporter = common.start()
    result = commands.run(
        data.load(source, common.seed),
        out=out,
        sets=sets,
        nets=names(nets),
        networks=networks,
        whole=whole,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
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
    from dstill import commands

    reporter = common.start()
    chosen = numbers(only, "--only") or None
    real = data.load(source, common.seed)
    trajectories = commands.train_experts(real, only=chosen, **choice.arguments(), **common.arguments(reporter))
    print(trajectories.summary())


@app.command
def distill(
    source: str,
    *,
    choice: Choice = _CHOICE,
    experts: Path | None = None,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("distilled"),
    validate_every: int = 0,
    checkpoint_every: int = 25,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Distil one set, without evaluating it.

    Args:
        source: see `dstill run`.
        experts: folder of trajectories (default: the recipe's, trained if the cache lacks them).
        out: folder for the set, its picture, its metrics and its checkpoints.
        validate_every: measure on the validation part every so many iterations; 0 for never.
        checkpoint_every: store the state every so many iterations.
        choice: which settings it takes.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill import commands

    reporter = common.start()
    commands.distill(
        data.load(source, common.seed),
        experts=experts,
        out=out,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
        **choice.arguments(),
        **common.arguments(reporter),
    )
    print(out)


@app.command
def evaluate(
    distilled: Path,
    source: str,
    *,
    protocol: str | None = None,
    nets: str | None = None,
    networks: int | None = None,
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
        protocol: ast, mtt, quick, or a YAML file (default: the recipe's).
        nets: evaluation networks, joined by commas, for example convnet,resnet18,vgg11,alexnet.
        networks: fresh networks (default: the protocol's).
        random: also measure random real images.
        whole: also train on the whole training set.
        out: folder or file for result.json.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill import evaluating, summary

    reporter = common.start()
    result = evaluating.evaluate(
        distilled,
        data.load(source, common.seed),
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
def plan(
    source: str,
    *,
    choice: Choice = _CHOICE,
    sets: int = 1,
    nets: str | None = None,
    networks: int | None = None,
    whole: bool = False,
    validate_every: int = 0,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Say what `dstill run` with the same options would take: time, memory and disk, stage by stage.

    Args:
        source: see `dstill run`; data of a known name that are not embedded are not loaded for this.
        sets: synthetic sets to distil and evaluate.
        nets: evaluation networks, joined by commas.
        networks: fresh networks a set (default: the protocol's).
        whole: also train on the whole training set.
        validate_every: measure on the validation part every so many iterations; 0 for never.
        choice: which settings it takes.
        data: how the real data are read.
        common: where and how the command runs.
    """
    from dstill import planning, summary
    from dstill.data.catalog import DATASETS

    reporter = common.start()
    known = source in DATASETS and DATASETS[source].hub and data == _DATA
    summary.print_plan(
        planning.plan(
            source if known else data.load(source, common.seed),
            sets=sets,
            nets=names(nets),
            networks=networks,
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
    sets: int = 1,
    networks: int | None = None,
    protocol: str = "ast",
    whole: bool = True,
    checkpoint_every: int = 25,
    data: Data = _DATA,
    common: Common = _COMMON,
) -> None:
    """Run several methods and put them in one table. Interrupted, the same command continues.

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
    from dstill import comparing, summary

    reporter = common.start()
    comparison = comparing.compare(
        data.load(source, common.seed),
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


@app.command
def reproduce(
    what: str,
    *,
    scale: Literal["smoke", "cpu", "paper"] = "smoke",
    source: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    only: str | None = None,
    plan: Annotated[bool, Parameter(name="--plan", negative="")] = False,
    out: Annotated[Path, Parameter(name=["--out", "-o"])] = Path("results"),
    runs: Path = Path("runs/reproduce"),
    checkpoint_every: int = 25,
    common: Common = _COMMON,
) -> None:
    """Work out a table or figure of the paper, ours beside the published figures. Interrupted, the same command continues.

    Args:
        what: table1 to table8, fig3 to fig11 (`dstill ls reproductions`).
        scale: smoke: seconds on the digits; cpu: hours on a few cores; paper: as published.
        source: NAME=SOURCE for data that are not to be taken from the hub, for example cifar10=data/cifar10-*.parquet.
        only: names of rows to run, joined by commas; the others are shown if they are there.
        plan: say what it would take if nothing were there yet, and stop.
        out: folder of results.
        runs: folder of run folders, shared by all reproductions.
        checkpoint_every: store the state every so many iterations.
        common: where and how the command runs.
    """
    from dstill import reproducing, summary

    reporter = common.start()
    if plan:
        planned = reproducing.plan_reproduction(what, scale=scale, only=names(only), device=common.device, cache=common.cache)
        summary.print_plan(planned)
        return
    folder = reproducing.reproduce(
        what,
        scale=scale,
        sources=assignments(source, "--source"),
        only=names(only),
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
    from dstill import tuning

    reporter = common.start()
    real = data.load(source, common.seed)
    print(
        tuning.tune(
            real,
            budget=budget,
            out=out,
            **choice.arguments(),
            **common.arguments(reporter),
        )
    )


@app.command
def show(path: Path, *, png: Path | None = None) -> None:
    """Say what a file or folder of dstill is.

    Args:
        path: a distilled set, a run folder, a folder of experts, or a result.json.
        png: write the distilled images as a picture.
    """
    from dstill import showing

    print(showing.describe(path))
    if png is not None:
        showing.write_picture(path, png)
        print(f"pictures: {png}")


@app.command
def ls(
    kind: Literal["methods", "networks", "datasets", "recipes", "protocols", "reproductions"],
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """List what dstill knows by name.

    Args:
        kind: what to list.
        as_json: print a JSON list of objects.
    """
    from dstill import listing

    print(json.dumps(listing.rows(kind), indent=2) if as_json else "\n".join(listing.table(kind)))


def main() -> None:
    """Entry point: one sentence instead of a traceback for whatever the user can put right."""
    debug = "--debug" in sys.argv
    try:
        app()
    except DstillError as error:
        if debug:
            raise
        print(f"dstill: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ndstill: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
