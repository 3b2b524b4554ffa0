"""What `dstill show` says about a file or folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.artifacts.pictures import save_grid
from dstill.artifacts.record import RESULT_NAME
from dstill.artifacts.result import Result
from dstill.cli.drawing import Drawing, can_draw
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories


def describe(path: Path) -> str:
    """A few lines on a distilled set, a run folder, a folder of experts or a result.

    Raises:
        DstillError: the path is none of them.
    """
    if path.is_dir():
        if (path / RESULT_NAME).exists():
            # The folder may hold further sets of an earlier run.
            folders = [path / f"set-{k}" for k in range(Result.load(path / RESULT_NAME).sets)]
            sets = [_distilled(folder) for folder in folders if (folder / FILE_NAME).exists()]
            return "\n".join([_result(path / RESULT_NAME), *sets])
        if (path / FILE_NAME).exists():
            return _distilled(path)
        if any(path.glob("expert-*.safetensors")):
            return Trajectories(path).summary()
        finished = [folder for folder in sorted(path.glob("set-*")) if (folder / FILE_NAME).exists()]
        if finished:
            return "\n".join(_distilled(folder) for folder in finished)
        raise DstillError(f"{path} holds no distilled set, no experts and no result")
    return _result(path) if path.suffix == ".json" else _distilled(path)


def write_picture(path: Path, png: Path, *, stored: bool = False) -> None:
    """The images of a set, or of the first set of a run folder, as a PNG; the stored ones, or what they hold."""
    first = path / "set-0"
    save_grid(DistilledSet.load(first if first.is_dir() else path), png, stored=stored)


def print_drawing(path: Path, *, stored: bool = False) -> None:
    """Draws the images of a set, or of the first set of a run folder, if there are some and the terminal has colours."""
    console = Console(highlight=False)
    folder = path / "set-0" if (path / "set-0" / FILE_NAME).exists() else path
    if can_draw(console) and (path.suffix == ".safetensors" or (folder / FILE_NAME).exists()):
        console.print(Drawing(DistilledSet.load(folder), stored=stored))


def _distilled(path: Path) -> str:
    one = DistilledSet.load(path)
    labels = "hard labels"
    if one.labels.is_floating_point():
        labels = f"soft labels that give their most likely class {one.labels.softmax(1).amax(1).mean():.0%} on average"
    shape = "x".join(str(side) for side in one.images.shape[1:])
    shape += f" with {one.parts}x{one.parts} parts" if one.parts > 1 else ""
    rate = f"{one.alpha:.4g}" if one.alpha else "of the protocol"
    lines = [
        f"{path}: {one.data} distilled by {one.method}, {one.ipc} image(s) of each of {one.classes} classes, {shape}, {labels}",
        f"  learning rate {rate}, augmentation {one.augmentation}, {one.preprocess.kind} inputs",
    ]
    if one.accuracy:
        lines.append(f"  accuracy {one.accuracy}")
    return "\n".join(lines)


def _result(path: Path) -> str:
    result = Result.load(path)
    lines = [f"{path}: {result.method} on {result.data}, IPC {result.ipc}, {result.measured_on} accuracy {result.accuracy}"]
    if result.random:
        lines.append(f"  random real images {result.random}")
    if result.whole:
        lines.append(f"  whole training set {result.whole}")
    return "\n".join(lines)
