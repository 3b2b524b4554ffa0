"""What lies beside an export: the card that says what is in it and how to train on it, and metadata for the hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor

from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.data.preprocess import ZCA_EPSILON

SHARD = "data/train-00000-of-00001.parquet"
OVERVIEW = "overview.webp"


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
    if kind in _READING:
        lines += ["", "## Train on it", "", *_introduction(distilled), "", "```python", *program(distilled, kind), "```"]
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

# How each kind is read: `images` are the inputs of networks `[S, C, H, W]`, `kept` has the numbers of the preprocessing.
_SAFETENSORS = f'kept = load_file("{FILE_NAME}")'
_READING = {
    "npz": (
        "import numpy as np",
        'kept = {k: torch.from_numpy(v) for k, v in np.load("distilled.npz").items() if k != "header"}',
        'images, labels = kept["images"], kept["labels"]',
    ),
    "pt": ('images, labels, kept = (torch.load(f"{name}.pt") for name in ("images_best", "labels_best", "preprocess"))',),
    "hf": (
        "from datasets import load_dataset",
        "from safetensors.torch import load_file",
        _SAFETENSORS,
        'rows = load_dataset("parquet", data_files="data/*.parquet", split="train")',
        'rows = rows.remove_columns("image").with_format("torch")[:]',
    ),
    "png": (
        "import csv, json",
        "import numpy as np",
        "from PIL import Image",
        "from safetensors.torch import load_file",
        f'{_SAFETENSORS}; encoding = json.load(open("encoding.json"))',
        'rows = list(csv.DictReader(open("labels.csv", encoding="utf-8")))',
        'low, high = (torch.tensor(encoding[end]).view(1, -1, 1, 1) for end in ("low", "high"))',
    ),
}


def program(distilled: DistilledSet, kind: str) -> list[str]:
    """Lines of plain PyTorch that read an export in the current folder and train a network on it."""
    options = ", ".join(f"{name}={value:.6g}" for name, value in distilled.train_kwargs().items())
    return [
        "import torch",
        *_READING[kind],
        *_labels(distilled, kind),
        "",
        *_preprocess(distilled),
        "",
        *_inputs(distilled, kind),
        *(_parts(distilled) if distilled.parts > 1 else ()),
        f"net = ...  # a network for {'x'.join(map(str, distilled.images.shape[1:]))} images and {distilled.classes} classes",
        f"optimiser = torch.optim.SGD(net.parameters(), {options})",
        "schedule = torch.optim.lr_scheduler.StepLR(optimiser, 500, 0.5)",
        "loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=256, shuffle=True)",
        "for _ in range(1000):",
        "    for x, y in loader:",
        "        optimiser.zero_grad()",
        "        torch.nn.functional.cross_entropy(net(x), y).backward()",
        "        optimiser.step()",
        "    schedule.step()",
        "# net(preprocess(pixels)).argmax(1) are the classes of real images, pixels [N, C, H, W] in [0, 1].",
    ]


def _introduction(distilled: DistilledSet) -> list[str]:
    lines = [
        "Run this in the folder, with a network of your own. Real images go through `preprocess` before they are classified.",
    ]
    if distilled.augmentation != "none":
        lines.append(
            f"The images are not augmented here. The set was made to be trained on with augmentation {distilled.augmentation}."
        )
    return lines


def _labels(distilled: DistilledSet, kind: str) -> list[str]:
    """Lines that make `labels` class ids or probabilities, and `rows` of a table to tensors."""
    soft, of_parts = distilled.labels.is_floating_point(), len(distilled.labels) > len(distilled.images)
    match kind:
        case "hf":
            column = "soft_label" if soft else "label"
            return [f'images, labels = rows["input"], rows["{column}"]' + (".flatten(0, 1)" if soft and of_parts else "")]
        case "png" if soft:
            columns = f"for c in range({distilled.labels.shape[1] * distilled.parts**2 if of_parts else distilled.classes})"
            whole = f'torch.tensor([[float(row[f"p{{c}}"]) {columns}] for row in rows])'
            return [f"labels = {whole}" + (f".reshape(-1, {distilled.classes})" if of_parts else "")]
        case "png":
            return ['labels = torch.tensor([int(row["label"]) for row in rows])']
    return ["labels = labels.softmax(1)"] if soft else []


def _inputs(distilled: DistilledSet, kind: str) -> list[str]:
    """Lines that make `images` of PNG files."""
    if kind != "png":
        return []
    channels, height, width = distilled.images.shape[1:]
    return [
        'content = torch.from_numpy(np.stack([np.array(Image.open(row["file"])) for row in rows]))',
        f"content = content.view(-1, {height}, {width}, {channels}).permute(0, 3, 1, 2)",
        "images = preprocess(low + content / 255 * (high - low))",
    ]


def _preprocess(distilled: DistilledSet) -> list[str]:
    """The preprocessing as a function of pixels `[N, C, H, W]` in [0, 1]."""
    if distilled.preprocess.kind == "zca":
        return [
            'mean, basis = kept["preprocess.mean"], kept["preprocess.basis"]',
            f'scale = (kept["preprocess.variance"] + {ZCA_EPSILON}).sqrt()',
            "def preprocess(pixels):",
            "    return ((pixels.flatten(1) - mean) @ basis / scale @ basis.T).view_as(pixels)",
        ]
    return [
        'mean, std = (kept[f"preprocess.{name}"].view(1, -1, 1, 1) for name in ("mean", "std"))',
        "def preprocess(pixels):",
        "    return (pixels - mean) / std",
    ]


def _parts(distilled: DistilledSet) -> list[str]:
    """Lines that cut out and enlarge what stored images hold."""
    parts = distilled.parts
    lines = [
        f"cells = [cell for band in images.tensor_split({parts}, 2) for cell in band.tensor_split({parts}, 3)]",
        'cells = [torch.nn.functional.interpolate(cell, size=images.shape[2:], mode="bilinear") for cell in cells]',
        "images = torch.stack(cells, 1).flatten(0, 1)",
    ]
    shared = len(distilled.labels) == len(distilled.images)
    return lines + ([f"labels = labels.repeat_interleave({parts**2}, 0)"] if shared else [])


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
