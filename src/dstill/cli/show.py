"""What `dstill show` says about a file or folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dstill.artifacts import set_file, whitening
from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.artifacts.pictures import save_grid
from dstill.artifacts.record import RESULT_NAME
from dstill.artifacts.result import Result
from dstill.artifacts.whitening import MissingWhitening
from dstill.cli.drawing import Drawing, can_draw
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories
from dstill.support.cache import cache_folder
from dstill.support.console import set_sizes


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


def write_picture(path: Path, png: Path, *, real: RealSet | None = None, stored: bool = False) -> None:
    """The images of a set, or of the only set of a run, as a PNG; the stored ones, or what they hold."""
    one = set_file.read(path)
    save_grid(one if real is None else whitening.completed(one, real, cache_folder()), png, stored=stored)


def print_drawing(path: Path, *, real: RealSet | None = None, stored: bool = False) -> None:
    """Draws the images of a set, or of the first set of a run folder, if there are some and the terminal has colours."""
    console = Console(highlight=False)
    if not can_draw(console):
        return
    folder = path / "set-0" if (path / "set-0" / FILE_NAME).exists() else path
    file = folder / FILE_NAME if folder.is_dir() else set_file.located(folder)
    if file.suffix == ".safetensors" and file.exists():
        one = set_file.read(file)
        one = one if real is None else whitening.completed(one, real, cache_folder())
        if not isinstance(one.preprocess, MissingWhitening):
            console.print(Drawing(one, stored=stored))


def _distilled(path: Path) -> str:
    file = set_file.located(path)
    one = set_file.read(file)
    labels = "hard labels"
    if one.labels.is_floating_point():
        labels = f"soft labels that give their most likely class {one.labels.softmax(1).amax(1).mean():.0%} on average"
    shape = "x".join(str(side) for side in one.images.shape[1:])
    shape += f" with {one.parts}x{one.parts} parts" if one.parts > 1 else ""
    rate = f"{one.alpha:.4g}" if one.alpha else "of the protocol"
    lines = [
        f"{path}: {one.data} distilled by {one.method}, {one.ipc} image(s) of each of {one.classes} classes, {shape}, {labels}",
        f"  learning rate {rate}, augmentation {one.augmentation}, {one.preprocess.kind} inputs, network {_network(one)}",
        f"  {set_sizes(one.stored_bytes, file.stat().st_size)}",
    ]
    if one.accuracy:
        lines.append(f"  accuracy {one.accuracy}")
    if isinstance(one.preprocess, MissingWhitening):
        lines.append(f"  {one.preprocess}")
    return "\n".join(lines)


def _network(one: DistilledSet) -> str:
    options = one.net.model_dump(exclude={"name"}, exclude_none=True)
    return one.net.name + (f" ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else "")


def _result(path: Path) -> str:
    result = Result.load(path)
    lines = [f"{path}: {result.method} on {result.data}, IPC {result.ipc}, {result.measured_on} accuracy {result.accuracy}"]
    if result.random:
        lines.append(f"  random real images {result.random}")
    if result.whole:
        lines.append(f"  whole training set {result.whole}")
    return "\n".join(lines)
