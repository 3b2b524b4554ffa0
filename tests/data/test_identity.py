"""What a data set is called changes nothing; what it holds decides."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dstill.data import catalog
from dstill.data.catalog import DATASETS, Entry, Shape, content_of, named, recognised
from dstill.data.real import RealSet, load_real

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def folder(root: Path, names: tuple[str, ...] = ("cat", "dog", "owl"), side: int = 8, count: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in names:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(root / split / name / f"{i}.png")
    return root


def test_a_copy_of_cifar10_is_told_by_its_classes_and_the_number_of_their_images() -> None:
    counts = dict.fromkeys(CIFAR10, 5000)
    assert recognised(3, (32, 32), counts) == "cifar10"
    assert recognised(3, (32, 32), dict(reversed(counts.items()))) == "cifar10"
    assert recognised(1, (32, 32), counts) == recognised(3, (64, 64), counts) == ""
    assert recognised(3, (32, 32), counts | {"cat": 4999}) == ""
    assert recognised(3, (32, 32), dict.fromkeys(["plane", *CIFAR10[1:]], 5000)) == ""


def test_mnist_is_told_from_other_digits_by_its_counts_at_any_size() -> None:
    counts = dict(zip("0123456789", (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949), strict=True))
    assert recognised(1, (28, 28), counts) == recognised(1, (32, 32), counts) == "mnist"
    assert recognised(1, (28, 28), dict.fromkeys("0123456789", 6000)) == ""


def test_no_two_entries_of_the_catalogue_have_the_same_content() -> None:
    known = [entry.content for entry in DATASETS.values() if entry.content]
    assert len(set(known)) == len(known) >= 6


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_digests_of_the_catalogue_are_those_of_the_files(name: str) -> None:
    path = Path(os.environ.get("DSTILL_DATA", "")) / f"{name}-train.parquet"
    if not os.environ.get("DSTILL_DATA") or not path.exists():
        pytest.skip(f"set DSTILL_DATA to a folder with {name}-train.parquet")
    schema = pq.read_schema(path).metadata[b"huggingface"]
    names = json.loads(schema)["info"]["features"]["label"]["names"]
    counts = np.bincount(pq.read_table(path, columns=["label"])["label"].to_numpy())
    assert DATASETS[name].content == content_of(dict(zip(names, counts.tolist(), strict=True)))


@pytest.fixture
def pets(monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny data set in the catalogue."""
    entry = Entry("somebody/pets", shape=Shape(3, (8, 8), 3, 12, 12), content=content_of({"cat": 4, "dog": 4, "owl": 4}))
    monkeypatch.setitem(catalog.DATASETS, "pets", entry)
    return "pets"


def test_a_folder_is_what_it_holds_and_not_what_it_is_called(pets: str, tmp_path: Path) -> None:
    known = {name: load_real(folder(tmp_path / name)).known for name in ("woof", "anything")}
    assert known == {"woof": pets, "anything": pets}
    other = load_real(folder(tmp_path / "x" / "pets", ("cat", "dog", "cow")))
    assert (other.name, other.known) == ("pets", "")


def test_parts_of_a_known_set_stay_known(pets: str, tmp_path: Path) -> None:
    real = load_real(folder(tmp_path / "x"))
    parts = [real.holdout(0), load_real(real, classes=["dog", "cat"]), load_real(real, train_fraction=0.5)]
    assert all(part.known == pets for part in parts)
    assert load_real(tmp_path / "x" / "train", test_fraction=0.25).known == pets
    assert load_real(tmp_path / "x", image_size=16).known == ""


def test_only_the_name_of_the_catalogue_makes_a_set_known_without_looking(tiny_real: RealSet) -> None:
    assert load_real("digits").known == "digits"
    assert tiny_real.known == replace(tiny_real, name="cifar10").known == ""


def test_a_recognised_copy_is_said(pets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_real(folder(tmp_path / "x"), progress=True)
    assert "x holds the classes and training images of pets, so it has the recipes of pets" in capsys.readouterr().err


def test_a_folder_comes_before_a_data_set_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "cifar10"):
        folder(tmp_path / name)
        assert named(name) is None
        real = load_real(name, progress=True)
        assert (real.classes, real.known, len(real.train)) == (3, "", 12)
        told = capsys.readouterr().err
        assert f"{name} is read from {tmp_path / name}, not the data set of that name" in told
        assert load_real(f"./{name}", progress=True).fingerprint == real.fingerprint
        assert "not the data set of that name" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "digits")
    assert named("digits") == DATASETS["digits"] and load_real("digits").classes == 10


def test_one_line_says_what_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = load_real(folder(tmp_path / "pics"), progress=True)
    *progress, said = capsys.readouterr().err.splitlines()
    assert said == "pics has 3 classes: cat, dog, owl; 12 train, 12 test images of 3x8x8"
    assert progress[-1] == "reading 24/24"
    load_real(real, classes=["cat", "dog"], progress=True)
    load_real(tmp_path / "pics")
    assert capsys.readouterr() == ("", "")


def test_a_long_list_of_classes_is_cut(tmp_path: Path) -> None:
    ten, many = (tuple(f"c{i:02}" for i in range(count)) for count in (10, 11))
    assert "10 classes: " + ", ".join(ten) + ";" in load_real(folder(tmp_path / "a", ten, count=1)).summary()
    assert "11 classes: c00, c01, c02, …, c10;" in load_real(folder(tmp_path / "b", many, count=1)).summary()


def test_a_set_knows_how_to_be_read_again_until_it_is_changed() -> None:
    assert load_real("digits").read_as == {"source": "digits"}
    options: dict[str, Any] = {"image_size": 16, "fit": "resize", "train_fraction": 0.5, "classes": ["3", "1"], "seed": 1}
    real = load_real("digits", **options)
    assert real.read_as == {"source": "digits", **options}
    assert load_real(real).read_as == real.read_as
    assert (
        load_real(real.read_as["source"], **{k: v for k, v in real.read_as.items() if k != "source"}).fingerprint
        == real.fingerprint
    )
    for change in ({"image_size": 8}, {"train_fraction": 0.5}, {"classes": ["1", "3"]}):
        assert load_real(real, **change).read_as == {}  # type: ignore[arg-type]
    assert load_real((real.train.images, real.train.labels), test_fraction=0.2).read_as == {}
