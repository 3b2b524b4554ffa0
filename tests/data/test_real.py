from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from dstill.data.catalog import DATASETS
from dstill.data.preprocess import Standardise
from dstill.data.real import RealSet, check_ipc, load_real
from dstill.errors import DstillError

# --- writing data sets ------------------------------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def plain(value: int, height: int = 8, width: int = 8, *, grey: bool = False) -> np.ndarray:
    """An image of a single value, which identifies it in a test."""
    return np.full((height, width) if grey else (height, width, 3), value, dtype=np.uint8)


def write_folder(root: Path, files: Mapping[str, np.ndarray]) -> Path:
    for name, pixels in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(pixels))
    return root


def write_parquet(
    path: Path,
    images: Sequence[np.ndarray | bytes | None],
    labels: Sequence[int],
    names: Sequence[str] | None,
    *,
    label: str = "label",
) -> Path:
    """The layout that `datasets` writes: a struct of bytes and path, class names in the schema's metadata."""
    cells = [png(image) if isinstance(image, np.ndarray) else image for image in images]
    rows = [None if cell is None else {"bytes": cell, "path": f"{path.stem}-{i}.png"} for i, cell in enumerate(cells)]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(rows, struct), label: pa.array(labels, pa.int64())})
    label_type = {"_type": "Value", "dtype": "int64"} if names is None else {"_type": "ClassLabel", "names": list(names)}
    features = {"image": {"_type": "Image"}, label: label_type}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})}), path)
    return path


def write_pair(folder: Path, name: str = "pets", test: str = "test") -> Path:
    """Cats of even and dogs of odd value, in two Parquet files; returns the training file."""
    write_parquet(folder / f"{name}-{test}.parquet", [plain(100), plain(101)], [0, 1], ["cat", "dog"])
    return write_parquet(folder / f"{name}-train.parquet", [plain(v) for v in range(6)], [0, 1] * 3, ["cat", "dog"])


def arrays(labels: Sequence[int], *, channels: int = 3, side: int = 8) -> tuple[Tensor, list[int]]:
    """Images of distinct values with these labels."""
    values = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    return values.expand(-1, channels, side, side).contiguous(), list(labels)


def values(images: Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


# --- sources ----------------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_in_steps_of_15():
    from sklearn.datasets import load_digits

    real = load_real("digits")
    assert (real.name, real.channels, real.size, real.classes) == ("digits", 1, (8, 8), 10)
    assert (len(real.train), len(real.test)) == (1437, 360)
    ours = torch.cat([real.train.images, real.test.images]).flatten(1).numpy()
    theirs = load_digits().data * 15
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, theirs.astype(int).tolist()))


def test_digits_hold_out_a_fifth_of_each_class():
    real = load_real("digits")
    train, test = (torch.bincount(split.labels) for split in (real.train, real.test))
    assert ((test / (train + test) - 0.2).abs() < 0.01).all()


def test_a_mapping_of_arrays_becomes_both_splits():
    real = load_real({"train": arrays([0, 1, 2, 0]), "test": arrays([2, 1])})
    assert real.class_names == ("0", "1", "2")
    assert values(real.train.images) == [0, 1, 2, 3]
    assert real.train.labels.tolist() == [0, 1, 2, 0]
    assert real.test.labels.tolist() == [2, 1]


@pytest.mark.parametrize("key", ["test", "val", "valid", "validation"])
def test_a_split_by_any_usual_name_is_the_test_set(key: str):
    assert len(load_real({"train": arrays([0, 1]), key: arrays([0, 1, 1])}).test) == 3


def test_floats_in_0_to_1_become_bytes():
    pixels = np.linspace(0, 1, 2 * 1 * 2 * 2, dtype=np.float32).reshape(2, 1, 2, 2)
    real = load_real({"train": (pixels, np.array([0, 1])), "test": (pixels, np.array([0, 1]))})
    assert real.train.images.dtype == torch.uint8
    assert real.train.images.flatten().tolist() == [0, 36, 73, 109, 146, 182, 219, 255]


def test_a_pair_is_cut_into_training_and_test_images():
    real = load_real(arrays([0, 1] * 10), test_fraction=0.3)
    assert (len(real.train), len(real.test)) == (14, 6)
    assert real.test.labels.bincount().tolist() == [3, 3]
    assert sorted(values(real.train.images) + values(real.test.images)) == list(range(20))


def test_the_cut_depends_on_the_seed_alone():
    cuts = [values(load_real(arrays([0, 1] * 10), test_fraction=0.3, seed=seed).test.images) for seed in (0, 0, 1)]
    assert cuts[0] == cuts[1] != cuts[2]


def test_a_folder_of_images_is_read_by_class_and_split(tmp_path: Path):
    write_folder(
        tmp_path,
        {
            "train/cat/a.png": plain(10),
            "train/cat/b.png": plain(11),
            "train/dog/a.png": plain(20),
            "test/cat/a.png": plain(12),
            "test/dog/a.png": plain(21),
        },
    )
    real = load_real(tmp_path)
    assert (real.name, real.class_names, real.channels, real.size) == (tmp_path.name, ("cat", "dog"), 3, (8, 8))
    by_class = {real.class_names[c]: [] for c in range(2)}
    for value, label in zip(values(real.train.images), real.train.labels.tolist(), strict=True):
        by_class[real.class_names[label]].append(value)
    assert by_class == {"cat": [10, 11], "dog": [20]}
    assert sorted(values(real.test.images)) == [12, 21]


def test_a_class_may_be_called_like_a_split_and_files_like_another(tmp_path: Path):
    shades = {"train": 10, "car": 20, "test tube": 30}
    for split, more in (("train", 0), ("test", 100)):
        write_folder(tmp_path, {f"{split}/{c}/test_{i}.png": plain(v + i + more) for c, v in shades.items() for i in range(2)})
    real = load_real(tmp_path)
    assert real.class_names == ("car", "test tube", "train")
    assert values(real.train.images) == [20, 21, 30, 31, 10, 11]
    assert values(real.test.images) == [120, 121, 130, 131, 110, 111]


def test_a_class_beside_others_may_be_called_like_a_split(tmp_path: Path):
    write_folder(tmp_path, {f"{c}/{i}.png": plain(i) for c in ("bus", "train") for i in range(4)})
    assert load_real(tmp_path, test_fraction=0.25).class_names == ("bus", "train")


def test_the_images_of_a_class_may_lie_deeper(tmp_path: Path):
    write_folder(tmp_path, {f"{s}/{c}/images/x.png": plain(1) for s in ("train", "val") for c in ("cat", "dog")})
    assert load_real(tmp_path).class_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("extra/x.png", "extra has images that belong to no split and no class"),
        ("test/x.png", "x.png lies beside the class folders"),
        ("train/cat/test/x.png", "train/cat/test looks like a split"),
    ],
)
def test_an_image_that_cannot_be_placed_is_named(tmp_path: Path, name: str, says: str):
    write_folder(tmp_path, {f"{s}/{c}/x.png": plain(1) for s in ("train", "test") for c in ("cat", "dog")})
    with pytest.raises(DstillError, match=says):
        load_real(write_folder(tmp_path, {name: plain(2)}))


def test_a_folder_of_data_sets_is_not_a_data_set(tmp_path: Path):
    write_folder(tmp_path, {f"{d}/train/{c}/x.png": plain(1) for d in ("pets", "cars") for c in ("cat", "dog")})
    with pytest.raises(DstillError, match=r"cars/train looks like a split inside of a class: pass .*cars itself"):
        load_real(tmp_path)


def test_a_path_may_have_brackets(tmp_path: Path):
    write_pair(tmp_path / "pets [v2]")
    assert len(load_real(tmp_path / "pets [v2]").train) == 6
    write_folder(tmp_path / "pics [v2]", {f"{s}/{c}/x.png": plain(1) for s in ("train", "test") for c in ("cat", "dog")})
    assert len(load_real(tmp_path / "pics [v2]").train) == 2


def test_a_folder_of_class_folders_needs_and_takes_a_test_fraction(tmp_path: Path):
    write_folder(tmp_path, {f"{c}/{i}.png": plain(i) for c in ("cat", "dog") for i in range(4)})
    with pytest.raises(DstillError, match=r"no test split \(found: train\).*--test-fraction"):
        load_real(tmp_path)
    real = load_real(tmp_path, test_fraction=0.25)
    assert real.test.labels.tolist() == [0, 1]
    assert real.train.labels.bincount().tolist() == [3, 3]


def test_pixels_keep_their_place_and_colour(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_folder(tmp_path, {f"{s}/{c}/x.png": pixels for s in ("train", "test") for c in ("cat", "dog")})
    assert np.array_equal(load_real(tmp_path).train.images[0].permute(1, 2, 0).numpy(), pixels)


def test_grey_files_give_one_channel(tmp_path: Path):
    write_folder(tmp_path, {f"{s}/{c}/x.png": plain(9, grey=True) for s in ("train", "test") for c in ("cat", "dog")})
    assert load_real(tmp_path).channels == 1


def test_one_colour_image_among_many_grey_ones_gives_three_channels(tmp_path: Path):
    colour = plain(0)
    colour[..., 0] = 255
    images = [plain(v, grey=True) for v in range(140)]
    images[33] = colour
    write_parquet(tmp_path / "x-test.parquet", images[:2], [0, 1], ["cat", "dog"])
    real = load_real(write_parquet(tmp_path / "x-train.parquet", images, [0, 1] * 70, ["cat", "dog"]))
    assert real.channels == 3
    assert real.train.images[33].flatten(1).unique(dim=1).flatten().tolist() == [255, 0, 0]
    assert real.train.images[34].unique().tolist() == [34]


def test_sixteen_bit_grey_is_scaled_down_and_not_clipped(tmp_path: Path):
    ramp = np.array([[0, 256], [32768, 65535]], dtype=np.uint16)
    write_folder(tmp_path, {f"{s}/{c}/x.png": ramp for s in ("train", "test") for c in ("cat", "dog")})
    assert load_real(tmp_path).train.images[0].flatten().tolist() == [0, 1, 128, 255]


def test_a_parquet_file_finds_its_test_file_beside_it(tmp_path: Path):
    real = load_real(write_pair(tmp_path))
    assert (real.name, real.class_names) == ("pets", ("cat", "dog"))
    assert values(real.train.images) == list(range(6))
    assert values(real.test.images) == [100, 101]


def test_a_parquet_file_takes_a_validation_file_where_there_is_no_test_file(tmp_path: Path):
    assert len(load_real(write_pair(tmp_path, test="val")).test) == 2


def test_folders_of_parquet_files_are_splits(tmp_path: Path):
    for split, shade in (("train", 10), ("test", 50)):
        (tmp_path / split).mkdir()
        write_parquet(tmp_path / split / "0000.parquet", [plain(shade), plain(shade + 1)], [0, 1], ["cat", "dog"])
    real = load_real(str(tmp_path))
    assert real.train.images[:, 0, 0, 0].tolist() == [10, 11]
    assert real.test.images[:, 0, 0, 0].tolist() == [50, 51]


def test_a_folder_of_parquet_shards_in_the_hub_layout_is_one_data_set(tmp_path: Path):
    names = ["cat", "dog"]
    for shard in range(2):
        path = tmp_path / "data" / f"train-0000{shard}-of-00002.parquet"
        write_parquet(path, [plain(10 * shard), plain(10 * shard + 1)], [0, 1], names)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [plain(50), plain(51)], [1, 0], names)
    real = load_real(str(tmp_path))
    assert (values(real.train.images), real.train.labels.tolist()) == ([0, 1, 10, 11], [0, 1, 0, 1])
    assert (values(real.test.images), real.test.labels.tolist()) == ([50, 51], [1, 0])


def test_a_pattern_names_the_files_of_one_data_set_among_others(tmp_path: Path):
    write_pair(tmp_path, "pets")
    write_parquet(tmp_path / "cars-train.parquet", [plain(7)], [0], ["car"])
    real = load_real(f"{tmp_path}/pets-*.parquet")
    assert (real.name, len(real.train), len(real.test)) == ("pets", 6, 2)


def test_the_folder_around_a_parquet_file_does_not_name_its_split(tmp_path: Path):
    path = write_parquet(tmp_path / "test" / "pets.parquet", [plain(v) for v in range(8)], [0, 1] * 4, ["cat", "dog"])
    assert len(load_real(path, test_fraction=0.25).train) == 6


def test_a_third_split_on_the_hub_layout_is_left_alone(tmp_path: Path):
    for split, shade in (("train", 10), ("test", 50), ("extra", 90)):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [plain(shade), plain(shade + 1)], [0, 1], ["cat", "dog"])
    real = load_real(tmp_path)
    assert (values(real.train.images), values(real.test.images)) == ([10, 11], [50, 51])


def test_a_parquet_file_that_names_no_split_is_not_joined_to_those_that_do(tmp_path: Path):
    write_pair(tmp_path)
    write_parquet(tmp_path / "more.parquet", [plain(90), plain(91)], [0, 1], ["cat", "dog"])
    with pytest.raises(DstillError, match=r"more.parquet does not say which split it is"):
        load_real(tmp_path)


@pytest.mark.parametrize(("train", "test"), [("training", "testing"), ("train", "eval"), ("train", "dev")])
def test_the_usual_words_for_splits_are_known(tmp_path: Path, train: str, test: str):
    for split, shade in ((train, 10), (test, 50)):
        write_parquet(tmp_path / "tables" / f"{split}.parquet", [plain(shade), plain(shade + 1)], [0, 1], ["cat", "dog"])
        write_folder(tmp_path / "files", {f"{split}/{c}/x.png": plain(shade + i) for i, c in enumerate(("cat", "dog"))})
    for kind in ("tables", "files"):
        real = load_real(tmp_path / kind)
        assert (values(real.train.images), values(real.test.images)) == ([10, 11], [50, 51])


def test_files_of_two_data_sets_are_never_joined(tmp_path: Path):
    write_pair(tmp_path, "pets")
    write_parquet(tmp_path / "cars-train.parquet", [plain(7), plain(8)], [0, 1], ["car", "van"])
    with pytest.raises(DstillError, match=r"cars-train.parquet and .*pets-train.parquet differ in columns or classes"):
        load_real(tmp_path)


def test_validation_images_do_not_join_the_test_set(tmp_path: Path):
    write_pair(tmp_path)
    write_parquet(tmp_path / "pets-val.parquet", [plain(200)] * 5, [0] * 5, ["cat", "dog"])
    assert values(load_real(tmp_path).test.images) == [100, 101]


def test_classes_are_aligned_by_name_between_files_of_another_order(tmp_path: Path):
    train = write_parquet(tmp_path / "x-train.parquet", [plain(1), plain(2), plain(3)], [0, 1, 2], ["ant", "bee", "cow"])
    write_parquet(tmp_path / "x-test.parquet", [plain(3), plain(1), plain(2)], [0, 1, 2], ["cow", "ant", "bee"])
    real = load_real(train)
    assert real.class_names == ("ant", "bee", "cow")
    assert real.train.labels.tolist() == [0, 1, 2]
    assert dict(zip(values(real.test.images), real.test.labels.tolist(), strict=True)) == {1: 0, 2: 1, 3: 2}


def test_a_test_file_may_lack_a_class(tmp_path: Path):
    train = write_parquet(tmp_path / "x-train.parquet", [plain(1), plain(2), plain(3)], [0, 1, 2], ["ant", "bee", "cow"])
    write_parquet(tmp_path / "x-test.parquet", [plain(3)], [0], ["cow"])
    assert load_real(train).test.labels.tolist() == [2]


def test_a_named_set_is_read_from_a_copy_with_the_catalogues_label_column_and_fit(tmp_path: Path):
    for split in ("train", "test"):
        images = [plain(200, 28, 28, grey=True)] * 2
        write_parquet(tmp_path / f"mnist-{split}.parquet", images, [0, 1], ["0", "1"])
        write_parquet(tmp_path / f"cifar-{split}.parquet", images, [1, 0], ["fox", "owl"], label="fine_label")
    mnist = load_real(f"mnist@{tmp_path}/mnist-*.parquet")
    assert (mnist.name, mnist.size) == ("mnist", (32, 32))
    assert mnist.train.images[0, 0].float().mean() == 200 * 28 * 28 / 32**2  # padded with zeros, not stretched
    cifar = load_real(f"cifar100@{tmp_path}/cifar-train.parquet")
    assert (cifar.class_names, cifar.train.labels.tolist()) == (("fox", "owl"), [1, 0])


def test_the_catalogues_fit_holds_also_at_a_size_of_the_users(tmp_path: Path):
    for split in ("train", "test"):
        write_parquet(tmp_path / f"x-{split}.parquet", [plain(200, 28, 28, grey=True)] * 2, [0, 1], ["0", "1"])
    real = load_real(f"mnist@{tmp_path}", image_size=36)
    assert real.train.images[0, 0].float().mean() == pytest.approx(200 * 28 * 28 / 36**2)


def test_an_imagenet_subset_is_drawn_from_a_copy_in_the_order_of_its_indices(tmp_path: Path):
    names = [f"class {i}" for i in range(1000)]
    ids = DATASETS["woof"].imagenet_ids
    assert ids != tuple(sorted(ids))
    images, labels = [plain(i, 130, 160) for i in range(20)], [*ids, *range(10)]
    train = write_parquet(tmp_path / "train-0.parquet", images, labels, names)
    write_parquet(tmp_path / "test-0.parquet", [plain(0, 130, 130)] * 3, [-1] * 3, names)  # unlabelled, as on the hub
    write_parquet(tmp_path / "val-0.parquet", images[:10], list(ids), names)
    real = load_real(f"woof@{train.parent}")
    assert real.class_names == tuple(f"class {i}" for i in ids)
    assert (real.train.labels.tolist(), values(real.train.images)) == (list(range(10)), list(range(10)))
    assert (real.size, len(real.test)) == ((128, 128), 10)


def test_an_imagenet_subset_is_refused_where_the_classes_are_not_imagenets(tmp_path: Path):
    train = write_pair(tmp_path)
    with pytest.raises(DstillError, match="nette is drawn from the 1000 classes of ImageNet, but the data has 2"):
        load_real(f"nette@{train}")


# --- sizes ------------------------------------------------------------------------------------------------------------


def write_gradient(root: Path) -> Path:
    """Images of 4x8 pixels, dark on the left half and bright on the right."""
    pixels = np.concatenate([plain(40, 4, 4, grey=True), plain(200, 4, 4, grey=True)], 1)
    return write_folder(root, {f"{s}/{c}/x.png": pixels for s in ("train", "test") for c in ("cat", "dog")})


def test_padding_centres_the_image_on_zeros(tmp_path: Path):
    image = load_real(write_gradient(tmp_path), image_size=8, fit="pad").train.images[0, 0]
    assert image[:2].sum() == 0 and image[6:].sum() == 0
    assert image[2:6, :4].unique().tolist() == [40]
    assert image[2:6, 4:].unique().tolist() == [200]


def test_cropping_keeps_the_centre_of_the_shorter_side(tmp_path: Path):
    image = load_real(write_gradient(tmp_path), image_size=4, fit="crop").train.images[0, 0]
    assert image.tolist() == [[40, 40, 200, 200]] * 4


def test_cropping_enlarges_a_small_image(tmp_path: Path):
    assert load_real(write_gradient(tmp_path), image_size=6, fit="crop").size == (6, 6)


@pytest.mark.parametrize("fit", ["resize", None])
def test_resizing_squeezes_the_whole_image_and_is_the_default(tmp_path: Path, fit: str | None):
    image = load_real(write_gradient(tmp_path), image_size=4, fit=fit).train.images[0, 0]
    assert (image[:, 0] == 40).all() and (image[:, 3] == 200).all()
    assert ((image[:, 1] < 120) & (image[:, 2] > 120)).all()


def test_an_image_too_large_to_pad_is_refused(tmp_path: Path):
    with pytest.raises(DstillError, match="8x4 cannot be padded to 6x6: use --fit resize or crop"):
        load_real(write_gradient(tmp_path), image_size=6, fit="pad")


def test_another_size_is_refused_by_the_fit_error(tmp_path: Path):
    with pytest.raises(DstillError, match="8x4, not 8x8: pass --fit pad, resize or crop"):
        load_real(write_gradient(tmp_path), image_size=8, fit="error")


def test_images_of_several_sizes_need_a_size(tmp_path: Path):
    files = {"train/cat/a.png": plain(1, 8, 8), "train/dog/b.png": plain(2, 8, 10), "test/cat/a.png": plain(1)}
    write_folder(tmp_path, {**files, "test/dog/a.png": plain(1)})
    with pytest.raises(DstillError, match=r"differ in size \(8x8 and 10x8: .*b.png\): pass --image-size"):
        load_real(tmp_path)
    assert load_real(tmp_path, image_size=8).size == (8, 8)


def test_training_and_test_images_of_different_size_need_a_size():
    with pytest.raises(DstillError, match="pass --image-size"):
        load_real({"train": arrays([0, 1], side=8), "test": arrays([0, 1], side=10)})
    assert load_real({"train": arrays([0, 1], side=8), "test": arrays([0, 1], side=10)}, image_size=9).size == (9, 9)


def test_embedded_and_loaded_images_take_a_size_like_files(tiny_real: RealSet):
    padded = load_real(tiny_real, image_size=10, fit="pad")
    assert torch.equal(padded.train.images[:, :, 1:9, 1:9], tiny_real.train.images)
    assert padded.fingerprint != tiny_real.fingerprint
    assert load_real("digits", image_size=16).test.images.shape == (360, 1, 16, 16)


def test_an_unknown_fit_is_answered_with_a_close_one(tmp_path: Path):
    with pytest.raises(DstillError, match="unknown fit 'crops'; did you mean crop"):
        load_real(tmp_path, image_size=8, fit="crops")


# --- parts of a set ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fraction", "each"), [(0.25, 5), (0.26, 5), (0.29, 6), (0.01, 1)])
def test_a_train_fraction_keeps_its_share_of_each_class_and_every_test_image(tiny_real: RealSet, fraction: float, each: int):
    part = load_real(tiny_real, train_fraction=fraction)
    assert part.train.labels.bincount().tolist() == [each] * 3
    assert torch.equal(part.test.images, tiny_real.test.images)
    assert part.fingerprint != tiny_real.fingerprint


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_a_train_fraction_outside_its_range_is_refused(tiny_real: RealSet, fraction: float):
    with pytest.raises(DstillError, match="train_fraction must be above 0 and at most 1"):
        load_real(tiny_real, train_fraction=fraction)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 2.0])
def test_a_test_fraction_outside_its_range_is_refused(fraction: float):
    with pytest.raises(DstillError, match="must be above 0 and below 1"):
        load_real(arrays([0, 1] * 5), test_fraction=fraction)


def test_classes_are_kept_in_the_order_asked_for(tiny_real: RealSet):
    part = load_real(tiny_real, classes=["checks", "stripes"])
    assert part.class_names == ("checks", "stripes")
    for ours, theirs in ((part.train, tiny_real.train), (part.test, tiny_real.test)):
        assert torch.equal(ours.images[ours.labels == 0], theirs.images[theirs.labels == 2])
        assert torch.equal(ours.images[ours.labels == 1], theirs.images[theirs.labels == 0])
        assert len(ours) == int((theirs.labels != 1).sum())


def test_classes_may_be_named_by_their_ids(tiny_real: RealSet):
    assert load_real(tiny_real, classes=["2", "columns"]).class_names == ("checks", "columns")


def test_an_unknown_class_is_answered_with_a_close_one(tiny_real: RealSet):
    with pytest.raises(DstillError, match="tiny has no class 'check'; did you mean checks"):
        load_real(tiny_real, classes=["check", "stripes"])


def test_a_class_named_twice_is_refused(tiny_real: RealSet):
    with pytest.raises(DstillError, match="classes are named twice: stripes, 0"):
        load_real(tiny_real, classes=["stripes", "0"])


def test_one_class_alone_is_refused(tiny_real: RealSet):
    with pytest.raises(DstillError, match="tiny has 1 class: distillation needs at least two"):
        load_real(tiny_real, classes=["stripes"])


def test_a_loaded_set_is_returned_as_it_is(tiny_real: RealSet):
    assert load_real(tiny_real) is tiny_real


def test_a_holdout_takes_a_tenth_of_each_class_off_the_training_images(tiny_real: RealSet):
    choosing = tiny_real.holdout(seed=0)
    assert choosing.judged_on == "validation"
    assert choosing.test.labels.bincount().tolist() == [2, 2, 2]
    assert choosing.train.labels.bincount().tolist() == [18, 18, 18]


def test_a_holdout_is_disjoint_from_what_is_trained_on_and_never_shows_test_images(tiny_real: RealSet):
    choosing = tiny_real.holdout(seed=0, fraction=0.3)
    train, test, fitting, validation = (
        {image.numpy().tobytes() for image in split.images}
        for split in (tiny_real.train, tiny_real.test, choosing.train, choosing.test)
    )
    assert len(train) == 60 and not train & test  # every image is distinct
    assert fitting | validation == train
    assert not fitting & validation
    assert not (fitting | validation) & test


def test_a_holdout_keeps_each_image_with_its_label(tiny_real: RealSet):
    label = {image.numpy().tobytes(): int(c) for image, c in zip(tiny_real.train.images, tiny_real.train.labels, strict=True)}
    for split in (tiny_real.holdout(seed=3).train, tiny_real.holdout(seed=3).test):
        assert [label[image.numpy().tobytes()] for image in split.images] == split.labels.tolist()


def test_a_holdout_is_not_what_its_source_reads():
    assert load_real("digits").read_as and not load_real("digits").holdout(0).read_as


def test_a_holdout_depends_on_its_seed_alone(tiny_real: RealSet):
    assert tiny_real.holdout(seed=1).fingerprint == tiny_real.holdout(seed=1).fingerprint
    assert len({real.fingerprint for real in (tiny_real, tiny_real.holdout(1), tiny_real.holdout(2))}) == 3


def test_a_holdout_of_a_class_with_one_image_is_refused():
    real = load_real({"train": arrays([0, 0, 1]), "test": arrays([0, 1])})
    with pytest.raises(DstillError, match=r"class '1' has 1 image\(s\)"):
        real.holdout(seed=0)


@pytest.mark.parametrize("changed", ["pixel", "label", "name", "end of a name", "test", "test label"])
def test_the_fingerprint_changes_with_anything_that_a_result_depends_on(tiny_real: RealSet, changed: str):
    images, labels, names = tiny_real.train.images.clone(), tiny_real.train.labels.clone(), list(tiny_real.class_names)
    test = tiny_real.test
    if changed == "pixel":
        images[7, 1, 2, 3] ^= 1
    elif changed == "label":
        labels[0], labels[1] = labels[1].clone(), labels[0].clone()
    elif changed == "name":
        names[2] = "squares"
    elif changed == "end of a name":
        names[0], names[1] = names[0] + names[1][0], names[1][1:]
    elif changed == "test label":
        test = replace(test, labels=test.labels.flip(0))
    else:
        test = test.take(torch.arange(len(test) - 1))
    other = RealSet("tiny", type(test)(images, labels), test, tuple(names))
    same = RealSet("another name", tiny_real.train, tiny_real.test, tiny_real.class_names)
    assert other.fingerprint != tiny_real.fingerprint == same.fingerprint


def test_as_many_images_a_class_as_there_are_can_be_asked_for(tiny_real: RealSet):
    check_ipc(tiny_real, 20)


def test_more_images_a_class_than_there_are_is_refused_with_the_smallest_class():
    real = load_real({"train": arrays([0, 0, 0, 1, 1]), "test": arrays([0, 1])})
    with pytest.raises(DstillError, match="class '1' has 2 training images, fewer than the 3 images per class asked for"):
        check_ipc(real, 3)


def test_a_class_without_any_training_image_is_found_by_the_same_check():
    real = load_real({"train": arrays([0, 0, 2, 2]), "test": arrays([0, 1])})
    with pytest.raises(DstillError, match="class '1' has 0 training images"):
        check_ipc(real, 1)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_answered_with_a_close_one():
    with pytest.raises(DstillError, match="'cifar01' is neither a file, a folder nor a known data set; did you mean cifar10"):
        load_real("cifar01")


@pytest.mark.parametrize("name", ["cifar10", "somebody/some-images"])
def test_without_a_network_a_hub_set_says_what_to_pass_instead(name: str):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(DstillError, match=f"'{name}' could not be fetched.*Without a network, pass a folder of images"):
        load_real(name)


def test_a_named_set_at_a_path_that_does_not_exist_says_so(tmp_path: Path):
    with pytest.raises(DstillError, match="nowhere does not exist"):
        load_real(f"cifar10@{tmp_path}/nowhere")


def test_a_folder_with_neither_parquet_files_nor_class_folders_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(DstillError, match="neither Parquet files nor class folders"):
        load_real(tmp_path)


def test_a_folder_without_an_image_is_refused(tmp_path: Path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DstillError, match="cat holds no image that can be read: remove it"):
        load_real(tmp_path)


def test_a_folder_with_one_class_is_refused(tmp_path: Path):
    with pytest.raises(DstillError, match="does not have two class folders or more"):
        load_real(write_folder(tmp_path, {"train/cat/a.png": plain(1), "test/cat/a.png": plain(2)}))


def test_another_kind_of_file_is_refused_by_its_name(tmp_path: Path):
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(DstillError, match=r"x.csv is not a Parquet file"):
        load_real(tmp_path / "x.csv")


def test_a_damaged_parquet_file_is_refused_by_its_name(tmp_path: Path):
    (tmp_path / "x-train.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(DstillError, match=r"x-train.parquet could not be read as Parquet"):
        load_real(tmp_path / "x-train.parquet")


def test_a_set_without_a_train_split_is_refused_with_what_was_found(tmp_path: Path):
    write_parquet(tmp_path / "x-test.parquet", [plain(1)], [0], ["cat", "dog"])
    with pytest.raises(DstillError, match=r"has no train split \(found: test\)"):
        load_real(tmp_path)


def test_a_table_without_an_image_column_is_refused_with_its_columns(tmp_path: Path):
    pq.write_table(pa.table({"pixel": [1, 2], "label": [0, 1]}), tmp_path / "x-train.parquet")
    with pytest.raises(DstillError, match="has the columns pixel, label: an image column and a class column are needed"):
        load_real(tmp_path)


def test_a_copy_of_a_named_set_may_call_its_label_column_otherwise(tmp_path: Path):
    plainly = load_real(write_pair(tmp_path))
    real = load_real(f"cifar100@{tmp_path}")
    assert (real.name, real.class_names) == ("cifar100", plainly.class_names)
    assert torch.equal(real.train.labels, plainly.train.labels)


def test_the_catalogues_label_column_goes_before_one_that_names_its_classes(tmp_path: Path):
    path = write_parquet(tmp_path / "x-train.parquet", [plain(1), plain(2)], [1, 0], ["small", "large"], label="coarse_label")
    table = pq.read_table(path).append_column("fine_label", pa.array([0, 1]))
    told = json.loads(table.schema.metadata[b"huggingface"])
    told["info"]["features"]["fine_label"] = {"_type": "Value", "dtype": "int64"}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(told)}), path)
    shutil.copy(path, tmp_path / "x-test.parquet")
    assert load_real(f"cifar100@{tmp_path}").train.labels.tolist() == [0, 1]


def test_an_unreadable_image_in_a_folder_is_named_by_its_path(tmp_path: Path):
    write_folder(tmp_path, {f"{s}/{c}/x.png": plain(1) for s in ("train", "test") for c in ("cat", "dog")})
    (tmp_path / "train" / "dog" / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(DstillError, match=r"train/dog/broken.png of .* cannot be read.*repair or remove it"):
        load_real(tmp_path)


def test_a_truncated_image_in_a_table_is_named_by_its_path(tmp_path: Path):
    noisy = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    cells = [plain(1), png(noisy)[:-60], plain(2)]
    train = write_parquet(tmp_path / "x-train.parquet", cells, [0, 1, 0], ["cat", "dog"])
    write_parquet(tmp_path / "x-test.parquet", [plain(1)], [0], ["cat", "dog"])
    with pytest.raises(DstillError, match=r"image x-train-1.png of x cannot be read"):
        load_real(train)


def test_an_empty_cell_is_reported(tmp_path: Path):
    train = write_parquet(tmp_path / "x-train.parquet", [plain(1), None], [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "x-test.parquet", [plain(1)], [0], ["cat", "dog"])
    with pytest.raises(DstillError, match="image in a row without a path of x cannot be read"):
        load_real(train)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("order", [["cat", "dog"], ["dog", "cat"]])
def test_an_unlabelled_image_in_a_table_is_refused(tmp_path: Path, split: str, order: list[str]):
    labels = {"train": [0, 1], "test": [1, 0]} | {split: [0, -1]}
    write_parquet(tmp_path / "x-train.parquet", [plain(1), plain(2)], labels["train"], ["cat", "dog"])
    write_parquet(tmp_path / "x-test.parquet", [plain(1), plain(2)], labels["test"], order)
    with pytest.raises(DstillError, match=rf"x \({split}\) has labels from -1 to 0, but 2 classes"):
        load_real(tmp_path / "x-train.parquet")


def test_a_test_label_that_no_training_image_has_is_out_of_range():
    with pytest.raises(DstillError, match=r"in-memory \(test\) has labels from 0 to 2, but 2 classes"):
        load_real({"train": arrays([0, 1]), "test": arrays([0, 2])})


def test_a_test_class_unknown_to_the_training_file_is_named(tmp_path: Path):
    train = write_parquet(tmp_path / "x-train.parquet", [plain(1), plain(2)], [0, 1], ["cat", "dog"])
    write_parquet(tmp_path / "x-test.parquet", [plain(1)], [0], ["cats"])
    with pytest.raises(DstillError, match="test class 'cats' is not a training class; did you mean cat"):
        load_real(train)


def test_arrays_without_a_training_split_are_refused():
    with pytest.raises(DstillError, match="needs a 'train' split, got test"):
        load_real({"test": arrays([0, 1])})


def test_arrays_without_a_test_split_are_refused_without_a_test_fraction():
    with pytest.raises(DstillError, match=r"in-memory has no test split \(found: train\)"):
        load_real(arrays([0, 1]))


def test_an_empty_training_split_is_refused():
    with pytest.raises(DstillError, match=r"in-memory \(train\) has no images"):
        load_real({"train": (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), []), "test": arrays([0, 1])})


@pytest.mark.parametrize("labels", [[0, 1, 0], [0.0, 1.0], [True, False]], ids=["too many", "floats", "truth"])
def test_labels_that_are_not_one_whole_number_an_image_are_refused(labels: list):
    with pytest.raises(DstillError, match="labels must be one whole number for each image"):
        load_real({"train": (arrays([0, 1])[0], labels), "test": arrays([0, 1])})


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_floats_outside_0_to_1_are_refused(value: float):
    with pytest.raises(DstillError, match="uint8, or floats in"):
        load_real((torch.full((4, 1, 2, 2), value), [0, 1, 0, 1]), test_fraction=0.5)


# --- the real thing ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cifar10() -> RealSet:
    folder = Path(os.environ.get("DSTILL_DATA", ""))
    if not os.environ.get("DSTILL_DATA") or not (folder / "cifar10-train.parquet").exists():
        pytest.skip("set DSTILL_DATA to a folder with cifar10-train.parquet and cifar10-test.parquet")
    return load_real(folder / "cifar10-train.parquet")


def test_cifar10_has_5000_training_and_1000_test_images_of_each_class(cifar10: RealSet):
    assert (cifar10.name, cifar10.channels, cifar10.size) == ("cifar10", 3, (32, 32))
    assert cifar10.class_names[:3] == ("airplane", "automobile", "bird")
    assert cifar10.train.labels.bincount().tolist() == [5000] * 10
    assert cifar10.test.labels.bincount().tolist() == [1000] * 10


def test_cifar10_has_the_published_mean_and_standard_deviation(cifar10: RealSet):
    fitted = Standardise.fit(cifar10.train.images)
    assert fitted.mean.tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert fitted.std.tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)


def test_what_is_no_tensor_of_numbers_is_said() -> None:
    with pytest.raises(
        DstillError, match="labels must be one whole number for each image, or one word: they are of the type obj"
    ):
        load_real((np.zeros((2, 1, 2, 2), np.uint8), [object(), object()]), test_fraction=0.5)
    with pytest.raises(DstillError, match="in-memory images must be numbers"):
        load_real(([[object()]], [0, 1]), test_fraction=0.5)  # type: ignore[arg-type]
    with pytest.raises(DstillError, match=r"pairs \(images, labels\), got tuple for the split 'train'"):
        load_real((np.zeros((2, 1, 2, 2), np.uint8), [0, 1], 1), test_fraction=0.5)  # type: ignore[arg-type]
    with pytest.raises(DstillError, match="a list of names, got the text 'cat'"):
        load_real((np.zeros((4, 1, 2, 2), np.uint8), [0, 1, 0, 1]), test_fraction=0.5, classes="cat")
    learned = torch.rand(8, 1, 2, 2, requires_grad=True)
    assert not load_real((learned, [0, 1] * 4), test_fraction=0.5).train.images.requires_grad
