"""Sets whose images hold several: what they hold, what they weigh, and how they are written, read and shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts import files
from dstill.artifacts.pictures import grid
from dstill.cli.show import describe, write_picture
from dstill.config.settings import NetConfig
from dstill.data import preprocess
from dstill.data.formation import decode, encode
from dstill.data.real import RealSet

KINDS = ["hf", "png", "npz", "pt"]


def make(real: RealSet, *, soft: bool = False, kind: str = "standardise", ipc: int = 2) -> DistilledSet:
    """Each stored image holds four real ones of its class; soft labels are those of the parts."""
    rows = torch.cat([rows[: 4 * ipc] for rows in real.train.by_class(real.classes)])
    fitted = preprocess.fit(kind, real.train.images)
    labels = torch.randn(len(rows), real.classes, generator=torch.Generator().manual_seed(1))
    return DistilledSet(
        images=encode(fitted.forward(real.train.images[rows].float() / 255), 2),
        labels=labels if soft else real.train.labels[rows][::4],
        alpha=0.02,
        preprocess=fitted,
        method="mtt",
        ipc=ipc,
        class_names=real.class_names,
        augmentation="none",
        net=NetConfig(width=4, depth=2),
        data=real.name,
        data_fingerprint=real.fingerprint,
        recipe=None,
        seed=3,
        parts=2,
    )


def assert_equal(one: DistilledSet, other: DistilledSet) -> None:
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert (one.alpha, one.class_names, one.ipc, one.parts) == (other.alpha, other.class_names, other.ipc, other.parts)


def file_header(path: Path) -> dict[str, object]:
    with safe_open(path, framework="pt") as file:
        return dict(json.loads(file.metadata()["dstill"]))


@pytest.mark.parametrize("soft", [False, True])
def test_a_set_is_decoded_to_images_that_each_hold_one(tiny_real: RealSet, soft: bool) -> None:
    one = make(tiny_real, soft=soft)
    seen = one.decoded
    assert (seen.parts, seen.ipc, len(seen.images)) == (1, 8, 24) and seen.decoded is seen
    assert torch.equal(seen.images, decode(one.images, 2))
    if soft:
        assert torch.equal(seen.labels, one.labels)
    else:
        assert seen.labels.tolist() == [c for c in range(3) for _ in range(8)]
    assert one.class_ids.shape == (6,) and one.with_hard_labels().decoded.labels.tolist() == seen.class_ids.tolist()
    assert repr(one) == "DistilledSet('mtt' of 'tiny', 6 images of 3x8x8 with 2x2 parts, 3 classes)"


def test_the_class_of_a_stored_image_is_the_most_likely_one_over_its_parts(tiny_real: RealSet) -> None:
    one, labels = make(tiny_real, soft=True, ipc=1), torch.zeros(12, 3)
    labels[0:4, 1] = torch.tensor([1.0, 1.0, 1.0, -9.0])
    labels[3, 0] = 2.0
    labels[4:8, 2], labels[8:, 0] = 1.0, 1.0
    assert replace(one, labels=labels).class_ids.tolist() == [1, 2, 0]
    hard = replace(one, labels=labels).with_hard_labels()
    assert hard.labels.tolist() == [1, 1, 1, 0, 2, 2, 2, 2, 0, 0, 0, 0] and hard.class_ids.tolist() == [1, 2, 0]


def test_bytes_are_those_of_stored_images_and_labels_and_the_family_says_what_is_stored(tiny_real: RealSet) -> None:
    one, soft = make(tiny_real), make(tiny_real, soft=True)
    assert (one.stored_bytes, soft.stored_bytes) == (6 * 192 + 6, 6 * 192 + 4 * 24 * 3)
    assert (one.decoded.stored_bytes, soft.decoded.stored_bytes) == (24 * 192 + 24, 24 * 192 + 4 * 24 * 3)
    families = [one.family, soft.family, one.decoded.family, soft.decoded.family]
    assert families == ["parts", "parts and labels", "raw", "labels"]


def test_labels_belong_to_stored_images_or_to_their_parts(tiny_real: RealSet) -> None:
    one = make(tiny_real)
    for count in (5, 12, 96):
        with pytest.raises(DstillError, match="labels of 6 images"):
            replace(one, labels=torch.zeros(count, dtype=torch.int64))
    with pytest.raises(DstillError, match="labels of 24 images"):
        replace(one.decoded, labels=one.labels)
    with pytest.raises(DstillError, match="cannot hold 9x9 parts"):
        replace(one, parts=9)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["zca", "standardise"])
def test_a_set_comes_back_exactly(tiny_real: RealSet, tmp_path: Path, soft: bool, kind: str) -> None:
    one = make(tiny_real, soft=soft, kind=kind)
    back = DistilledSet.load(one.save(tmp_path))
    assert_equal(back, one)
    assert back.header() == one.header()


def test_only_files_with_parts_have_the_format_that_older_versions_refuse(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, plain = make(tiny_real).save(tmp_path / "held"), make(tiny_real).decoded.save(tmp_path / "plain")
    assert (file_header(held)["format"], file_header(held)["parts"]) == (2, 2)
    assert file_header(plain)["format"] == 1 and "parts" not in file_header(plain)
    assert DistilledSet.load(plain).parts == 1
    monkeypatch.setattr(files, "FORMAT", 1)
    DistilledSet.load(plain)
    with pytest.raises(DstillError, match="has format 2, this dstill reads up to 1: upgrade"):
        DistilledSet.load(held)


def test_a_loader_gets_what_stored_images_hold(tiny_real: RealSet) -> None:
    one = make(tiny_real)
    ((images, labels),) = DataLoader(one.as_dataset(), batch_size=100)
    assert torch.equal(images, one.decoded.images) and torch.equal(labels, one.decoded.labels)


def test_pixels_of_stored_images_are_those_of_what_they_hold(tiny_real: RealSet) -> None:
    """Also if the whitening of a whole image has mixed the pixels of its parts."""
    real = (tiny_real.train.images[torch.cat([rows[:4] for rows in tiny_real.train.by_class(3)])].float() / 255)[:4]
    shrunk = encode(real, 2)[0]
    for kind in ("standardise", "zca"):
        one = make(tiny_real, kind=kind, ipc=1)
        assert float((one.pixels()[0] - shrunk).abs().mean()) < 0.05, kind
        torch.testing.assert_close(one.decoded.pixels(), one.preprocess.invert(decode(one.images, 2)).clamp(0, 1))


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_holds_what_networks_see(tiny_real: RealSet, tmp_path: Path, kind: str, soft: bool) -> None:
    one = make(tiny_real, soft=soft)
    told = {"preprocess": one.preprocess} if kind == "pt" else {}
    back = dstill.import_set(one.export(kind, tmp_path / kind), tiny_real, **told)  # type: ignore[arg-type]
    assert_equal(back, one if kind in ("hf", "png") else one.decoded)  # the first two keep the exact set beside


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_export_of_stored_images_comes_back_exactly(tiny_real: RealSet, tmp_path: Path, kind: str, soft: bool) -> None:
    one = make(tiny_real, soft=soft)
    told = {"preprocess": one.preprocess, "parts": 2} if kind == "pt" else {}
    assert_equal(dstill.import_set(one.export(kind, tmp_path / kind, stored=True), tiny_real, **told), one)  # type: ignore[arg-type]


def test_hard_labels_of_parts_are_counted_by_stored_image(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real)
    for name, tensor in (("images", one.images), ("labels", one.decoded.labels)):
        torch.save(tensor, tmp_path / f"{name}_best.pt")
    back = dstill.import_set(tmp_path, tiny_real, preprocess=one.preprocess, parts=2)
    assert (back.ipc, len(back.labels), back.class_ids.tolist()) == (2, 24, one.labels.tolist())
    with pytest.raises(DstillError, match="6 images have labels"):
        dstill.import_set(tmp_path, tiny_real, preprocess=one.preprocess)
    pixels = one.decoded.pixels()[:3]
    mine = DistilledSet.from_tensors(pixels, [0] * 4 + [1] * 4 + [2] * 4, class_names=tiny_real.class_names, parts=2)
    assert (mine.ipc, mine.parts, mine.decoded.ipc) == (1, 2, 4)


@pytest.mark.parametrize(("stored", "count"), [(False, 24), (True, 6)])
def test_pictures_and_pixels_are_those_that_were_asked_for(
    tiny_real: RealSet, tmp_path: Path, stored: bool, count: int
) -> None:
    one = make(tiny_real, soft=True)
    shown = one if stored else one.decoded
    expected = (shown.pixels() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    folder = one.export("png", tmp_path / "png", stored=stored)
    assert len(list(folder.rglob("*.png"))) == count
    rows = datasets.load_dataset(
        str(one.export("hf", tmp_path / "hub", stored=stored)), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert np.array_equal(np.stack([np.asarray(image) for image in rows["image"]]), expected)
    assert rows["label"] == shown.class_ids.tolist()
    assert np.allclose(np.array(rows["soft_label"]).reshape(24, 3), one.labels.softmax(1), atol=1e-6)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert f"{count} synthetic images" in card and "Stored as 6 images that hold 2x2 each" in card
    write_picture(one.save(tmp_path), tmp_path / "grid.png", stored=stored)
    strip = 0 if stored else 8  # what a stored image holds has labels of its own
    width, height = (8, 3) if not stored else (2, 3)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (width * 66 + 2, height * (66 + strip) + 2)
        assert np.array_equal(np.asarray(picture), np.asarray(grid(one, stored=stored)))
        tile = np.asarray(picture)[2:66:8, 2:66:8]
    assert np.array_equal(tile, expected[0])


def test_a_set_is_described_with_its_parts(tiny_real: RealSet, tmp_path: Path) -> None:
    assert "2 image(s) of each of 3 classes, 3x8x8 with 2x2 parts, hard labels" in describe(make(tiny_real).save(tmp_path))


def test_a_file_whose_parts_are_none_is_damaged(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real)
    tensors: dict[str, Tensor] = one.tensors()
    for wrong in (0, "2", 2.5):
        files.save(tmp_path / "x.safetensors", "distilled set", tensors, {**one.header(), "parts": wrong}, since=2)
        with pytest.raises(DstillError, match="is damaged"):
            DistilledSet.load(tmp_path / "x.safetensors")
