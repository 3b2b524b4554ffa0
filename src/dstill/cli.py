"""The command line: every command is the public function of the same name. Importing this never imports torch."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from dstill.console import ConsoleReporter
from dstill.errors import DstillError
from dstill.version import __version__

if TYPE_CHECKING:
    from dstill.data.real import RealSet

app = App(
    name="dstill",
    version=__version__,
    help="Dataset distillation: a large labelled image set in, a tiny synthetic one out.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # `main` answers it
)

Set = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=True, negative="")]


@Parameter(name="*")
@dataclass(frozen=True)
class Data:
    """How the real data are read.

    Attributes:
        image_size: side in pixels to bring every image to.
        fit: how: pad, resize or crop.
        train_fraction: share of the training images to keep.
        classes: names of the classes to keep, joined by commas.
        test_fraction: cut this share off the training images, for data that has no test split.
    """

    image_size: int | None = None
    fit: Literal["pad", "resize", "crop"] | None = None
    train_fraction: float = 1.0
    classes: str | None = None
    test_fraction: float | None = None

    def load(self, source: str, seed: int) -> RealSet:
        from dstill.data.real import load_real

        names = [name.strip() for name in self.classes.split(",")] if self.classes else None
        return load_real(
            source,
            image_size=self.image_size,
            fit=self.fit,
            train_fraction=self.train_fraction,
            classes=names,
            test_fraction=self.test_fraction,
            seed=seed,
        )


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """Where and how a command runs.

    Attributes:
        seed: decides everything random.
        device: auto, cpu, cuda or mps.
        cache: folder that keeps experts for every run ($DSTILL_CACHE, else ~/.cache/dstill).
        threads: CPU threads of distilling; the machine's cores if left out.
        workers: processes that train experts and networks at once: a number, or auto for one a core.
        quiet: print the result only.
        debug: show the traceback of an error.
    """

    seed: int = 0
    device: str = "auto"
    cache: Path | None = None
    threads: int | None = None
    workers: int | Literal["auto"] = "auto"
    quiet: bool = False
    debug: bool = False

    def start(self) -> ConsoleReporter:
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)
        return ConsoleReporter(sys.stderr, quiet=self.quiet)

    def arguments(self, reporter: ConsoleReporter) -> dict[str, Any]:
        return {"seed": self.seed, "device": self.device, "cache": self.cache, "workers": self.workers, "reporter": reporter}


@Parameter(name="*")
@dataclass(frozen=True)
class Choice:
    """Which settings a command takes.

    Attributes:
        method: a name of `dstill ls methods` (default ast).
        ipc: synthetic images per class (default 1).
        recipe: name of `dstill ls recipes`, a YAML file, or `smoke`.
        net: network instead of the recipe's: a name of `dstill ls networks` or your package.module:Class.
        changes: section.key=value, for example `--set distill.iterations=300 experts.count=4`.
    """

    method: str | None = None
    ipc: int | None = None
    recipe: str | None = None
    net: str | None = None
    changes: Set = ()

    def arguments(self) -> dict[str, Any]:
        return dict(vars(self))


_DATA, _COMMON, _CHOICE = Data(), Common(), Choice()


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def _numbers(text: str | None, option: str) -> list[int]:
    try:
        return [int(number) for number in _names(text)]
    except ValueError as error:
        raise DstillError(f"{option} takes numbers joined by commas, got {text!r}") from error


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
        nets=_names(nets),
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
    numbers = _numbers(only, "--only") or None
    real = data.load(source, common.seed)
    trajectories = commands.train_experts(real, only=numbers, **choice.arguments(), **common.arguments(reporter))
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
        nets=_names(nets),
        networks=networks,
        random=random,
        whole=whole,
        out=out,
        **common.arguments(reporter),
    )
    summary.print_result(result)


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
        methods=_names(methods),
        ipc=_numbers(ipc, "--ipc"),
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
    kind: Literal["methods", "networks", "datasets", "recipes", "protocols"],
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """List what dstill knows by name.

    Args:
        kind: what to list.
        as_json: print a JSON list of objects.
    """
    from dstill import listing

    rows = listing.rows(kind)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['note']}".rstrip())


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
