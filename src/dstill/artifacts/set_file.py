"""The file of a distilled set: what it holds, where it lies, and how it is written and read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dstill.artifacts import files, whitening
from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.artifacts.eight_bits import EightBits
from dstill.artifacts.ready import ready_file, ready_names
from dstill.artifacts.result import Claim
from dstill.artifacts.whitening import MissingWhitening
from dstill.config.registry import known
from dstill.config.settings import NetConfig, Recipe, canonical
from dstill.data import preprocess as preprocessing
from dstill.data import siamese
from dstill.data.preprocess import ZCA, Preprocess
from dstill.errors import DstillError
from dstill.support.cache import cache_folder

KIND = "distilled set"
_PREPROCESS = "preprocess."
_WHITENING = "whitening"
_RANGE = ("images.low", "images.high")  # of images in 8 bits
# The file formats from which on readers know that an image may hold several, that a whitening may lie elsewhere, and that
# images may have 8 bits.
_PARTS_SINCE, _WHITENING_SINCE, _EIGHT_BITS_SINCE = 2, 3, 4


class _Header(BaseModel):
    """The parts of a file's header that describe the set. Other parts, such as the format, are checked elsewhere."""

    model_config = ConfigDict(strict=True)

    method: str
    ipc: Annotated[int, Field(ge=1)]
    class_names: Annotated[list[str], Field(min_length=1)]
    preprocess: str
    whitening: Annotated[str, Field(pattern=r"^[0-9A-Za-z-]{1,64}$")] | None = None  # becomes part of a file's name
    augmentation: str
    net: NetConfig
    data: str
    data_fingerprint: str
    recipe: Recipe | None
    seed: int
    accuracy: Claim | None
    parts: Annotated[int, Field(ge=1)] = 1


def located(path: str | Path) -> Path:
    """The file of a set.

    Args:
        path: the file, its folder, the folder of a run that holds one set, or the name of a set that ships with the package.
            A path comes before a name.

    Raises:
        DstillError: the folder holds no set, or several.
    """
    source = Path(path)
    if not source.exists() and str(path) in ready_names():
        return ready_file(str(path))
    if not source.is_dir() or (source / FILE_NAME).exists():
        return source / FILE_NAME if source.is_dir() else source
    sets = sorted(source.glob(f"set-*/{FILE_NAME}"), key=lambda file: (len(file.parent.name), file.parent.name))
    if len(sets) > 1:
        raise DstillError(
            f"{source} is the folder of a run with {len(sets)} sets: pass one of {', '.join(str(one.parent) for one in sets)}"
        )
    return sets[0] if sets else source / FILE_NAME


def _folders(file: Path) -> list[Path]:
    """Where the whitening of a set may lie: beside it, in the folder of its run, in the cache."""
    return [file.parent, file.parent.resolve().parent, whitening.cached_in(cache_folder())]


def _home(file: Path) -> Path:
    """Where a whitening is put that lies nowhere yet: in the folder of the run, whose sets share it, or beside the set."""
    folder = file.parent.resolve()
    return folder.parent if folder.name.startswith("set-") else folder


def save(distilled: DistilledSet, path: str | Path, *, whole: bool = False) -> Path:
    """Writes a set; see `DistilledSet.save`."""
    target = _target(distilled, path)
    if whole:
        tensors(distilled)  # a whitening that is missing is noticed before anything is written
    elif isinstance(distilled.preprocess, ZCA):
        whitening.keep(distilled.preprocess, _home(target), _folders(target))
    files.save(target, KIND, *_contents(distilled, whole=whole), since=_since(distilled, whole=whole))
    return target


def save_compact(distilled: DistilledSet, path: str | Path) -> Path:
    """Writes a set into a file as small as can be: images in 8 bits over the range of each channel, without the whitening.

    Args:
        distilled: the set.
        path: a file whose name ends in .safetensors, or a folder for `distilled.safetensors`.

    Returns:
        The file.

    Raises:
        DstillError: images, labels or α are not finite; the file holds a set with exact images, which would be lost; or the
            whitening was fitted on data that nobody knows, so that it could not be fitted again.
    """
    target = _target(distilled, path)
    if target.exists() and _holds_exact_images(target):
        raise DstillError(f"{target} holds a set with exact images, which would be lost: pass another folder")
    if isinstance(distilled.preprocess, ZCA) and not distilled.preprocess.fingerprint:
        raise DstillError("the whitening of this set is not that of known data, and could not be fitted again: export dstill")
    exact, said = _contents(distilled, whole=False)
    eight = EightBits.of(distilled.images)
    contents = exact | dict(zip(("images", *_RANGE), (eight.content, eight.low, eight.high), strict=True))
    files.save(target, KIND, contents, said, since=_EIGHT_BITS_SINCE)
    return target


def _holds_exact_images(path: Path) -> bool:
    with files.opened(path, None) as (_, file):
        return "images" in file.keys() and file.get_slice("images").get_dtype() != "U8"  # noqa: SIM118 (not a mapping)


def _target(distilled: DistilledSet, path: str | Path) -> Path:
    """The file that a set is written to, once it is known to hold numbers only."""
    wrong = not_finite(distilled)
    if wrong:
        raise DstillError(f"the distilled set has non-finite {', '.join(wrong)} and is not saved: the run has diverged")
    target = Path(path)
    return target if target.suffix == ".safetensors" else target / FILE_NAME


def size(distilled: DistilledSet, *, whole: bool = False) -> int:
    """Bytes of the file that `save` writes."""
    return files.size(KIND, *_contents(distilled, whole=whole), since=_since(distilled, whole=whole))


def _contents(distilled: DistilledSet, *, whole: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the header of the file."""
    preprocess, said = distilled.preprocess, header(distilled)
    if isinstance(preprocess, ZCA):
        said[_WHITENING] = whitening.fingerprint_of(preprocess)
    elif isinstance(preprocess, MissingWhitening):
        said[_WHITENING] = preprocess.fingerprint
    return (_own(distilled) if _lies_elsewhere(distilled, whole=whole) else tensors(distilled)), said


def _lies_elsewhere(distilled: DistilledSet, *, whole: bool) -> bool:
    return distilled.preprocess.kind == ZCA.kind and not whole


def _since(distilled: DistilledSet, *, whole: bool) -> int:
    if _lies_elsewhere(distilled, whole=whole):
        return _WHITENING_SINCE
    return _PARTS_SINCE if distilled.parts > 1 else 1


def not_finite(distilled: DistilledSet) -> list[str]:
    """Names of the tensors that hold a number that is not finite."""
    missing = isinstance(distilled.preprocess, MissingWhitening)
    found = _own(distilled) if missing else tensors(distilled)
    return [name for name, tensor in found.items() if not bool(torch.isfinite(tensor).all())]


def _own(distilled: DistilledSet) -> dict[str, Tensor]:
    found = {"images": distilled.images, "labels": distilled.labels}
    return found | ({"alpha": torch.tensor(distilled.alpha, dtype=torch.float64)} if distilled.alpha is not None else {})


def tensors(distilled: DistilledSet) -> dict[str, Tensor]:
    """All tensors of a set, those of its preprocessing included, by their names in files."""
    return _own(distilled) | {_PREPROCESS + name: tensor for name, tensor in distilled.preprocess.tensors().items()}


def header(distilled: DistilledSet) -> dict[str, Any]:
    """Everything except the tensors, as plain JSON values. A set without parts does not mention them."""
    said: dict[str, Any] = {
        "method": distilled.method,
        "ipc": distilled.ipc,
        "class_names": list(distilled.class_names),
        "preprocess": distilled.preprocess.kind,
        "augmentation": distilled.augmentation,
        "net": canonical(distilled.net, exclude_none=True),
        "data": distilled.data,
        "data_fingerprint": distilled.data_fingerprint,
        "recipe": canonical(distilled.recipe) if distilled.recipe else None,
        "seed": distilled.seed,
        "accuracy": distilled.accuracy.model_dump() if distilled.accuracy else None,
    }
    return said | ({"parts": distilled.parts} if distilled.parts > 1 else {})


def read(path: str | Path) -> DistilledSet:
    """Reads a set. If its whitening is not found, its `preprocess` is a `MissingWhitening`.

    Args:
        path: the file, its folder, or the folder of a run that holds one set.

    Raises:
        DstillError: the file does not exist, is no distilled set, is damaged, or has a newer format.
    """
    source = located(path)
    return from_contents(*files.load(source, KIND), source)


def from_contents(said: dict[str, Any], stored: dict[str, Tensor], source: Path) -> DistilledSet:
    """A set from the contents of its file.

    Args:
        said: its header.
        stored: its tensors.
        source: the file, for errors, and to find a whitening beside it.

    Raises:
        DstillError: something is missing or malformed.
    """
    if not known(said.get("method")):  # its package is not installed here, so its settings cannot be checked
        said = {**said, "recipe": None}
    try:
        about = _Header.model_validate(said)
        one = DistilledSet(
            images=_images(stored),
            labels=stored["labels"],
            alpha=float(stored["alpha"]) if "alpha" in stored else None,
            preprocess=_preprocess(about, stored, source),
            method=about.method,
            ipc=about.ipc,
            class_names=tuple(about.class_names),
            augmentation=about.augmentation,
            net=about.net,
            data=about.data,
            data_fingerprint=about.data_fingerprint,
            recipe=about.recipe,
            seed=about.seed,
            accuracy=about.accuracy,
            parts=about.parts,
        )
        siamese.parse(one.augmentation)
        missing = isinstance(one.preprocess, MissingWhitening)
        fits = missing or one.preprocess.invert(one.images[:1]).shape == one.images[:1].shape
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DstillError(f"{source} is damaged or from another version of dstill: {error}") from error
    if not fits or not_finite(one):
        raise DstillError(f"{source} is damaged: its preprocessing does not fit the images, or a number is not finite")
    return one


def _images(stored: dict[str, Tensor]) -> Tensor:
    """The images, which a file may hold in 32, 16 or 8 bits."""
    images = stored["images"]
    if images.dtype == torch.uint8:
        return EightBits(images, *(stored[name] for name in _RANGE)).pixels()
    return images.float() if images.dtype == torch.float16 else images


def _preprocess(about: _Header, stored: dict[str, Tensor], source: Path) -> Preprocess:
    """The preprocessing in the file, or the whitening that the file names."""
    inside = {name.removeprefix(_PREPROCESS): tensor for name, tensor in stored.items() if name.startswith(_PREPROCESS)}
    if about.preprocess != ZCA.kind or about.whitening is None:
        return preprocessing.from_tensors(about.preprocess, inside)
    if not inside:
        return whitening.find(about.whitening, _folders(source)) or MissingWhitening(about.whitening, about.data)
    packed = preprocessing.from_tensors(about.preprocess, inside)
    return packed.known_as(about.whitening) if isinstance(packed, ZCA) else packed
