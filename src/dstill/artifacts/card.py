"""What lies beside an export: the card that says what is in it and how to train on it, and metadata for the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.plain import READING, program
from dstill.data.preprocess import ZCA_EPSILON

SHARD = "data/train-00000-of-00001.parquet"
OVERVIEW = "overview.webp"
_INTRODUCTION = (
    "Run this in the folder, with a network of your own. It trains as protocol `ast` does. Real images go through `preprocess` "
    "before they are classified."
)


def described(distilled: DistilledSet) -> str:
    """The set in a sentence."""
    return (
        f"{len(distilled.images)} synthetic images, {distilled.ipc} for each of {distilled.classes} classes, distilled from "
        f"{distilled.data} by {distilled.method}."
    )


def readme(distilled: DistilledSet, exact: DistilledSet, kind: str, kept: str) -> str:
    """The card of an export: metadata for the hub, what users of the set must know, a picture, and a program that trains on it.

    Args:
        distilled: the set as it is exported.
        exact: the set as it is stored.
        kind: the kind of the export.
        kept: what the export keeps, in a few sentences.
    """
    rate = "of your choice" if distilled.alpha is None else f"{distilled.alpha:.6g}, learned with the images"
    lines = [*_metadata(distilled)] if kind == "hf" else []
    lines += [
        f"# {distilled.data}, distilled to {distilled.ipc} image(s) per class",
        "",
        f"![the images]({OVERVIEW})",
        "",
        f"{described(distilled)} {kept}",
        "",
        f"- Preprocessing of synthetic and real images alike: {distilled.preprocess.kind}, {_formula(distilled)}",
        f"- Augmentation: {distilled.augmentation}",
        f"- Network: {distilled.net.model_dump_json(exclude_none=True)}",
        f"- Learning rate: {rate}",
        f"- Labels: {_LABELS[kind] if distilled.labels.is_floating_point() else 'class ids'}",
    ]
    if exact.parts > 1:
        lines.append(
            f"- Stored as {len(exact.images)} images that hold {exact.parts}x{exact.parts} each; networks are trained on what "
            "they hold, enlarged bilinearly"
        )
    if distilled.accuracy:
        lines.append(f"- Accuracy: {distilled.accuracy}")
    if kind in READING:
        lines += ["", "## Train on it", "", _INTRODUCTION, "", "```python", *program(distilled, kind), "```"]
    return "\n".join(lines) + "\n"


def _metadata(distilled: DistilledSet) -> list[str]:
    return [
        "---",
        "task_categories: [image-classification]",
        "tags: [dataset-distillation, synthetic]",
        f"size_categories: [{_size_category(len(distilled.images))}]",
        "configs: [{config_name: default, data_files: [{split: train, path: data/train-*.parquet}]}]",
        "---",
        "",
    ]


def _size_category(count: int) -> str:
    """The hub's category for a number of images."""
    return "n<1K" if count < 1000 else "1K<n<10K" if count < 10_000 else "10K<n<100K" if count < 100_000 else "100K<n<1M"


def _formula(distilled: DistilledSet) -> str:
    """How pixels in [0, 1] become inputs of networks."""
    tensors = distilled.preprocess.tensors()
    if distilled.preprocess.kind == "zca":
        return (
            f"x = (p - mean) V diag(1 / sqrt(S + {ZCA_EPSILON})) Vᵀ for flat images p in [0, 1], where `preprocess.mean`, "
            "`preprocess.basis` V and `preprocess.variance` S are those of the real training images"
        )
    mean, std = (_numbers(tensors[name]) for name in ("mean", "std"))
    return f"x = (p - mean) / std for pixels p in [0, 1], with mean {mean} and std {std} of each channel"


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.4f}" for value in values.tolist())


_LABELS = {
    "hf": "soft, as probabilities in `soft_label`",
    "png": "soft, as probabilities in `labels.csv`",
    "pictures": "soft; the folder of an image is that of its most likely class",
    "npz": "soft, as logits in `labels`; their softmax are the probabilities",
    "pt": "soft, as logits in `labels_best.pt`; their softmax are the probabilities",
}


def croissant(distilled: DistilledSet, folder: Path) -> dict[str, Any]:
    """Metadata in the Croissant vocabulary 1.0 (MLCommons)."""
    content = (folder / SHARD).read_bytes()
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
        "description": described(distilled),
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": "train",
                "name": "train",
                "contentUrl": SHARD,
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


def safe_name(name: str) -> str:
    """A name with any characters, as part of a file name.

    Example:
        >>> safe_name("sports car/2"), safe_name("")
        ('sports_car_2', 'class')
    """
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)[:40] or "class"
