"""Pictures show every image in its natural colours, at a visible size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dstill import DistilledSet
from dstill.artifacts.pictures import grid, load_real, real_sheet, save_grid, save_real, uri_of
from dstill.config.settings import NetConfig
from dstill.data import preprocess
from dstill.data.real import Split

GAP = 2


def make(pixels: Tensor, labels: Tensor, ipc: int, kind: str = "standardise") -> DistilledSet:
    """A set whose images are these uint8 pixels, preprocessed."""
    fitted = preprocess.fit(kind, pixels)
    fields: dict[str, Any] = {"method": "mtt", "data": "tiny", "data_fingerprint": "0", "recipe": None, "seed": 0}
    return DistilledSet(
        images=fitted.forward(pixels.float() / 255),
        labels=labels,
        alpha=None,
        preprocess=fitted,
        ipc=ipc,
        class_names=tuple("abcdefghijklmnopqrstuvwxyz"[: int(labels.max()) + 1]),
        augmentation="none",
        net=NetConfig(),
        **fields,
    )


def pixels(count: int, channels: int = 3, side: int = 8) -> Tensor:
    return torch.randint(
        0, 256, (count, channels, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(count)
    )


def tiles(picture: Image.Image, side: int, tile: int) -> dict[tuple[int, int], np.ndarray]:
    """Each tile reduced to its original pixels, `[side, side, 3]`, by row and column."""
    array, step = np.asarray(picture), tile + GAP
    rows, columns = (array.shape[0] - GAP) // step, (array.shape[1] - GAP) // step
    found = {}
    for y in range(rows):
        for x in range(columns):
            block = array[GAP + y * step : y * step + step, GAP + x * step : x * step + step]
            centre = block[tile // side // 2 :: tile // side, tile // side // 2 :: tile // side]
            # Every pixel is a flat square: nothing is blurred.
            assert (block == centre.repeat(tile // side, 0).repeat(tile // side, 1)).all()
            found[y, x] = centre
    return found


@pytest.mark.parametrize("kind", ["standardise", "zca"])
def test_colour_tiles_are_the_original_pixels_exactly(kind: str) -> None:
    original = pixels(9)
    picture = grid(make(original, torch.arange(3).repeat_interleave(3), 3, kind))
    assert picture.size == (3 * 66 + 2, 3 * 66 + 2)
    for (y, x), tile in tiles(picture, 8, 64).items():
        assert (tile == original[3 * y + x].permute(1, 2, 0).numpy()).all()


def test_grey_tiles_are_the_original_pixels_in_all_three_channels() -> None:
    original = pixels(4, channels=1)
    picture = grid(make(original, torch.arange(2).repeat_interleave(2), 2))
    assert picture.mode == "RGB"
    for (y, x), tile in tiles(picture, 8, 64).items():
        assert (tile == original[2 * y + x, 0].numpy()[:, :, None]).all()


def test_images_of_two_and_four_channels_are_shown_too() -> None:
    two, four = pixels(2, channels=2), pixels(2, channels=4)
    shown = tiles(grid(make(two, torch.arange(2), 1)), 8, 64)
    assert (shown[0, 1] == two[1, 0].numpy()[:, :, None]).all()
    shown = tiles(grid(make(four, torch.arange(2), 1)), 8, 64)
    assert (shown[0, 1] == four[1, :3].permute(1, 2, 0).numpy()).all()


def test_one_image_per_class_is_a_strip_of_up_to_ten_classes() -> None:
    original = pixels(12)
    picture = grid(make(original, torch.arange(12), 1))
    assert picture.size == (10 * 66 + 2, 2 * 66 + 2)
    shown = tiles(picture, 8, 64)
    assert (shown[1, 1] == original[11].permute(1, 2, 0).numpy()).all()


def test_rows_follow_the_classes_whatever_the_order_in_the_set() -> None:
    original, labels = pixels(6), torch.tensor([2, 0, 1, 1, 2, 0])
    shown = tiles(grid(make(original, labels, 2)), 8, 64)
    for (y, x), tile in shown.items():
        row = int((labels == y).nonzero()[x])
        assert (tile == original[row].permute(1, 2, 0).numpy()).all()


def test_at_most_ten_images_of_a_class_are_shown_or_as_many_as_asked_for() -> None:
    one = make(pixels(24), torch.arange(2).repeat_interleave(12), 12)
    assert grid(one).size == (10 * 66 + 2, 2 * 66 + 2)
    assert grid(one, columns=3).size == (3 * 66 + 2, 2 * 66 + 2)


def test_soft_labels_that_all_favour_one_class_hide_no_image() -> None:
    original = pixels(6)
    one = make(original, torch.arange(3).repeat_interleave(2), 2)
    soft = replace(one, labels=torch.tensor([[5.0, 0.0, 0.0]]).repeat(6, 1))
    hard, strips = np.asarray(grid(one)), np.asarray(grid(soft))
    assert strips.shape == (hard.shape[0] + 3 * 8, *hard.shape[1:])
    for row in range(3):
        assert np.array_equal(strips[row * 74 : row * 74 + 66], hard[row * 66 : row * 66 + 66])


def test_the_strip_under_an_image_is_its_label() -> None:
    one = make(pixels(4), torch.arange(4), 1)
    probabilities = torch.tensor([[0.7, 0.2, 0.1, 0.0]] * 4).clamp_min(1e-6)
    strip = np.asarray(grid(replace(one, labels=probabilities.log())))[GAP + 64 : GAP + 72, GAP : GAP + 64, 0]
    assert (strip == strip[0]).all()
    cells = 1 - strip[0].reshape(4, 16).mean(1) / 255
    assert cells.tolist() == pytest.approx([0.7, 0.2, 0.1, 0.0], abs=0.003)


@pytest.mark.parametrize(("side", "tile"), [(8, 64), (28, 84), (32, 64), (100, 100), (128, 128)])
def test_small_images_are_enlarged_by_whole_factors_to_at_least_64_pixels(side: int, tile: int) -> None:
    assert grid(make(pixels(2, side=side), torch.arange(2), 1)).size == (2 * (tile + GAP) + GAP, tile + 2 * GAP)


def test_values_beyond_the_displayable_range_are_clipped() -> None:
    one = make(pixels(2), torch.arange(2), 1)
    extreme = replace(one, images=torch.stack([torch.full((3, 8, 8), 1e3), torch.full((3, 8, 8), -1e3)]))
    shown = tiles(grid(extreme), 8, 64)
    assert (shown[0, 0] == 255).all()
    assert (shown[0, 1] == 0).all()


def test_a_saved_grid_is_the_grid(tmp_path: Path) -> None:
    one = make(pixels(2), torch.arange(2), 1)
    with Image.open(save_grid(one, tmp_path / "x.png")) as picture:
        assert picture.format == "PNG"
        assert np.array_equal(np.asarray(picture), np.asarray(grid(one)))


@pytest.mark.parametrize("classes", [3, 12])
def test_each_class_keeps_its_first_four_real_images(classes: int, tmp_path: Path) -> None:
    original, labels = pixels(5 * classes), torch.arange(classes).repeat(5)
    save_real(Split(original, labels), classes, tmp_path / "real.webp")
    squares = load_real(tmp_path / "real.webp", classes)
    assert [square.size for square in squares] == [(17, 17)] * classes
    for c, square in enumerate(squares):
        array = np.asarray(square)
        for k in range(4):
            top, left = k // 2 * 9, k % 2 * 9
            expected = original[c + k * classes].permute(1, 2, 0).numpy()
            assert (array[top : top + 8, left : left + 8] == expected).all()
        assert (array[8] == 255).all() and (array[:, 8] == 255).all(), "a line between them"


def test_a_class_with_few_images_or_many_classes_keep_one_of_each(tmp_path: Path) -> None:
    few = Split(pixels(7), torch.tensor([0, 0, 0, 0, 1, 1, 1]))
    save_real(few, 2, tmp_path / "few.webp")
    assert [np.asarray(one).tolist() for one in load_real(tmp_path / "few.webp", 2)] == [
        few.images[row].permute(1, 2, 0).tolist() for row in (0, 4)
    ]
    many = Split(pixels(51 * 4, side=48), torch.arange(51).repeat(4))
    assert real_sheet(many, 51).size == (10 * 32, 6 * 32)
    assert real_sheet(Split(many.images[:200], torch.arange(50).repeat(4)), 50).size == (10 * (2 * 48 + 3), 5 * (2 * 48 + 3))


def test_large_real_images_are_reduced_and_keep_their_shape() -> None:
    wide = torch.zeros(8, 3, 64, 128, dtype=torch.uint8)
    assert real_sheet(Split(wide, torch.arange(2).repeat(4)), 2).size == (2 * (2 * 64 + 4), 2 * 32 + 4)


def test_a_run_without_real_images_has_none(tmp_path: Path) -> None:
    assert load_real(tmp_path / "real.webp", 3) == []


def test_an_address_is_exact_unless_a_quality_is_asked_for() -> None:
    picture = grid(make(pixels(2), torch.arange(2), 1))
    assert uri_of(picture).startswith("data:image/png;base64,")
    assert uri_of(picture, quality=50).startswith("data:image/webp;base64,")
    assert len(uri_of(picture, quality=5)) < len(uri_of(picture, quality=95))
