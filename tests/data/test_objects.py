"""What a notebook holds: data sets of PyTorch and of Hugging Face, lists of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from dstill.data.real import load_real
from dstill.errors import DstillError

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 6, 8), dtype=np.uint8))
LABELS = torch.arange(12) % 3
NAMES = ("ant", "bee", "cow")
PICTURES = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in PIXELS]


class Pets(Dataset[Any]):
    """As torchvision's: items of an image and a number, and the names of the classes."""

    def __init__(self, images: Any, labels: Any = LABELS, classes: Any = NAMES) -> None:
        self.images, self.labels, self.classes = images, labels, list(classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Any:
        return self.images[row], self.labels[row]


def table(**columns: Any) -> datasets.Dataset:
    names = datasets.ClassLabel(names=list(NAMES))
    given = {"image": PICTURES, "label": LABELS.tolist(), **columns}
    known = {"image": datasets.Image(), "label": names}
    whole = datasets.Dataset.from_dict(given)
    for column, feature in known.items():
        whole = whole.cast_column(column, feature)
    return whole


def as_tensors(row: int) -> Any:
    return PIXELS[row] / 255


FORMS: dict[str, tuple[Any, bool]] = {
    "TensorDataset": (TensorDataset(PIXELS, LABELS), False),
    "floats": (TensorDataset(PIXELS / 255, LABELS[:, None]), False),
    "Subset": (Subset(TensorDataset(PIXELS, LABELS), range(12)), False),
    "pictures": (Pets(PICTURES, LABELS.tolist()), True),
    "tensors": (Pets([as_tensors(row) for row in range(12)]), True),
    "arrays": (Pets([image.permute(1, 2, 0).numpy() for image in PIXELS]), True),
    "Subset of Subset": (Subset(Subset(Pets(PICTURES), range(12)), range(12)), True),
    "ConcatDataset": (ConcatDataset([Subset(Pets(PICTURES), range(6)), Subset(Pets(PICTURES), range(6, 12))]), True),
    "Hugging Face": (table(), True),
    "with a format": (table().with_format("torch"), True),
    "with a transform": (table().with_transform(lambda rows: {"pixel_values": rows["label"]}), True),
    "list of pairs": (list(zip(PICTURES, LABELS.tolist(), strict=True)), False),
    "list of tensor pairs": (list(zip(PIXELS, LABELS, strict=True)), False),
    "list beside labels": ((PICTURES, LABELS.tolist()), False),
    "list of tensors beside labels": ((list(PIXELS), LABELS), False),
    "mappings": ([{"img": image, "label": label} for image, label in zip(PICTURES, LABELS.tolist(), strict=True)], False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_classes(form: str) -> None:
    source, knows_names = FORMS[form]
    if form == "mappings":
        source = Listed(source)
    real = load_real((source, source))
    assert torch.equal(real.train.images, PIXELS) and torch.equal(real.test.images, PIXELS)
    assert torch.equal(real.train.labels, LABELS)
    assert real.class_names == (NAMES if knows_names else ("0", "1", "2"))


class Listed:
    """Items without anything else."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> Any:
        return self.items[row]


@pytest.mark.parametrize(
    "source", [TensorDataset(PIXELS, LABELS), Pets(PICTURES), table(), list(zip(PICTURES, LABELS, strict=True))]
)
def test_a_single_data_set_is_cut_by_a_test_fraction(source: Any) -> None:
    real = load_real(source, test_fraction=0.25)
    assert (len(real.train), sorted(real.test.labels.tolist())) == (9, [0, 1, 2])
    with pytest.raises(DstillError, match=r"has no test split \(found: train\).*test_fraction=0.1"):
        load_real(source)


def test_a_dict_of_data_sets_has_its_splits() -> None:
    both = datasets.DatasetDict({"train": table(), "validation": table().select(range(4))})
    assert len(load_real(both).test) == 4
    with pytest.raises(DstillError, match=r"has no test split \(found: train\)"):
        load_real(datasets.DatasetDict({"train": table()}))
    assert len(load_real({"train": Pets(PICTURES), "test": Subset(Pets(PICTURES), [0, 1])}).test) == 2


def test_pictures_take_a_size_and_paths_are_opened(tmp_path: Path) -> None:
    for row, picture in enumerate(PICTURES):
        picture.save(tmp_path / f"{row}.png")
    paths = [(str(tmp_path / f"{row}.png"), NAMES[row % 3]) for row in range(12)]
    real = load_real(paths, test_fraction=0.25, image_size=4, fit="crop")
    assert (real.size, real.class_names) == ((4, 4), NAMES)
    assert load_real(Pets([as_tensors(row) for row in range(12)]), test_fraction=0.25, image_size=4).size == (4, 4)


def test_arrays_of_several_shapes_take_a_size() -> None:
    uneven = Pets([torch.zeros(3, 8 + row, 8) for row in range(6)], [0, 1] * 3)
    assert load_real(uneven, test_fraction=0.34, image_size=8).size == (8, 8)


def test_a_subset_of_the_classes_keeps_those_that_are_named() -> None:
    some = Subset(Pets(PICTURES), [row for row in range(12) if row % 3 != 1])
    real = load_real(some, test_fraction=0.25, classes=["ant", "cow"])
    assert (real.class_names, len(real.train), sorted(real.test.labels.tolist())) == (("ant", "cow"), 6, [0, 1])


def test_class_names_of_the_user_name_the_numbers() -> None:
    assert load_real(TensorDataset(PIXELS, LABELS), test_fraction=0.25, class_names=NAMES).class_names == NAMES


def test_several_labels_in_a_subset_are_said() -> None:
    several = TensorDataset(PIXELS, torch.tensor([[1, 0, 1], [0, 1, 1]]).repeat(6, 1))
    for source in (several, Subset(several, range(9))):
        with pytest.raises(DstillError, match="have several labels each"):
            load_real(source, test_fraction=0.25)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield PIXELS[0], 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: DataLoader(TensorDataset(PIXELS, LABELS)), "pass its data set, loader.dataset"),
        (lambda: table().to_pandas(), "pass datasets.Dataset.from_pandas"),
        (lambda: PICTURES, "a list of images without labels"),
        (lambda: PIXELS, r"pairs \(images, labels\), got Tensor .*pass \(images, labels\)"),
        (lambda: Stream(), r"pairs \(images, labels\), got Stream"),
        (lambda: TensorDataset(PIXELS), "gives 1 values for each image"),
        (lambda: TensorDataset(PIXELS, LABELS, LABELS), "gives 3 values for each image"),
        (lambda: Listed(list(PIXELS)), "gives Tensor alone for each image"),
        (lambda: Listed([]), r"in-memory \(train\) has no images"),
        (lambda: Listed([{"a": 1}]), r"have the keys a: pass the one of the images as image_column"),
        (lambda: Pets([PIXELS[0], PIXELS[1, :, :4]], [0, 1]), r"differ in shape \(\(3, 6, 8\) and \(3, 4, 8\).*image_size"),
        (lambda: (PICTURES, 3), "labels must be one whole number for each image, got int"),
        (lambda: (PICTURES, "cat"), "labels must be one whole number for each image, got str"),
        (lambda: (PICTURES, [0, 1]), "got 2 labels for 12 images"),
        (lambda: 7, r"pairs \(images, labels\), got int"),
    ],
)
def test_what_is_no_labelled_image_set_is_said_with_the_remedy(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(DstillError, match=says):
        load_real(make(), test_fraction=0.25)


def test_columns_are_asked_about_and_can_be_named() -> None:
    two = table(species=LABELS.flip(0).tolist()).cast_column("species", datasets.ClassLabel(names=["x", "y", "z"]))
    with pytest.raises(DstillError, match=r"label and species may each be the column of classes: pass --label-column label"):
        load_real(two, test_fraction=0.25)
    assert load_real(two, test_fraction=0.25, label_column="species").class_names == ("x", "y", "z")
    masks = table(mask=PICTURES).cast_column("mask", datasets.Image())
    with pytest.raises(DstillError, match=r"image and mask may each be the column of images: pass --image-column image"):
        load_real(masks, test_fraction=0.25)
    assert load_real(masks, test_fraction=0.25, image_column="mask").channels == 3
    with pytest.raises(DstillError, match="has no column 'lable'; did you mean label"):
        load_real(two, test_fraction=0.25, label_column="lable")
    items = Listed([{"image": PIXELS[row], "fine": row % 2, "coarse": 0} for row in range(4)])
    assert load_real(items, test_fraction=0.5, label_column="fine").train.labels.tolist() == [0, 1]
    with pytest.raises(DstillError, match="no columns: leave out image_column and label_column"):
        load_real((PIXELS, LABELS), test_fraction=0.25, label_column="label")


def test_the_labels_of_cifar100_are_known_to_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    fine = table().rename_column("label", "fine_label")
    both = fine.add_column("coarse_label", [0, 1] * 6).cast_column("coarse_label", datasets.ClassLabel(names=["p", "q"]))
    real = load_real({"train": both, "test": both}, progress=True)
    assert real.class_names == NAMES
    assert capsys.readouterr().err.count("the classes are those of fine_label; --label-column takes another of") == 1
    assert load_real(both, test_fraction=0.25, label_column="coarse_label").class_names == ("p", "q")


def test_mappings_of_pictures_take_the_names_of_their_keys() -> None:
    items = Listed([{"photo": PICTURES[row], "breed": NAMES[row % 3], "id": row} for row in range(12)])
    real = load_real(items, test_fraction=0.25, image_column="photo", label_column="breed")
    assert (real.class_names, real.channels) == (NAMES, 3)
    with pytest.raises(DstillError, match="have the keys photo, breed, id: pass the one of the images as image_column"):
        load_real(items, test_fraction=0.25)


def test_a_test_split_without_a_column_of_classes_is_hidden() -> None:
    splits = {"train": table(), "test": table().remove_columns("label")}
    with pytest.raises(DstillError, match="the labels of test are hidden"):
        load_real(splits)
    assert len(load_real(splits, test_fraction=0.25).test) == 3
    with pytest.raises(DstillError, match="no training image has a label: sort the images into a folder"):
        load_real({"train": splits["test"], "test": table()})


def test_a_column_of_something_else_than_images_is_said() -> None:
    with pytest.raises(DstillError, match=r"cannot be read: row 0 \(the cell holds int\)"):
        load_real(table(number=list(range(12))), test_fraction=0.25, image_column="number")


def test_a_set_that_is_loaded_refuses_the_options_of_reading(tiny_real: Any) -> None:
    options: tuple[dict[str, Any], ...] = (
        {"test_fraction": 0.1},
        {"test_split": "val"},
        {"class_names": ["a", "b", "c"]},
        {"label_column": "label"},
        {"image_column": "image"},
        {"skip_damaged": True},
    )
    for option in options:
        with pytest.raises(DstillError, match="tiny is loaded already"):
            load_real(tiny_real, **option)


@pytest.mark.parametrize("kind", ["lists", "Array2D", "Array3D"])
def test_columns_of_arrays_are_images(kind: str) -> None:
    grey = PIXELS[:, 0].numpy()
    feature = {
        "lists": datasets.List(datasets.List(datasets.Value("uint8"))),
        "Array2D": datasets.Array2D((6, 8), "uint8"),
        "Array3D": datasets.Array3D((1, 6, 8), "uint8"),
    }[kind]
    given = grey[:, None] if kind == "Array3D" else grey
    features = datasets.Features({"pixels": feature, "label": datasets.ClassLabel(names=list(NAMES))})
    arrays = datasets.Dataset.from_dict({"pixels": given.tolist(), "label": LABELS.tolist()}, features=features)
    assert torch.equal(load_real((arrays, arrays)).train.images, PIXELS[:, :1])


def test_what_datasets_has_saved_to_disk_is_read(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(), "test": table().select(range(3))}).save_to_disk(tmp_path / "both")
    table().save_to_disk(tmp_path / "one")
    both = load_real(tmp_path / "both")
    assert (both.name, both.class_names, len(both.test)) == ("both", NAMES, 3)
    assert torch.equal(both.train.images, PIXELS)
    assert len(load_real(tmp_path / "one", test_fraction=0.25).train) == 9


def test_grey_pictures_beside_colour_arrays_get_three_channels() -> None:
    grey = [(picture.convert("L"), label) for picture, label in zip(PICTURES, LABELS.tolist(), strict=True)]
    assert load_real({"train": (PIXELS, LABELS), "test": grey}).test.images.shape[1] == 3
    assert load_real({"train": (PIXELS[:, :1], LABELS), "test": grey}).test.images.shape[1] == 1
    with pytest.raises(DstillError, match="convert them to one number of channels"):
        load_real({"train": (PIXELS, LABELS), "test": (PIXELS[:, :1], LABELS)})


def test_two_paths_beside_two_words_are_images_and_labels(tmp_path: Path) -> None:
    for name, picture in zip(("a.png", "b.png"), PICTURES[:2], strict=True):
        picture.save(tmp_path / name)
    pair = ([str(tmp_path / "a.png"), str(tmp_path / "b.png")], ["cat", "dog"])
    real = load_real({"train": pair, "test": pair})
    assert (real.class_names, real.train.labels.tolist()) == (("cat", "dog"), [0, 1])
    assert torch.equal(real.train.images, PIXELS[:2])
