"""Arrays and labels in memory: every usual layout, range and kind of label, and the line of code for all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dstill.data.arrays import pairs_of, pixels
from dstill.data.labels import read_labels
from dstill.data.real import load_real
from dstill.errors import DstillError

COLOUR = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 8), dtype=np.uint8)
GREY = COLOUR[:, :1]


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (COLOUR, COLOUR),
        (COLOUR.transpose(0, 2, 3, 1), COLOUR),
        (torch.from_numpy(COLOUR).permute(0, 2, 3, 1), COLOUR),
        (GREY[:, 0], GREY),
        (GREY.transpose(0, 2, 3, 1), GREY),
        (GREY[:, 0] / 255, GREY),
        ((COLOUR / 255).astype(np.float16), COLOUR),
        (COLOUR.tolist(), COLOUR),
    ],
    ids=["NCHW", "NHWC", "NHWC tensor", "NHW", "NHW1", "NHW floats", "half floats", "lists"],
)
def test_every_usual_layout_and_range_gives_the_same_pixels(given: Any, right: np.ndarray) -> None:
    if isinstance(given, list):
        given = np.asarray(given, dtype=np.uint8)
    found = pixels(given)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert np.array_equal(found.numpy(), right)


def test_small_squares_tell_where_the_channels_are() -> None:
    assert tuple(pixels(np.zeros((2, 1, 4, 4), np.uint8)).shape) == (2, 1, 4, 4)
    assert tuple(pixels(np.zeros((2, 4, 4, 1), np.uint8)).shape) == (2, 1, 4, 4)
    assert tuple(pixels(np.zeros((2, 3, 3, 3), np.uint8)).shape) == (2, 3, 3, 3)


def test_an_ambiguous_layout_names_both_lines_and_each_of_them_helps() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 32, 3), dtype=np.uint8)
    with pytest.raises(
        DstillError, match=r"moveaxis\(images, 1, -1\) if .* axis 1, or np.moveaxis\(images, -1, 1\) if .* axis 3"
    ):
        pixels(images)
    assert np.array_equal(pixels(np.moveaxis(images, 1, -1)).numpy(), images)
    assert np.array_equal(pixels(np.moveaxis(images, -1, 1)).numpy(), images.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.zeros((5, 784), np.uint8), r"images.reshape\(-1, 1, 28, 28\)$"),
        (np.zeros((5, 3072), np.uint8), r"images.reshape\(-1, 3, 32, 32\), or \(-1, 32, 32, 3\) if channels come last"),
        (np.zeros((5, 785), np.uint8), r"images.reshape\(-1, channels, height, width\)"),
        (np.zeros((5, 9, 9, 9), np.uint8), r"shape \[N, C, H, W\] with C up to 4, got \(5, 9, 9, 9\)"),
        (np.zeros((32, 32, 3, 5), np.uint8), r"5 images along the last axis: pass np.moveaxis\(images, -1, 0\)"),
        (np.zeros((5, 1, 1, 2, 2), np.uint8), r"got \(5, 1, 1, 2, 2\)"),
        (np.zeros((5, 8, 8), np.int64), r"images.astype\('uint8'\) if they are 0 to 255"),
        (np.full((5, 8, 8), 256, np.uint16), r"\(images >> 8\).astype\('uint8'\) if they are 0 to 65535"),
        (np.full((5, 8, 8), 200.0), r"from 200 to 200. Pass images / 255"),
        (np.full((5, 8, 8), -1.0), r"from -1 to -1. Pass \(images \+ 1\) / 2"),
        (np.linspace(-2.1, 2.6, 320).reshape(5, 8, 8), r"from -2.1 to 2.6. Pass them as they were before they were normalised"),
        (np.full((5, 8, 8), np.inf), r"not finite"),
    ],
)
def test_another_layout_or_range_gets_the_line_of_code_that_helps(images: np.ndarray, says: str) -> None:
    with pytest.raises(DstillError, match=says):
        load_real((images, [0, 1, 0, 1, 0]), test_fraction=0.4)


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        [1, 0, 2],
        np.array([1, 0, 2], np.uint8),
        torch.tensor([[1], [0], [2]]),
        [[1], [0], [2]],
        [np.int64(1), 0, torch.tensor(2)],
        np.array([np.int64(1), 0, np.uint8(2)], dtype=object),
        ((1,), (0,), (2,)),
    ],
)
def test_numbers_are_read_from_columns_tensors_and_lists_of_one(labels: Any) -> None:
    found = read_labels(labels, "here")
    assert (found.ids.tolist(), found.ids.dtype, found.names) == ([1, 0, 2], np.int64, ())


@pytest.mark.parametrize(
    "words", [["dog", "cat", "owl"], np.array(["dog", "cat", "owl"]), [["dog"], ["cat"], ["owl"]], [b"dog", b"cat", b"owl"]]
)
def test_words_become_class_names_in_the_order_of_the_alphabet(words: Any) -> None:
    found = read_labels(words, "here")
    assert (found.ids.tolist(), found.names) == ([1, 0, 2], ("cat", "dog", "owl"))


def test_bytes_are_words() -> None:
    assert read_labels(np.array([b"dog", b"cat"]), "here").names == ("cat", "dog")
    assert read_labels([b"caf\xe9", b"cat"], "here").names == ("caf\ufffd", "cat")


def test_two_classes_written_minus_1_and_1_are_no_missing_labels() -> None:
    assert read_labels(["-1", "1", "1"], "here").names == ("1", "-1")
    with pytest.raises(DstillError, match=r"labels from -1 to 1.*If they are two classes, pass \(labels \+ 1\) // 2"):
        load_real((GREY, [1, -1, 1, -1, 1]), test_fraction=0.4)
    with pytest.raises(DstillError, match=r"2 have -1, which usually stands for no label"):
        load_real((GREY, [1, -1, 0, -1, 1]), test_fraction=0.4)


def test_numbers_written_out_are_sorted_by_value() -> None:
    assert read_labels(["10", "9", "x", "1"], "here").names == ("1", "9", "10", "x")


def test_class_names_name_numbers_and_order_words() -> None:
    assert read_labels([1, 0], "here", class_names=["cat", "dog", "owl"]).names == ("cat", "dog", "owl")
    by_word = read_labels(["dog", "cat"], "here", class_names=["dog", "cat"])
    assert (by_word.ids.tolist(), by_word.names) == ([0, 1], ("dog", "cat"))
    again = read_labels([0, 1, -1], "here", names=["cat", "dog"], class_names=["dog", "cat"])
    assert (again.ids.tolist(), again.names) == ([1, 0, -1], ("dog", "cat"))
    renamed = read_labels([0, 1], "here", names=["n01", "n02"], class_names=["cat", "dog"])
    assert (renamed.ids.tolist(), renamed.names) == ([0, 1], ("cat", "dog"))
    with pytest.raises(DstillError, match="here has the label 'cow', which is not among the class names; known: cat, dog"):
        read_labels(["cow"], "here", class_names=["cat", "dog"])
    with pytest.raises(DstillError, match="here has 2 classes, but 3 class_names are given"):
        read_labels([0, 1], "here", names=["a", "b"], class_names=["a", "b", "c"])
    with pytest.raises(DstillError, match="class_names must be a list of names, got the text 'cat'"):
        load_real((GREY, [0, 1, 0, 1, 0]), test_fraction=0.4, class_names="cat")


def test_class_names_reach_the_loaded_set_and_must_suffice() -> None:
    real = load_real((GREY, [0, 1, 0, 1, 0]), test_fraction=0.4, class_names=["cat", "dog"])
    assert real.class_names == ("cat", "dog")
    with pytest.raises(DstillError, match="labels from 0 to 2, but 2 classes"):
        load_real((GREY, [0, 1, 2, 1, 0]), test_fraction=0.4, class_names=["cat", "dog"])


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([[0, 2], [1], [0]], r"several labels each, or none \(for example \[0, 2\]\)"),
        ([[], [1], [0]], r"several labels each, or none \(for example \[\]\)"),
        (np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1]]), r"several labels each.*choose the images with exactly one label"),
        (torch.eye(3), r"pass labels.argmax\(1\)"),
        ([0, None, 1], r"1 of 3 images of here have no label \(rows counted from 0: 1\)"),
        (["a", "", "b"], r"1 of 3 images of here have no label"),
        ([1.0, float("nan"), 0.0], r"1 of 3 images of here have no label"),
        (["a", 1, 2], r"they are both numbers and str"),
        ([0.5, 1.0, 2.0], r"one whole number for each image, or one word: got float64. Pass labels.astype\(int\)"),
        (np.zeros((3, 1, 1), int), r"got the shape \(3, 1, 1\)"),
    ],
)
def test_what_is_no_single_class_is_said(labels: Any, says: str) -> None:
    with pytest.raises(DstillError, match=says):
        read_labels(labels, "here")


def test_labels_that_are_all_missing_are_hidden() -> None:
    assert all(read_labels(labels, "here").hidden for labels in ([-1, -1], [None, None], ["", ""], [float("nan")]))
    assert not any(read_labels(labels, "here").hidden for labels in ([], [0, -1]))


def test_labels_from_1_are_refused_unless_the_classes_are_named() -> None:
    pair = (GREY, [1, 2, 1, 2, 2])
    with pytest.raises(
        DstillError, match=r"labels from 1 to 2, but classes are numbered from 0: pass labels - 1, or .*--classes 1,2"
    ):
        load_real(pair, test_fraction=0.4)
    with pytest.raises(DstillError, match=r"--classes 1,2,3,…"):
        load_real((GREY, [1, 2, 3, 4, 4]), test_fraction=0.4)
    real = load_real({"train": pair, "test": pair}, classes=["1", "2"])
    assert (real.class_names, real.train.labels.tolist()) == (("1", "2"), [0, 1, 0, 1, 1])


# --- splits -----------------------------------------------------------------------------------------------------------


def test_pairs_of_training_and_test_arrays_are_two_splits() -> None:
    real = load_real(((GREY, [0, 1, 0, 1, 0]), (GREY[:2], [1, 0])))
    assert (len(real.train), real.test.labels.tolist()) == (5, [1, 0])
    two = load_real(((GREY[:2], [0, 1]), (GREY[:2], [1, 0])))
    assert (two.train.labels.tolist(), two.test.labels.tolist()) == ([0, 1], [1, 0])


def test_a_list_of_images_beside_labels_is_a_pair() -> None:
    assert load_real([GREY, [0, 1, 0, 1, 0]], test_fraction=0.4).train.labels.tolist() == [0, 1, 0]
    assert load_real([list(GREY), np.array([0, 1, 0, 1, 0])], test_fraction=0.4).channels == 1


def test_a_split_whose_labels_are_hidden_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("dstill.support.console.Silent.note", lambda _, text: told.append(text))
    train, secret = (GREY, [0, 1, 0, 1, 0]), (GREY[:2], [-1, -1])
    real = load_real({"train": train, "test": secret, "validation": (GREY[:3], [1, 0, 1])})
    assert real.test.labels.tolist() == [1, 0, 1]
    assert told[0] == "in-memory: the labels of test are hidden, so accuracies are measured on validation"
    with pytest.raises(
        DstillError, match=r"the labels of test are hidden, so nothing can be measured there: pass --test-fraction"
    ):
        load_real({"train": train, "test": secret})
    assert len(load_real({"train": train, "test": secret}, test_fraction=0.4).test) == 2
    with pytest.raises(DstillError, match="no training image has a label"):
        load_real({"train": secret, "test": train})


def test_the_split_to_test_on_can_be_chosen() -> None:
    splits = {
        "train": (GREY, [0, 1, 0, 1, 0]),
        "test": (GREY[:2], [1, 0]),
        "Val": (GREY[:3], [1, 0, 1]),
        "extra": (GREY[:4], [0, 0, 1, 1]),
    }
    assert [len(load_real(splits, test_split=name).test) for name in ("test", "val", "Val", "extra")] == [2, 3, 3, 4]
    assert len(load_real(splits).test) == 2
    with pytest.raises(DstillError, match="in-memory has no split 'vall' to test on; did you mean val"):
        load_real(splits, test_split="vall")
    with pytest.raises(DstillError, match="in-memory has no split 'train' to test on"):
        load_real(splits, test_split="train")


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_a_medmnist_file_is_read_with_its_columns_of_labels(tmp_path: Path) -> None:
    labels = np.array([[0], [1], [0], [1], [2]], np.uint8)
    arrays = {"train_images": GREY[:, 0], "train_labels": labels, "val_images": GREY[:1, 0], "val_labels": labels[:1]}
    path = write_npz(tmp_path / "pathmnist.npz", **arrays, test_images=GREY[:2, 0], test_labels=labels[:2])
    real = load_real(path, class_names=["a", "b", "c"])
    assert (real.name, real.channels, real.class_names, len(real.test)) == ("pathmnist", 1, ("a", "b", "c"), 2)
    assert np.array_equal(real.train.images.numpy(), GREY)
    assert len(load_real(path, test_split="val").test) == 1
    assert len(load_real(np.load(path)).test) == 2


def test_a_keras_file_is_read(tmp_path: Path) -> None:
    colour = COLOUR.transpose(0, 2, 3, 1)
    path = write_npz(tmp_path / "x.npz", x_train=colour, y_train=[0, 1, 0, 1, 0], x_test=colour[:1], y_test=[1])
    assert np.array_equal(load_real(path).train.images.numpy(), COLOUR)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"a": GREY}, r"x.npz holds a: expected train_images and train_labels"),
        ({"train_images": GREY}, r"x.npz holds train_images: expected"),
        (
            {"train_images": GREY, "train_labels": np.array([{}] * 5)},
            r"the arrays train_images and train_labels cannot be read",
        ),
        ({"train_images": GREY, "train_labels": np.eye(5)[:, :2]}, r"several labels each"),
    ],
)
def test_another_npz_file_is_refused_by_a_sentence(tmp_path: Path, arrays: dict[str, Any], says: str) -> None:
    with pytest.raises(DstillError, match=says):
        load_real(write_npz(tmp_path / "x.npz", **arrays), test_fraction=0.4)


def test_a_damaged_npz_file_is_refused_by_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DstillError, match=r"x.npz cannot be read as an .npz file"):
        load_real(tmp_path / "x.npz")


def test_arrays_are_paired_by_their_names_in_any_order() -> None:
    assert pairs_of(["labels_test", "X_train", "images_test", "Y_train"], "here") == {
        "test": ("images_test", "labels_test"),
        "train": ("X_train", "Y_train"),
    }
    assert pairs_of(["images", "labels"], "here") == {"train": ("images", "labels")}
