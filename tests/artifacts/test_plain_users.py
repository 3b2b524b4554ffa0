"""An export is what its card says: a program in plain PyTorch reads it, trains on it and reaches the claimed accuracy."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts.eight_bits import EightBits
from dstill.artifacts.exporting import class_folders, write
from dstill.artifacts.result import Claim
from dstill.cli import main as cli
from dstill.config.settings import NetConfig
from dstill.data import formation, preprocess, siamese
from dstill.data.real import RealSet
from dstill.nets.convnet import ConvNet

TRAINED_ON = ["npz", "pt", "hf", "png"]
PASSES = 150
PROTOCOL = f"""\
name: plain
version: 1
passes: {PASSES}
batch_size: 256
momentum: 0.9
weight_decay: 5e-4
lr: 0.02
lr_factor: 0.5
networks: 6
"""


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def make(real: RealSet, *, kind: str = "standardise", soft: bool = False, ipc: int = 2, contrast: float = 1.0) -> DistilledSet:
    """Real images, with so much contrast that natural colours exceed what can be shown."""
    rows = torch.cat([rows[:ipc] for rows in real.train.by_class(real.classes)])
    fitted = preprocess.fit(kind, real.train.images)
    labels = real.train.labels[rows]
    return DistilledSet(
        images=fitted.forward((real.train.images[rows].float() / 255 - 0.4) * contrast + 0.4),
        labels=torch.nn.functional.one_hot(labels, real.classes) * 2.5 if soft else labels,
        alpha=0.02,
        preprocess=fitted,
        method="random",
        ipc=ipc,
        class_names=real.class_names,
        augmentation="crop_scale_rotate",
        net=NetConfig(width=12, depth=2),
        data=real.name,
        data_fingerprint=real.fingerprint,
        recipe=None,
        seed=3,
    )


def program(folder: Path) -> str:
    """The program in the card of an export."""
    (found,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    return str(found)


def read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the program of an export has read before it makes a network."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(program(folder).split("net = ...")[0], "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("whitening", ["standardise", "zca"])
@pytest.mark.parametrize("kind", TRAINED_ON)
def test_the_program_of_a_card_reads_the_set_and_preprocesses_real_images(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, whitening: str, soft: bool
) -> None:
    one = make(tiny_real, kind=whitening, soft=soft, contrast=2.0)
    found = read(one.export(kind, tmp_path / kind), monkeypatch)
    order = one.class_ids.argsort(stable=True) if kind == "png" else slice(None)
    error = 0.03 if kind == "png" else 0.0
    torch.testing.assert_close(found["images"], one.images[order], atol=error, rtol=0)
    labels = one.labels.softmax(1) if soft else one.labels
    torch.testing.assert_close(found["labels"], labels[order], atol=1e-7, rtol=0)
    pixels = tiny_real.test.images.float() / 255
    torch.testing.assert_close(found["preprocess"](pixels), one.preprocess.forward(pixels), atol=1e-5, rtol=0)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", TRAINED_ON)
def test_the_program_takes_stored_images_apart(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, soft: bool
) -> None:
    whole = make(tiny_real, ipc=8)
    labels = torch.randn(24, 3, generator=torch.Generator().manual_seed(1)) if soft else whole.labels[::4]
    one = replace(whole, images=formation.encode(whole.images, 2), labels=labels, ipc=2, parts=2)
    names = read(one.export(kind, tmp_path / kind, stored=True), monkeypatch)
    torch.testing.assert_close(names["images"], one.decoded.images, atol=0.02 if kind == "png" else 1e-6, rtol=0)
    expected = one.decoded.labels.softmax(1) if soft else one.decoded.labels
    torch.testing.assert_close(names["labels"], expected, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def claimed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RealSet, DistilledSet]]:
    """Digits, and a set of them with the accuracy that it claims under a short protocol."""
    folder = tmp_path_factory.mktemp("claimed")
    (folder / "plain.yaml").write_text(PROTOCOL)
    real = dstill.load_real("digits")
    one = make(real, ipc=10, contrast=1.6)
    place = dstill.Machine(cache=folder, device="cpu")
    result = dstill.evaluate(one, real, protocol=str(folder / "plain.yaml"), random=False, machine=place, progress=False)
    yield real, one.with_accuracy(Claim.of(result))


def trained(folder: Path, real: RealSet, one: DistilledSet, networks: int = 6) -> list[float]:
    """Accuracies of networks that the program of a card trains, with as many passes as the claim's protocol."""
    text = program(folder).replace("net = ...", "net = fresh()").replace("1000", str(PASSES)).replace("500", str(PASSES // 2))
    accuracies = []
    for seed in range(networks):
        torch.manual_seed(seed)
        fresh = lambda: ConvNet(real.channels, real.classes, real.size, width=12, depth=2)  # noqa: E731
        names: dict[str, Any] = {"fresh": fresh}
        exec(compile(text, "README.md", "exec"), names)
        found = names["net"](names["preprocess"](real.test.images.float() / 255)).argmax(1)
        accuracies.append(float((found == real.test.labels).float().mean()))
    return accuracies


@pytest.mark.parametrize(("kind", "points"), [("npz", 1), ("pt", 1), ("hf", 1), ("png", 3)])
def test_a_plain_user_reaches_the_claimed_accuracy(
    claimed: tuple[RealSet, DistilledSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, points: float
) -> None:
    """Up to twice the standard error of the difference of both means, which chance alone makes."""
    real, one = claimed
    monkeypatch.chdir(one.export(kind, tmp_path / kind))
    claim, found = one.accuracy, trained(tmp_path / kind, real, one)
    assert claim is not None and claim.mean > 0.8
    chance = 2 * math.sqrt(claim.std**2 / claim.n + statistics.variance(found) / len(found))
    assert abs(statistics.mean(found) - claim.mean) < points / 100 + chance


@pytest.mark.parametrize("op", list(siamese.OPS))
def test_the_program_augments_as_the_evaluation_does(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    names = read(replace(make(tiny_real), augmentation=op).export("npz", tmp_path / "npz"), monkeypatch)
    images = torch.randn(1, 3, 8, 7, generator=torch.Generator().manual_seed(0)).expand(60, -1, -1, -1)
    if op in ("crop", "cutout"):  # draws of positions: the same images come out, and all of them
        grid = torch.cartesian_prod(torch.linspace(0, 0.999, 30), torch.linspace(0, 0.999, 30))
        possible = {_key(image) for image in siamese.OPS[op].apply(images[:1].expand(900, -1, -1, -1), grid)}
        torch.manual_seed(0)
        assert {_key(image) for _ in range(40) for image in names["augment"](images)} == possible and len(possible) > 5
        return
    shares = [torch.rand(60, generator=torch.Generator().manual_seed(k)) for k in range(len(siamese.OPS[op].ranges))]
    draws = [low + (high - low) * share for share, (low, high) in zip(shares, siamese.OPS[op].ranges, strict=True)]
    given = iter(draws)

    def draw(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        assert (low, high) in siamese.OPS[op].ranges and len(x) == 60
        return next(given)

    names["draw"] = draw
    expected = siamese.OPS[op].apply(images, torch.stack(draws, 1))
    torch.testing.assert_close(names["augment"](images), expected, atol=1e-5, rtol=0)


def _key(image: torch.Tensor) -> str:
    return str((image.flatten() * 1000).round().int().tolist())


def test_one_operation_is_drawn_for_a_batch(tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = read(replace(make(tiny_real), augmentation="flip_cutout").export("npz", tmp_path / "npz"), monkeypatch)
    seen = []
    names |= {"flip": lambda x: seen.append("flip"), "cutout": lambda x: seen.append("cutout")}
    for _ in range(50):
        names["augment"](names["images"])
    assert set(seen) == {"flip", "cutout"} and len(seen) == 50
    plain = replace(make(tiny_real), augmentation="none").export("npz", tmp_path / "plain")
    assert "augment" not in program(plain) and "net(x)" in program(plain)


def test_rounding_over_the_range_keeps_what_clipping_would_lose(tmp_path: Path, tiny_real: RealSet) -> None:
    for whitening in ("standardise", "zca"):
        one = make(tiny_real, kind=whitening, contrast=2.5)
        folder = one.export("png", tmp_path / whitening)
        encoding = json.loads((folder / "encoding.json").read_text())
        low, high = (torch.tensor(encoding[end]).view(1, 3, 1, 1) for end in ("low", "high"))
        natural = one.pixels(clip=False)
        assert natural.min() < -0.2 and natural.max() > 1.2, "else nothing would be clipped"
        with (folder / "labels.csv").open(encoding="utf-8") as file:
            names = [row["file"] for row in csv.DictReader(file)]
        content = torch.stack([torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1) for name in names])
        back = low + content / 255 * (high - low)
        assert (back - natural).abs().max() <= (high - low).max() / 255 / 2 + 1e-6, "half a step at most"
        rounded = one.preprocess.forward(back) - one.images
        clipped = one.preprocess.forward(natural.clamp(0, 1)) - one.images
        assert rounded.square().mean() < clipped.square().mean() / 100
        share = float(rounded.square().mean().sqrt() / one.images.square().mean().sqrt())
        assert f"rounded by {100 * share:.2g} %" in (folder / "README.md").read_text()


def test_images_that_can_be_shown_have_the_bytes_of_an_ordinary_picture() -> None:
    content = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    eight = EightBits.of(content[..., 5:-5] / 255)
    assert torch.equal(eight.content, content[..., 5:-5]) and (eight.low.item(), eight.high.item()) == (0, 1)
    two = EightBits.of(torch.tensor([[[[0.0]], [[-1.0]]], [[[1.0]], [[3.0]]]]))
    assert two.content.flatten().tolist() == [0, 0, 255, 255] and two.high.tolist() == [1, 3]


def test_grey_stays_grey_and_colours_stay_colours(tiny_real: RealSet, tmp_path: Path) -> None:
    for real, mode in ((dstill.load_real("digits"), "L"), (tiny_real, "RGB")):
        one = make(real)
        for kind in ("png", "pictures"):
            files = sorted((one.export(kind, tmp_path / mode / kind)).glob("*/*.png"))
            assert {Image.open(file).mode for file in files} == {mode} and len(files) == len(one.images)
        folder = one.export("hf", tmp_path / mode / "hf")
        rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / mode))
        assert {image.mode for image in rows["image"]} == {mode}


def test_pictures_are_in_natural_colours_and_say_that_they_are_not_for_training(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real, contrast=2.5)
    natural = one.pixels(clip=False)
    share = float(((natural < 0) | (natural > 1)).float().mean())
    said = write(one, "pictures", tmp_path / "out")
    assert f"{100 * share:.2g} % of their values cannot be shown and are clipped" in said and share > 0.05
    card = (tmp_path / "out" / "README.md").read_text()
    assert said in card and "```python" not in card
    first = np.array(Image.open(tmp_path / "out" / "stripes" / "000.png")).transpose(2, 0, 1)
    assert np.array_equal(first, (one.pixels()[0] * 255).round().byte().numpy())
    assert not (tmp_path / "out" / "distilled.safetensors").exists()


def test_folders_have_the_names_of_classes_and_the_table_their_ids(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real, soft=True)
    folder = one.export("png", tmp_path / "png")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(tiny_real.class_names)
    with (folder / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["label"], row["name"]) for row in rows[:3]] == [
        ("stripes/000.png", "0", "stripes"),
        ("stripes/001.png", "0", "stripes"),
        ("columns/000.png", "1", "columns"),
    ]
    shares = torch.tensor([[float(row[f"p{c}"]) for c in range(3)] for row in rows])
    torch.testing.assert_close(shares, one.labels.softmax(1))
    assert class_folders(("cat", "CAT")) == ["000-cat", "001-CAT"], "one folder on systems that ignore case"
    assert class_folders(("a", " a")) == ["000-a", "001-_a"] and class_folders(("..", "b")) == ["000-__", "001-b"]
    kept = ("St. Bernard", "crane (bird)", "Schäferhund", "a_b-c")
    assert class_folders(kept) == list(kept)


def test_every_card_has_formula_picture_and_what_is_kept(tiny_real: RealSet, tmp_path: Path) -> None:
    says = {"npz": "exact float32", "pt": "are exact", "hf": "column input is for training", "png": "files are for training"}
    for kind in TRAINED_ON:
        for whitening, formula in (("standardise", "x = (p - mean) / std"), ("zca", "V diag(1 / sqrt(S + 0.1)) Vᵀ")):
            one = make(tiny_real, kind=whitening)
            folder = one.export(kind, tmp_path / kind / whitening)
            card = (folder / "README.md").read_text()
            assert formula in card and says[kind] in card and "![the images](overview.webp)" in card
            assert Image.open(folder / "overview.webp").size == (2 * 66 + 2, 3 * 66 + 2)


def test_what_a_png_cannot_hold_is_refused(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real, kind="zca", ipc=8)
    held = replace(one, images=formation.encode(one.images, 2), labels=one.labels[::4], ipc=2, parts=2)
    with pytest.raises(DstillError, match="cannot be whitened again"):
        held.export("png", tmp_path / "a", stored=True)
    two = DistilledSet.from_tensors(torch.rand(2, 2, 8, 8), [0, 1])
    with pytest.raises(DstillError, match="have 2 channels, a PNG file to train on holds 1 or 3"):
        two.export("png", tmp_path / "b")
    assert Image.open(next(two.export("pictures", tmp_path / "c").glob("*/*.png"))).mode == "L"


def test_the_command_says_what_is_kept(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = make(tiny_real, contrast=2.0)
    one.save(tmp_path / "run" / "set-0")
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["dstill", "export", str(tmp_path / "run"), "png", "-o", str(out)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == str(out) and "8 bits" in second and second in (out / "README.md").read_text() and not rest
