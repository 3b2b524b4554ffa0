"""Programs in plain PyTorch that read an export and train on it: what a user writes who does not know dstill."""

from __future__ import annotations

from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.data import siamese
from dstill.data.preprocess import ZCA_EPSILON

# How each kind is read: `images` are the inputs of networks `[S, C, H, W]`, `kept` has the numbers of the preprocessing.
_SAFETENSORS = f'kept = load_file("{FILE_NAME}")'
READING = {
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
        *(["import random"] if distilled.augmentation != "none" else []),
        "import torch",
        "import torch.nn.functional as F",
        *READING[kind],
        *_labels(distilled, kind),
        "",
        *_preprocess(distilled),
        "",
        *_inputs(distilled, kind),
        *(_parts(distilled) if distilled.parts > 1 else ()),
        *_augment(distilled),
        f"net = ...  # a network for {'x'.join(map(str, distilled.images.shape[1:]))} images and {distilled.classes} classes",
        f"optimiser = torch.optim.SGD(net.parameters(), {options})",
        "schedule = torch.optim.lr_scheduler.StepLR(optimiser, 500, 0.5)",
        "loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=256, shuffle=True)",
        "for _ in range(1000):",
        "    for x, y in loader:",
        "        optimiser.zero_grad()",
        f"        F.cross_entropy(net({'x' if distilled.augmentation == 'none' else 'augment(x)'}), y).backward()",
        "        optimiser.step()",
        "    schedule.step()",
        "# net(preprocess(pixels)).argmax(1) are the classes of real images, pixels [N, C, H, W] in [0, 1].",
    ]


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
            f'spread = (kept["preprocess.variance"] + {ZCA_EPSILON}).sqrt()',
            "def preprocess(pixels):",
            "    return ((pixels.flatten(1) - mean) @ basis / spread @ basis.T).view_as(pixels)",
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
        'cells = [F.interpolate(cell, size=images.shape[2:], mode="bilinear") for cell in cells]',
        "images = torch.stack(cells, 1).flatten(0, 1)",
    ]
    shared = len(distilled.labels) == len(distilled.images)
    return lines + ([f"labels = labels.repeat_interleave({parts**2}, 0)"] if shared else [])


# The operations of `dstill.data.siamese`, written out.
_AFFINE = (
    "def affine(x, *rows):",
    "    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), x.shape, align_corners=True)",
    "    return F.grid_sample(x, grid, align_corners=True)",
)
_OPS = {
    "colour": (
        "def colour(x):",
        "    ranges = ((-0.5, 0.5), (0.0, 2.0), (0.5, 1.5))",
        "    brightness, saturation, contrast = (draw(x, *ends).view(-1, 1, 1, 1) for ends in ranges)",
        "    x = x + brightness",
        "    x = x.lerp(x.mean(1, keepdim=True), 1 - saturation)",
        "    return x.lerp(x.mean((1, 2, 3), keepdim=True), 1 - contrast)",
    ),
    "crop": (
        "def crop(x):",
        "    one, zero = torch.ones(len(x)), torch.zeros(len(x))",
        "    reach = [round(side / 8) for side in x.shape[2:]]",
        "    down, right = (torch.randint(-r, r + 1, (len(x),)) * 2 / (side - 1) for r, side in zip(reach, x.shape[2:]))",
        "    return affine(x, one, zero, right, zero, one, down)",
    ),
    "cutout": (
        "def cutout(x):",
        "    inside = []",
        "    for side in x.shape[2:]:",
        "        hole, pixel = (side + 1) // 2, torch.arange(side)",
        "        first = torch.randint(side + 1 - hole % 2, (len(x), 1)) - hole // 2",
        "        inside.append((pixel >= first) & (pixel < first + hole))",
        "    return x * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])",
    ),
    "flip": ("def flip(x):", "    return torch.where(draw(x, 0.0, 1.0).view(-1, 1, 1, 1) < 0.5, x.flip(3), x)"),
    "scale": (
        "def scale(x):",
        "    zero = torch.zeros(len(x))",
        "    return affine(x, draw(x, 1 / 1.2, 1.2), zero, zero, zero, draw(x, 1 / 1.2, 1.2), zero)",
    ),
    "rotate": (
        "def rotate(x):",
        "    angle, zero = draw(x, -15.0, 15.0).deg2rad(), torch.zeros(len(x))",
        "    return affine(x, angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero)",
    ),
}


def _augment(distilled: DistilledSet) -> list[str]:
    """Lines that make `augment`, a function of a batch: one operation, drawn for the batch, with parameters for each image."""
    names = siamese.parse(distilled.augmentation)
    if not names:
        return []
    drawn = ("def draw(x, low, high):", "    return low + (high - low) * torch.rand(len(x))")
    return [
        "",
        *drawn,
        *(_AFFINE if set(names) & {"crop", "scale", "rotate"} else ()),
        *(line for name in dict.fromkeys(names) for line in _OPS[name]),
        "def augment(x):",
        f"    return random.choice([{', '.join(names)}])(x)",
        "",
    ]
