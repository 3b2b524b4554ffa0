"""Exports a distilled set: one file with everything, a Hugging Face data set folder, PNG files, arrays, or `.pt` files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstill.artifacts import card, set_file
from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.eight_bits import EightBits
from dstill.artifacts.files import atomic, check_writable, write_bytes, write_text
from dstill.artifacts.pictures import png_of, save_grid
from dstill.data.quiet import without_progress_bars
from dstill.errors import DstillError, suggest


def export(distilled: DistilledSet, kind: str, folder: str | Path, *, stored: bool = False) -> Path:
    """Writes a set to a folder, for another machine or for other programs.

    Beside every kind but `dstill` and `compact`, a `README.md` says what is kept, how real images are preprocessed, and how to
    train in plain PyTorch; `overview.webp` shows the images.

    In `dstill`, `npz`, `pt` and the column `input` of `hf` the images are exact. In `png` they are rounded to 8 bits over the
    range of each colour channel, which hardly changes what networks learn from them. In `pictures` and in the column `image` of
    `hf` they are in natural colours, clipped to what can be shown: to be looked at, not to be trained on. In `compact` the
    inputs of networks are rounded to 8 bits likewise.

    Of stored images that hold several, what they hold is written, as images of their own with their labels. The exact set
    keeps them as they are stored.

    Args:
        distilled: the set.
        kind: `dstill`: one `distilled.safetensors` that holds everything. `compact`: the same as small as can be, with images
            in 8 bits and without a whitening, which is fitted again on the real data. `hf`: a Hugging Face data set folder
            (Parquet, card, Croissant metadata). `png`: one file for each image, to be trained on, in one folder for each
            class; `labels.csv` has the labels. `pictures`: the same in natural colours. `npz`: all arrays in one file. `pt`:
            `images_best.pt`, `labels_best.pt` and `lr_best.pt`, as code for trajectory matching reads them, and
            `preprocess.pt`.
        folder: the folder to write; made if missing.
        stored: write the stored images, instead of what they hold.

    Returns:
        The folder.

    Raises:
        DstillError: the kind is unknown; the folder cannot be made; the whitening of the set was not found; for `png` and
            `pictures`, the folder holds other images; for `png`, the images have neither 1 nor 3 channels, or are stored and
            whitened and of several parts.

    Example:
        >>> import tempfile
        >>> from dstill.config.settings import NetConfig
        >>> from dstill.data.preprocess import Standardise
        >>> distilled = DistilledSet(
        ...     images=torch.zeros(2, 1, 8, 8), labels=torch.tensor([0, 1]), alpha=0.02,
        ...     preprocess=Standardise(torch.tensor([0.5]), torch.tensor([0.25])), method="dm", ipc=1,
        ...     class_names=("cat", "dog"), augmentation="flip", net=NetConfig(), data="pets", data_fingerprint="",
        ...     recipe=None, seed=0,
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(path.name for path in export(distilled, "pt", folder).glob("*.pt"))
        ['images_best.pt', 'labels_best.pt', 'lr_best.pt', 'preprocess.pt']
    """
    write(distilled, kind, folder, stored=stored)
    return Path(folder)


def write(distilled: DistilledSet, kind: str, folder: str | Path, *, stored: bool = False) -> str:
    """`export`, which returns a sentence on what is kept."""
    if kind not in KINDS:
        raise DstillError(f"unknown export {kind!r}; {suggest(kind, KINDS)}")
    if kind != "compact":
        distilled.tensors()  # a whitening that is missing is noticed before anything is written
    target, written = Path(folder), distilled if stored else distilled.decoded
    check_writable(target)
    kept = KINDS[kind](written, distilled, target)
    if kind not in ("dstill", "compact"):
        save_grid(written, target / card.OVERVIEW, stored=True)
        write_text(target / "README.md", card.readme(written, distilled, kind, kept))
    return kept


# --- one file with everything -----------------------------------------------------------------------------------------


def _export_dstill(_: DistilledSet, exact: DistilledSet, folder: Path) -> str:
    exact.save(folder, whole=True)
    return "Images, labels and preprocessing are exact, and all in one file."


def _export_compact(_: DistilledSet, exact: DistilledSet, folder: Path) -> str:
    set_file.save_compact(exact, folder)
    changed = _rounding(EightBits.of(exact.images).pixels(), exact)
    whitened = exact.preprocess.kind == "zca"
    missing = f" The whitening is not in the file: pass {exact.data} once where the set is loaded." if whitened else ""
    return f"Labels are exact. The inputs of networks are rounded by {changed}, to 8 bits.{missing}"


# --- files of 8 bits --------------------------------------------------------------------------------------------------


def _export_png(distilled: DistilledSet, exact: DistilledSet, folder: Path) -> str:
    channels = distilled.images.shape[1]
    if channels not in (1, 3):
        raise DstillError(f"the images have {channels} channels, a PNG file to train on holds 1 or 3: export npz")
    if distilled.parts > 1 and distilled.preprocess.kind == "zca":
        raise DstillError(
            "stored images of several parts cannot be whitened again, since whitening mixes the pixels of a whole image: leave "
            "--stored out, or export npz"
        )
    eight = EightBits.of(distilled.pixels(clip=False))
    paths = _images(eight.content, distilled, folder)
    write_text(folder / "labels.csv", _table(distilled, paths))
    encoding = {"pixel": "low + byte / 255 * (high - low)", "low": eight.low.tolist(), "high": eight.high.tolist()}
    write_text(folder / "encoding.json", json.dumps(encoding, indent=2) + "\n")
    exact.save(folder, whole=True)
    changed = _rounding(distilled.preprocess.forward(eight.pixels()), distilled)
    return (
        f"The PNG files are for training: 8 bits over the range of each colour channel. The inputs of networks are rounded by "
        f"{changed}; labels.csv has the labels, distilled.safetensors the exact set."
    )


def _rounding(rounded: Tensor, distilled: DistilledSet) -> str:
    """How far rounded inputs of networks lie from those of the set."""
    error = (rounded - distilled.images).square().mean().sqrt()
    share = float(error / distilled.images.square().mean().sqrt().clamp_min(1e-12))
    return f"{100 * share:.2g} % (root mean square, of their own)"


def _export_pictures(distilled: DistilledSet, _: DistilledSet, folder: Path) -> str:
    paths = _images(_shown(distilled), distilled, folder)
    return (
        f"The {len(paths)} PNG files are for looking, in natural colours; {_clipped(distilled)} Export png or npz to train on "
        "the images."
    )


def _shown(distilled: DistilledSet) -> Tensor:
    """The images in natural colours, uint8."""
    return (distilled.pixels() * 255).round().byte()


def _clipped(distilled: DistilledSet) -> str:
    natural = distilled.pixels(clip=False)
    share = float(((natural < 0) | (natural > 1)).float().mean())
    return f"{100 * share:.2g} % of their values cannot be shown and are clipped."


def _images(content: Tensor, distilled: DistilledSet, folder: Path) -> list[str]:
    """Writes one file for each image into one folder for each class. Returns their paths in the folder."""
    counts, names, files = dict[int, int](), class_folders(distilled.class_names), dict[str, bytes]()
    for image, label in zip(content, distilled.class_ids.tolist(), strict=True):
        number = counts[label] = counts.get(label, -1) + 1
        files[f"{names[label]}/{number:03d}.png"] = png_of(image)
    others = sorted({path.relative_to(folder).as_posix() for path in folder.glob("*/*.png")} - files.keys())
    if others:
        raise DstillError(f"{folder} holds other images ({others[0]}): pass another folder, or remove this one")
    for path, image in files.items():
        write_bytes(folder / path, image)
    return list(files)


def class_folders(names: tuple[str, ...]) -> list[str]:
    """Names of the folders of classes: those of the classes or, if one cannot be the name of a folder, numbered ones.

    Example:
        >>> class_folders(("n01440764", "sports car")), class_folders(("cat", "a/b"))
        (['n01440764', 'sports car'], ['000-cat', '001-a_b'])
    """
    fit = {name.lower() for name in names if _can_be_a_folder(name)}
    if len(fit) == len(names):
        return list(names)
    return [f"{c:03d}-{card.safe_name(name)}" for c, name in enumerate(names)]


def _can_be_a_folder(name: str) -> bool:
    """Whether a name can be that of a folder on every system, unchanged."""
    plain = name.isprintable() and not set(name) & set('/\\<>:"|?*')
    return plain and 0 < len(name) <= 100 and name == name.strip(" .")


def _table(distilled: DistilledSet, paths: list[str]) -> str:
    """Path, class and, for soft labels, the probability of each class (of each part, part after part), as CSV."""
    shares = _probabilities(distilled)
    columns = ["file", "label", "name", *(f"p{k}" for k in range(0 if shares is None else shares.shape[1]))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row, (path, label) in enumerate(zip(paths, distilled.class_ids.tolist(), strict=True)):
        soft = [] if shares is None else [f"{value:.9g}" for value in shares[row].tolist()]
        writer.writerow([path, label, distilled.class_names[label], *soft])
    return text.getvalue()


def _probabilities(distilled: DistilledSet) -> Tensor | None:
    """Soft labels as probabilities `[S, K]`, or `[S, parts² K]` if they belong to parts; None for class ids."""
    if not distilled.labels.is_floating_point():
        return None
    return distilled.labels.softmax(1).reshape(len(distilled.images), -1)


# --- arrays -----------------------------------------------------------------------------------------------------------


def _export_npz(distilled: DistilledSet, _: DistilledSet, folder: Path) -> str:
    arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in distilled.tensors().items()}
    arrays["header"] = np.array(json.dumps(distilled.header()))
    with atomic(folder / "distilled.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return "Images, labels and preprocessing are exact float32, and all in one file."


def _export_pt(distilled: DistilledSet, _: DistilledSet, folder: Path) -> str:
    contents: dict[str, Any] = {"images_best": distilled.images, "labels_best": distilled.labels}
    if distilled.alpha is not None:
        contents["lr_best"] = torch.tensor(distilled.alpha, dtype=torch.float64)
    contents["preprocess"] = {f"preprocess.{name}": tensor for name, tensor in distilled.preprocess.tensors().items()}
    for name, content in contents.items():
        with atomic(folder / f"{name}.pt") as temporary:
            torch.save(_detached(content), temporary)
    return "Images, labels, learning rate and preprocessing are exact. Only this card has the network and the augmentation."


def _detached(content: Tensor | dict[str, Tensor]) -> Any:
    """Copies, so that no more than these tensors is stored."""
    if isinstance(content, dict):
        return {name: _detached(tensor) for name, tensor in content.items()}
    return content.detach().cpu().clone()


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _export_hf(distilled: DistilledSet, exact: DistilledSet, folder: Path) -> str:
    from datasets import Array3D, ClassLabel, Dataset, Features, Image, Sequence, Value

    features: dict[str, Any] = {
        "image": Image(),
        "input": Array3D(shape=tuple(distilled.images.shape[1:]), dtype="float32"),
        "label": ClassLabel(names=list(distilled.class_names)),
    }
    columns: dict[str, Any] = {
        "image": [{"bytes": png_of(pixels), "path": None} for pixels in _shown(distilled)],
        "input": list(distilled.images.cpu().numpy()),
        "label": distilled.class_ids.tolist(),
    }
    if distilled.labels.is_floating_point():
        shares, each = distilled.labels.softmax(1), Value("float32")
        of_parts = len(shares) > len(distilled.images)  # a stored image then has a list of them
        features["soft_label"] = Sequence(Sequence(each)) if of_parts else Sequence(each)
        columns["soft_label"] = (shares.unflatten(0, (len(distilled.images), -1)) if of_parts else shares).tolist()
    (folder / "data").mkdir(exist_ok=True)
    with atomic(folder / card.SHARD) as temporary, without_progress_bars():
        Dataset.from_dict(columns, features=Features(features)).to_parquet(temporary)
    exact.save(folder, whole=True)
    write_text(folder / "croissant.json", json.dumps(card.croissant(distilled, folder), indent=2) + "\n")
    return (
        f"The column input is for training: exact float32. The column image is for looking: natural colours of 8 bits; "
        f"{_clipped(distilled)} distilled.safetensors holds the exact set."
    )


# Each takes what it writes, the exact set as it is stored, and the folder, and says what it keeps.
KINDS: dict[str, Callable[[DistilledSet, DistilledSet, Path], str]] = {
    "dstill": _export_dstill,
    "compact": _export_compact,
    "hf": _export_hf,
    "png": _export_png,
    "pictures": _export_pictures,
    "npz": _export_npz,
    "pt": _export_pt,
}
