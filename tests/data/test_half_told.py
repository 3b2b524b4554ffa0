"""Sources that tell half of what is needed: it is read as it is meant, or refused in a sentence."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tests.listening import Listener

from dstill import DstillError, RealSet, load_real
from dstill.data import columns, sources
from dstill.data.catalog import DATASETS

Rows = list[tuple[str, str, str]]  # name of the file, label, split


def picture(path: Path, value: int = 100, side: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), value, dtype=np.uint8)).save(path)
    return path


def listed(folder: Path, rows: Rows, *, heading: str = "file_name,label,split") -> Path:
    for name, _, _ in rows:
        picture(folder / name.replace("\\", "/"))
    lines = [heading, *(",".join(row) for row in rows)]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def counts(real: RealSet) -> tuple[int, int]:
    return len(real.train), len(real.test)


# --- ImageNet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An ImageNet of five classes, of which a subset takes the fourth and the second."""
    monkeypatch.setattr(columns, "_IMAGENET_CLASSES", 5)
    monkeypatch.setitem(DATASETS, "nette", replace(DATASETS["nette"], imagenet_ids=(3, 1), size=8))
    return [f"n0144076{i}" for i in range(5)]


def test_a_subset_takes_its_classes_from_a_folder_copy_of_imagenet(few: list[str], tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i, name in enumerate(few):
            picture(tmp_path / split / name / "0.png", 40 * i)
            picture(tmp_path / split / name / "1.png", 40 * i)
    real = load_real(f"nette@{tmp_path}")
    assert real.class_names == (few[3], few[1]) and real.known == "nette" and counts(real) == (4, 4)
    values = {int(image.float().mean()): int(label) for image, label in zip(real.train.images, real.train.labels, strict=True)}
    assert values == {120: 0, 40: 1}


def test_a_copy_of_the_subset_itself_is_taken_as_it_is(few: list[str], tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in (few[1], few[3]):
            picture(tmp_path / split / name / "0.png")
    real = load_real(f"nette@{tmp_path}")
    assert real.class_names == (few[1], few[3]) and real.known == "nette"


def test_a_folder_without_all_classes_of_imagenet_is_no_copy(few: list[str], tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in few[:3]:
            picture(tmp_path / "short" / split / name / "0.png")
        for name in ("cat", "cow", "dog", "hen", "owl"):
            picture(tmp_path / "named" / split / name / "0.png")
    with pytest.raises(DstillError, match="drawn from the 5 classes of ImageNet, but the data has 3: pass a complete copy"):
        load_real(f"nette@{tmp_path / 'short'}")
    with pytest.raises(DstillError, match="folders that are called by WordNet ids, such as n01440764, but there is cat"):
        load_real(f"nette@{tmp_path / 'named'}")
    np.savez(tmp_path / "x.npz", x_train=np.zeros((4, 8, 8, 3), np.uint8), y_train=np.arange(4))
    with pytest.raises(DstillError, match="pass class folders or Parquet files, not"):
        load_real(f"nette@{tmp_path / 'x.npz'}")


# --- splits and classes -----------------------------------------------------------------------------------------------


def test_classes_that_the_test_images_lack_cannot_be_kept() -> None:
    images = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    splits: dict[str, Any] = {"train": (images, [0, 0, 1, 1, 2, 2]), "test": (images[:2], [2, 2])}
    with pytest.raises(DstillError, match="in-memory has no test images of the classes 0, 1: keep others"):
        load_real(splits, classes=["0", "1"])
    assert counts(load_real(splits, classes=["0", "2"])) == (4, 2)
    splits["train"] = (images, [0, 0, 0, 2, 2, 2])
    with pytest.raises(DstillError, match="no training image of the class '1'"):
        load_real(splits, classes=["0", "1", "2"])


def test_a_list_may_name_splits_that_are_for_neither(tmp_path: Path) -> None:
    rows = [(f"{split}-{label}-{i}.png", label, split) for split in ("train", "test") for label in ("a", "b") for i in range(2)]
    notes = Listener()
    real = load_real(str(listed(tmp_path, [*rows, ("x.png", "a", "extra"), ("y.png", "b", "")])), progress=notes)
    assert counts(real) == (4, 4), "the test images of the list stay test images"
    assert notes.have("2 images of") and notes.have("are left out, since their split is neither")
    with pytest.raises(DstillError, match=r"no split 'extra' to test on; known: test$"):
        load_real(str(tmp_path), test_split="extra")
    other = listed(tmp_path / "other", [(f"{i}.png", "ab"[i % 2], ["one", "two"][i % 2]) for i in range(8)])
    assert counts(load_real(str(other), test_fraction=0.5)) == (4, 4), "such a column says nothing of splits"


def test_a_list_that_was_written_on_windows_finds_its_files(tmp_path: Path) -> None:
    rows = [(f"imgs\\{split}{i}.png", "ab"[i % 2], split) for split in ("train", "test") for i in range(4)]
    assert counts(load_real(str(listed(tmp_path, rows)))) == (4, 4)


@pytest.mark.parametrize("kind", ["npz", "NPZ", "saved"])
def test_training_and_testing_are_the_same_words_everywhere(kind: str, tmp_path: Path) -> None:
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.arange(4) % 2
    if kind == "saved":
        table = datasets.Dataset.from_dict({"image": [Image.fromarray(one) for one in images], "label": labels.tolist()})
        datasets.DatasetDict({"training": table, "testing": table}).save_to_disk(str(tmp_path / "x"))
        path = tmp_path / "x"
    else:
        path = tmp_path / "x.npz"
        np.savez(path, training_images=images, training_labels=labels, testing_images=images, testing_labels=labels)
        path = path.rename(tmp_path / f"x.{kind}")
    assert counts(load_real(str(path))) == (4, 4)


def test_a_split_keeps_its_name_where_another_has_the_usual_one(tmp_path: Path) -> None:
    def table(count: int) -> datasets.Dataset:
        blank = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
        return datasets.Dataset.from_dict({"image": [blank] * count, "label": [i % 2 for i in range(count)]})

    saved = datasets.DatasetDict({"Training": table(4), "test": table(2), "testing": table(6)})
    saved.save_to_disk(str(tmp_path))
    for source in (str(tmp_path), saved):
        assert counts(load_real(source)) == (4, 2)
        assert counts(load_real(source, test_split="testing")) == (4, 6)


def test_a_file_of_parquet_may_be_called_in_capitals(tmp_path: Path) -> None:
    pixels = [[[0, 255], [3, 4]]] * 4  # lists of Python numbers, which become int64
    table = datasets.Dataset.from_dict({"image": pixels, "y": [0, 1, 0, 1]})
    table = table.cast(datasets.Features({"image": datasets.Array2D((2, 2), "int64"), "y": datasets.Value("uint32")}))
    table.to_parquet(tmp_path / "X.PARQUET")
    real = load_real(str(tmp_path / "X.PARQUET"), test_fraction=0.5)
    assert real.train.images.unique().tolist() == [0, 3, 4, 255] and real.train.images.dtype == torch.uint8


# --- names of classes -------------------------------------------------------------------------------------------------


def test_names_are_given_to_numbers_that_are_written_out(tmp_path: Path) -> None:
    rows = [(f"{split}{i}.png", str(i % 2), split) for split in ("train", "test") for i in range(4)]
    source = str(listed(tmp_path, rows))
    real = load_real(source, class_names=["cat", "dog"])
    assert real.class_names == ("cat", "dog") and real.train.labels.tolist() == [0, 1, 0, 1]
    assert load_real(source, class_names=["1", "0"]).train.labels.tolist() == [1, 0, 1, 0], "or these are the names"


def test_a_name_of_two_classes_is_refused() -> None:
    with pytest.raises(DstillError, match="class_names has 'crane' more than once"):
        load_real((torch.zeros(4, 1, 4, 4), [0, 1, 2, 0]), class_names=["crane", "owl", "crane"], test_fraction=0.5)


# --- images of 16 bits ------------------------------------------------------------------------------------------------


def deep(folder: Path, largest: int) -> Path:
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            Image.fromarray(np.array([[0, 256], [512, largest]], dtype=np.uint16)).save(folder / split / label / "0.png")
    return folder


def test_images_of_12_of_16_bits_would_be_black(tmp_path: Path) -> None:
    says = r"have 16 bits, but no value above 4,095, .* by \(image >> 4\)\.astype\('uint8'\)"
    with pytest.raises(DstillError, match=says):
        load_real(str(deep(tmp_path / "dark", 4095)))
    half = deep(tmp_path / "half", 40_000)
    for label in ("a", "b"):
        shutil.copy(tmp_path / "dark" / "test" / label / "0.png", half / "test" / label / "0.png")
    assert load_real(str(half)).test.images.max() == 15, "dark test images beside bright training images are just dark"
    assert load_real(str(deep(tmp_path / "bright", 40_000))).train.images.unique().tolist() == [0, 1, 2, 156]


def test_pgm_files_have_16_bits_too(tmp_path: Path) -> None:
    content = b"P5\n2 2\n65535\n" + np.array([0, 256, 512, 65535], dtype=">u2").tobytes()
    assert Image.open(io.BytesIO(content)).mode == "I"
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "0.pgm").write_bytes(content)
    real = load_real(str(tmp_path))
    assert real.channels == 1 and real.train.images.unique().tolist() == [0, 1, 2, 255]


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_the_reason_of_the_hub_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("\nConfig name is missing.\nPlease pick one")

    monkeypatch.setattr(sources, "load_dataset", refuse)
    with pytest.raises(DstillError, match=r"from the Hugging Face hub \(ValueError: Config name is missing\.\)\. Without a"):
        load_real("owner/name")
