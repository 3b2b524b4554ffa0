"""Exports a distilled set: a Hugging Face data set folder, PNG files, NumPy arrays, or the field's `.pt` files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.artifacts.files import atomic, check_writable, write_bytes, write_text
from dstill.artifacts.pictures import png_of
from dstill.data.quiet import without_progress_bars
from dstill.errors import DstillError, suggest

_SHARD = "data/train-00000-of-00001.parquet"


def export(distilled: DistilledSet, kind: str, folder: str | Path, *, stored: bool = False) -> Path:
    """Writes a set to a folder, for other programs.

    In `npz` and `pt` the images are preprocessed and exact. In `hf` and `png` they are 8-bit pixels, clipped to the displayable
    range; the exact set is stored beside them as `distilled.safetensors`.

    Of stored images that hold several, what they hold is written, as images of their own with their labels. The exact set
    keeps them as they are stored.

    Args:
        distilled: the set.
        kind: `hf`: a Hugging Face data set folder (Parquet, card, Croissant metadata). `png`: one file for each image, in one
            folder for each class. `npz`: all arrays in one file. `pt`: `images_best.pt`, `labels_best.pt` and `lr_best.pt`, as
            code for trajectory matching reads them.
        folder: the folder to write; made if missing.
        stored: write the stored images, instead of what they hold.

    Returns:
        The folder.

    Raises:
        DstillError: the kind is unknown, the folder cannot be made, or, for `png`, it holds other images.

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
        ...     sorted(path.name for path in export(distilled, "pt", folder).iterdir())
        ['images_best.pt', 'labels_best.pt', 'lr_best.pt']
    """
    if kind not in KINDS:
        raise DstillError(f"unknown export {kind!r}; {suggest(kind, KINDS)}")
    target = Path(folder)
    check_writable(target)
    KINDS[kind](distilled if stored else distilled.decoded, distilled, target)
    return target


def _png(distilled: DistilledSet) -> list[bytes]:
    return [png_of(pixels) for pixels in (distilled.pixels() * 255).round().byte()]


def _export_png(distilled: DistilledSet, exact: DistilledSet, folder: Path) -> None:
    counts, files = dict[int, int](), dict[Path, bytes]()
    for content, label in zip(_png(distilled), distilled.class_ids.tolist(), strict=True):
        number = counts[label] = counts.get(label, -1) + 1
        files[folder / f"{label:03d}-{safe_name(distilled.class_names[label])}" / f"{number:03d}.png"] = content
    others = sorted(set(folder.glob("*/*.png")) - files.keys())
    if others:
        raise DstillError(f"{folder} holds other images ({others[0]}): pass another folder, or remove this one")
    for path, content in files.items():
        write_bytes(path, content)
    exact.save(folder)


def safe_name(name: str) -> str:
    """A class name with any characters, as part of a file name.

    Example:
        >>> safe_name("sports car/2"), safe_name("")
        ('sports_car_2', 'class')
    """
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:40] or "class"


def _export_npz(distilled: DistilledSet, _: DistilledSet, folder: Path) -> None:
    arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in distilled.tensors().items()}
    arrays["header"] = np.array(json.dumps(distilled.header()))
    with atomic(folder / "distilled.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _export_pt(distilled: DistilledSet, _: DistilledSet, folder: Path) -> None:
    tensors: dict[str, Tensor] = {"images": distilled.images, "labels": distilled.labels}
    if distilled.alpha is not None:
        tensors["lr"] = torch.tensor(distilled.alpha, dtype=torch.float64)
    for name, tensor in tensors.items():
        with atomic(folder / f"{name}_best.pt") as temporary:
            torch.save(tensor.detach().cpu().clone(), temporary)


def _export_hf(distilled: DistilledSet, exact: DistilledSet, folder: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, Image, Sequence, Value

    soft = distilled.labels.is_floating_point()
    features: dict[str, Any] = {"image": Image(), "label": ClassLabel(names=list(distilled.class_names))}
    columns: dict[str, Any] = {
        "image": [{"bytes": content, "path": None} for content in _png(distilled)],
        "label": distilled.class_ids.tolist(),
    }
    if soft:
        shares, each = distilled.labels.softmax(1), Value("float32")
        of_parts = len(shares) > len(distilled.images)  # a stored image then has a list of them
        features["soft_label"] = Sequence(Sequence(each)) if of_parts else Sequence(each)
        columns["soft_label"] = (shares.unflatten(0, (len(distilled.images), -1)) if of_parts else shares).tolist()
    (folder / "data").mkdir(exist_ok=True)
    with atomic(folder / _SHARD) as temporary, without_progress_bars():
        Dataset.from_dict(columns, features=Features(features)).to_parquet(temporary)
    exact.save(folder)
    write_text(folder / "README.md", _card(distilled, exact))
    write_text(folder / "croissant.json", json.dumps(_croissant(distilled, folder), indent=2) + "\n")


def _described(distilled: DistilledSet) -> str:
    return (
        f"{len(distilled.images)} synthetic images, {distilled.ipc} for each of {distilled.classes} classes, distilled from "
        f"{distilled.data} by {distilled.method}."
    )


def _card(distilled: DistilledSet, exact: DistilledSet) -> str:
    """The data set card: metadata for the hub, and what users of the set must know."""
    rate = "of your choice" if distilled.alpha is None else f"{distilled.alpha:.6g}, learned with the images"
    lines = [
        "---",
        "task_categories: [image-classification]",
        "tags: [dataset-distillation, synthetic]",
        f"size_categories: [{_size_category(len(distilled.images))}]",
        "configs: [{config_name: default, data_files: [{split: train, path: data/train-*.parquet}]}]",
        "---",
        "",
        f"# {distilled.data}, distilled to {distilled.ipc} image(s) per class",
        "",
        f"{_described(distilled)} The Parquet file holds them as 8-bit pixels, clipped to the displayable range; `{FILE_NAME}` "
        "holds them exactly, with their preprocessing and labels.",
        "",
        f"- Preprocessing of synthetic and real images alike: {distilled.preprocess.kind}",
        f"- Augmentation: {distilled.augmentation}",
        f"- Network: {distilled.net.model_dump_json(exclude_none=True)}",
        f"- Learning rate: {rate}",
        f"- Labels: {'soft, as probabilities in `soft_label`' if distilled.labels.is_floating_point() else 'class ids'}",
    ]
    if exact.parts > 1:
        lines.append(
            f"- Stored as {len(exact.images)} images that hold {exact.parts}x{exact.parts} each; networks are trained on what "
            "they hold, enlarged bilinearly"
        )
    if distilled.accuracy:
        lines.append(f"- Accuracy: {distilled.accuracy}")
    return "\n".join(lines) + "\n"


def _size_category(count: int) -> str:
    """The hub's category for a number of images."""
    return "n<1K" if count < 1000 else "1K<n<10K" if count < 10_000 else "10K<n<100K" if count < 100_000 else "100K<n<1M"


def _croissant(distilled: DistilledSet, folder: Path) -> dict[str, Any]:
    """Metadata in the Croissant vocabulary 1.0 (MLCommons)."""
    content = (folder / _SHARD).read_bytes()
    fields = [("image", "sc:ImageObject"), ("label", "sc:Integer")]
    return {
        "@context": {
            "@vocab": "https://schema.org/",
            "sc": "https://schema.org/",
            "cr": "http://mlcommons.org/croissant/",
            "dct": "http://purl.org/dc/terms/",
            "recordSet": "cr:recordSet",
            "field": "cr:field",
            "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
            "source": "cr:source",
            "fileObject": "cr:fileObject",
            "extract": "cr:extract",
            "column": "cr:column",
            "conformsTo": "dct:conformsTo",
        },
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": safe_name(f"{distilled.data}-{distilled.method}-ipc{distilled.ipc}"),
        "description": _described(distilled),
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "train",
                "name": "train",
                "contentUrl": _SHARD,
                "encodingFormat": "application/x-parquet",
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "images",
                "name": "images",
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"images/{name}",
                        "name": name,
                        "dataType": kind,
                        "source": {"fileObject": {"@id": "train"}, "extract": {"column": name}},
                    }
                    for name, kind in fields
                ],
            }
        ],
    }


# Each takes what it writes, the exact set as it is stored, and the folder.
KINDS: dict[str, Callable[[DistilledSet, DistilledSet, Path], None]] = {
    "hf": _export_hf,
    "png": _export_png,
    "npz": _export_npz,
    "pt": _export_pt,
}
