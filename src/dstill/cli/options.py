"""Options of the command line only; `dstill.jobs.options` has those that it shares with Python. Never imports torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from dstill.errors import DstillError
from dstill.jobs.options import Executor, Flag, Machine, Seeds, Whole, names
from dstill.support.cache import cache_folder
from dstill.support.console import ConsoleReporter

if TYPE_CHECKING:
    from dstill.data.real import RealSet
    from dstill.support.ranks import Team

Set = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=True, negative="")]
Out = Annotated[Path, Parameter(name=["--out", "-o"])]
_PATIENCE = 9.0  # seconds
# The processes that torchrun has started beside this one.
TEAM: ContextVar[Team | None] = ContextVar("TEAM", default=None)
OptionalOut = Annotated[Path | None, Parameter(name=["--out", "-o"])]


@Parameter(name="*")
@dataclass(frozen=True)
class Data:
    """How the real data are read.

    Attributes:
        image_size: side in pixels to bring every image to.
        fit: how to bring it there: pad, resize or crop.
        train_fraction: share of the training images to keep; the choice does not depend on the seed.
        classes: names of the classes to keep, joined by commas.
        test_fraction: share of the training images to use for testing, for data without a test split; always the same images.
        test_split: name of the split to test on (default: test, else the one for validation).
        image_column: column of a table or list that holds the images or names their files.
        label_column: column of a table or list that holds the classes.
        skip_damaged: leave images out that cannot be read, instead of stopping.
    """

    image_size: Whole | None = None
    fit: Literal["pad", "resize", "crop"] | None = None
    train_fraction: float = 1.0
    classes: str | None = None
    test_fraction: float | None = None
    test_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    skip_damaged: Flag = False

    def load(self, source: str, common: Common, out: Path | None = None) -> RealSet:
        """Loads the data, and says on standard error what was read.

        The splits do not depend on the seed, so that no command trains on the test images of another.

        Raises:
            DstillError: see `load_real`; or `out`, the folder of results, lies inside the folder of images, so that the next
                command would read it as data.
        """
        from dstill.data.real import load_real

        folder = Path(source).expanduser()
        inside = out is not None and folder.is_dir() and out.resolve().is_relative_to(folder.resolve())
        if inside and next(folder.rglob("*.parquet"), None) is None:
            raise DstillError(f"{out} lies inside the folder of images {folder}: pass -o a folder outside it")
        options = {**vars(self), "classes": names(self.classes) or None}
        return load_real(source, progress=common.reporter(), **options)


@Parameter(name="*")
@dataclass(frozen=True)
class Common:
    """How a command behaves.

    Attributes:
        seed: determines everything random.
        quiet: print the result only.
        debug: show the traceback of an error.
    """

    seed: Whole = 0
    quiet: bool = False
    debug: bool = False

    def arguments(self, machine: Machine, expert_seed: int | None = None) -> dict[str, Any]:
        """Arguments of the public functions: the seed, the machine with all its cores, and whether progress is shown.

        Raises:
            DstillError: this machine has no such device. It is refused before any data are read.
        """
        from dstill.support.devices import resolve_device

        resolve_device(machine.device)
        if (team := TEAM.get()) is not None:
            team.meet_in(cache_folder(machine.cache))
            machine = replace(machine, workers=team)
        seed = self.seed if expert_seed is None else Seeds(self.seed, expert_seed)
        machine = replace(machine, workers="auto") if machine.workers is None else machine
        return {"seed": seed, "machine": machine, "progress": self.reporter()}

    def reporter(self) -> ConsoleReporter:
        """Shows progress on standard error, unless the command is to be quiet."""
        return ConsoleReporter(sys.stderr, quiet=self.quiet, patience=_PATIENCE)


@Parameter(name="*")
@dataclass(frozen=True)
class Choice:
    """Which settings a command takes.

    Attributes:
        method: a name of `dstill ls methods` or your package.module:Class (default ast).
        ipc: synthetic images per class (default 1).
        recipe: name of `dstill ls recipes`, a YAML file, or `smoke`.
        net: network instead of the recipe's: a name of `dstill ls networks`, timm:NAME, or your package.module:Class.
        changes: section.key=value, for example `--set distill.iterations=300 experts.count=4`.
    """

    method: str | None = None
    ipc: Whole | None = None
    recipe: str | None = None
    net: str | None = None
    changes: Set = ()

    def arguments(self) -> dict[str, Any]:
        return dict(vars(self))


@Parameter(name="*")
@dataclass(frozen=True)
class Rows:
    """Where the rows of a table run.

    Attributes:
        executor: make each row a job, of Slurm or of this machine (local).
        executor_option: NAME=VALUE for submitit, for example timeout_min=120 slurm_partition=gpu gpus_per_node=1.
    """

    executor: Literal["slurm", "local"] | None = None
    executor_option: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = ()

    def chosen(self) -> Executor | None:
        """The executor with its options; None if there is none.

        Raises:
            DstillError: there are options without an executor, or one is not NAME=VALUE.
        """
        from dstill.config import yamls

        options = assignments(self.executor_option, "--executor-option")
        if self.executor is None:
            if options:
                raise DstillError("--executor-option needs --executor slurm or local")
            return None
        return Executor(self.executor, {name: yamls.parse(value, name) for name, value in options.items()})


def numbers(text: str | None, option: str) -> list[int]:
    """Whole numbers, separated by commas.

    Raises:
        DstillError: the text is something else; names the option.
    """
    try:
        return [int(number) for number in names(text)]
    except ValueError as error:
        raise DstillError(f"{option} takes numbers joined by commas, got {text!r}") from error


def assignments(texts: Sequence[str], option: str) -> dict[str, str]:
    """NAME=VALUE as a mapping.

    Raises:
        DstillError: there is no equals sign; names the option.
    """
    pairs = [text.partition("=") for text in texts]
    for name, sign, value in pairs:
        if not (name and sign and value):
            raise DstillError(f"{option} takes NAME=VALUE, got {name + sign + value!r}")
    return {name: value for name, _, value in pairs}
