"""Options that several commands of the command line share. Importing this never imports torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter, Token

from dstill.errors import DstillError
from dstill.support.console import ConsoleReporter

if TYPE_CHECKING:
    from dstill.data.real import RealSet


def _whole(_: type, tokens: Sequence[Token]) -> int:
    """Cyclopts would round 1.5."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not a whole number") from None


def _auto_or_whole(hint: type, tokens: Sequence[Token]) -> int | str:
    return "auto" if tokens[0].value == "auto" else _whole(hint, tokens)


Whole = Annotated[int, Parameter(converter=_whole)]
Processes = Annotated[int | Literal["auto"], Parameter(converter=_auto_or_whole)]
Set = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=True, negative="")]


@Parameter(name="*")
@dataclass(frozen=True)
class Data:
    """How the real data are read.

    Attributes:
        image_size: side in pixels to bring every image to.
        fit: how: pad, resize or crop.
        train_fraction: share of the training images to keep; which ones does not depend on the seed.
        classes: names of the classes to keep, joined by commas.
        test_fraction: cut this share off the training images, for data that has no test split; always the same images.
    """

    image_size: Whole | None = None
    fit: Literal["pad", "resize", "crop"] | None = None
    train_fraction: float = 1.0
    classes: str | None = None
    test_fraction: float | None = None

    def load(self, source: str, out: Path | None = None) -> RealSet:
        """The data, the same whatever the seed of the command: what one judges, another must not have trained on.

        Raises:
            DstillError: see `load_real`; or `out`, where results will go, lies inside a folder of images, of which it would be
                a part the next time.
        """
        from dstill.data.real import load_real

        folder = Path(source).expanduser()
        inside = out is not None and folder.is_dir() and out.resolve().is_relative_to(folder.resolve())
        if inside and next(folder.rglob("*.parquet"), None) is None:
            raise DstillError(f"{out} lies inside the images' folder {folder}: pass -o a folder outside it")
        return load_real(
            source,
            image_size=self.image_size,
            fit=self.fit,
            train_fraction=self.train_fraction,
            classes=names(self.classes) or None,
            test_fraction=self.test_fraction,
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
        deterministic: ask torch for deterministic algorithms, and be warned of operations that have none; on a CPU the same
            seed and threads give the same bits without it.
        quiet: print the result only.
        debug: show the traceback of an error.
    """

    seed: Whole = 0
    device: str = "auto"
    cache: Path | None = None
    threads: Whole | None = None
    workers: Processes = "auto"
    deterministic: Annotated[bool, Parameter(negative="")] = False
    quiet: bool = False
    debug: bool = False

    def start(self) -> ConsoleReporter:
        if self.threads is not None:
            if self.threads < 1:
                raise DstillError(f"--threads must be at least 1, got {self.threads}")
            import torch

            torch.set_num_threads(self.threads)
        if self.deterministic:
            from dstill.support.devices import ask_for_determinism

            ask_for_determinism()
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
    ipc: Whole | None = None
    recipe: str | None = None
    net: str | None = None
    changes: Set = ()

    def arguments(self) -> dict[str, Any]:
        return dict(vars(self))


def names(text: str | None) -> list[str]:
    """What stands between commas."""
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def numbers(text: str | None, option: str) -> list[int]:
    """Whole numbers between commas.

    Raises:
        DstillError: something else stands there; names the option.
    """
    try:
        return [int(number) for number in names(text)]
    except ValueError as error:
        raise DstillError(f"{option} takes numbers joined by commas, got {text!r}") from error


def assignments(texts: tuple[str, ...], option: str) -> dict[str, str]:
    """NAME=VALUE as a mapping.

    Raises:
        DstillError: no equals sign; names the option.
    """
    pairs = [text.partition("=") for text in texts]
    for name, sign, value in pairs:
        if not (name and sign and value):
            raise DstillError(f"{option} takes NAME=VALUE, got {name + sign + value!r}")
    return {name: value for name, _, value in pairs}
