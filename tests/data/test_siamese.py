"""Each operation against a loop over the pixels of one image."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kornia.geometry.transform import rotate
from torch import Tensor

from dstill.data import siamese
from dstill.data.siamese import Params
from dstill.errors import DstillError

OPS = sorted(siamese.OPS)
STRATEGY = "colour_crop_cutout_flip_scale_rotate"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def draw(op: str, batch: int, seed: int = 0, *, shared: bool = False) -> Params:
    params = siamese.sample(op, batch, generator(seed), shared=shared)
    assert params is not None
    return params


def naive_colour(image: np.ndarray, brightness: float, saturation: float, contrast: float) -> np.ndarray:
    channels, height, width = image.shape
    result = image + brightness
    for i in range(height):
        for j in range(width):
            grey = sum(result[:, i, j]) / channels
            result[:, i, j] = [grey + saturation * (value - grey) for value in result[:, i, j]]
    mean = result.sum() / result.size
    return mean + contrast * (result - mean)


def naive_crop(image: np.ndarray, down: float, right: float) -> np.ndarray:
    _, height, width = image.shape
    reach = [round(0.125 * side) for side in (height, width)]
    shift = [math.floor(unit * (2 * r + 1)) - r for unit, r in zip((down, right), reach, strict=True)]
    result = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            if 0 <= i + shift[0] < height and 0 <= j + shift[1] < width:
                result[:, i, j] = image[:, i + shift[0], j + shift[1]]
    return result


def naive_cutout(image: np.ndarray, down: float, right: float) -> np.ndarray:
    result = image.copy()
    holes = [math.floor(0.5 * side + 0.5) for side in image.shape[1:]]
    # The centre of a hole of even size lies between two pixels: one more position makes both borders alike.
    centres = [
        math.floor(unit * (side + (hole + 1) % 2))
        for unit, side, hole in zip((down, right), image.shape[1:], holes, strict=True)
    ]
    for i in range(image.shape[1]):
        for j in range(image.shape[2]):
            offsets = [i - centres[0] + holes[0] // 2, j - centres[1] + holes[1] // 2]
            if all(0 <= offset < hole for offset, hole in zip(offsets, holes, strict=True)):
                result[:, i, j] = 0
    return result


def naive_flip(image: np.ndarray, coin: float) -> np.ndarray:
    return np.stack([[row[::-1] for row in plane] for plane in image]) if coin < 0.5 else image


def naive_warp(image: np.ndarray, source: Callable[[float, float], tuple[float, float]]) -> np.ndarray:
    """Bilinear look-up, zero outside; coordinates are (x, y), -1 and 1 at the centres of the border pixels."""
    _, height, width = image.shape
    result = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            x, y = source(2 * j / (width - 1) - 1, 2 * i / (height - 1) - 1)
            column, row = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
            for r in (math.floor(row), math.floor(row) + 1):
                for c in (math.floor(column), math.floor(column) + 1):
                    if 0 <= r < height and 0 <= c < width:
                        result[:, i, j] += image[:, r, c] * (1 - abs(row - r)) * (1 - abs(column - c))
    return result


def naive_scale(image: np.ndarray, horizontal: float, vertical: float) -> np.ndarray:
    return naive_warp(image, lambda x, y: (horizontal * x, vertical * y))


def naive_rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    turn = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    return naive_warp(image, lambda x, y: ((complex(x, y) * turn).real, (complex(x, y) * turn).imag))


NAIVE: dict[str, Callable[..., np.ndarray]] = {
    "colour": naive_colour,
    "crop": naive_crop,
    "cutout": naive_cutout,
    "flip": naive_flip,
    "scale": naive_scale,
    "rotate": naive_rotate,
}


@pytest.mark.parametrize("op", OPS)
@given(
    batch=st.integers(1, 3),
    channels=st.integers(1, 3),
    size=st.tuples(st.integers(4, 12), st.integers(4, 12)),
    seed=st.integers(0, 2**32),
)
def test_each_operation_equals_a_loop_over_pixels(op: str, batch: int, channels: int, size: tuple[int, int], seed: int):
    images, params = noise(batch, channels, *size, seed=seed), draw(op, batch, seed)
    result = siamese.apply(images, params)
    for image, row, actual in zip(images, params.values, result, strict=True):
        np.testing.assert_allclose(actual.numpy(), NAIVE[op](image.numpy(), *row.tolist()), rtol=1e-6, atol=1e-6)


def test_a_positive_angle_turns_a_square_image_like_kornia():
    images, angles = noise(4, 3, 9, 9), torch.tensor([15.0, -15.0, 4.0, 0.0], dtype=torch.float64)
    expected = rotate(images, angles, padding_mode="zeros", align_corners=True)
    torch.testing.assert_close(siamese.apply(images, Params("rotate", angles[:, None])), expected)


def test_a_factor_above_one_shrinks_the_picture():
    images = torch.ones(1, 1, 25, 25)
    shrunk = siamese.apply(images, Params("scale", torch.tensor([[1.2, 1 / 1.2]])))
    assert int((shrunk[0, 0, 12] == 1).sum()) == 21  # columns: 24 / 1.2 + 1
    assert int((shrunk[0, 0, :, 12] == 1).sum()) == 25  # rows: enlarged, so the frame stays full


@pytest.mark.parametrize(
    ("op", "ranges"),
    [
        ("colour", [(-0.5, 0.5), (0.0, 2.0), (0.5, 1.5)]),
        ("scale", [(1 / 1.2, 1.2), (1 / 1.2, 1.2)]),
        ("rotate", [(-15.0, 15.0)]),
    ],
)
def test_parameters_fill_the_published_range_and_never_leave_it(op: str, ranges: list[tuple[float, float]]):
    values = draw(op, 4000).values
    assert values.shape == (4000, len(ranges))
    for column, (low, high) in zip(values.T, ranges, strict=True):
        margin = 0.01 * (high - low)
        assert low <= float(column.min()) < low + margin
        assert high - margin < float(column.max()) <= high


@pytest.mark.parametrize(("side", "reach"), [(8, 1), (32, 4), (64, 8)])
def test_a_crop_shifts_by_every_distance_up_to_an_eighth_of_the_side(side: int, reach: int):
    ramp = torch.arange(1.0, side + 1).expand(1, 1, side, side)
    shifted = siamese.apply(ramp.expand(500, 1, side, side), draw("crop", 500))
    middle = side // 2
    shifts = {float(row[middle]) - (middle + 1) for row in shifted[:, 0, middle]}
    assert shifts == set(range(-reach, reach + 1))


def test_a_cutout_away_from_the_border_is_half_the_side():
    erased = siamese.apply(torch.ones(1, 3, 32, 32), Params("cutout", torch.full((1, 2), 0.5))) == 0
    assert erased.sum((2, 3)).tolist() == [[256, 256, 256]]


def test_a_cutout_reaches_every_border_and_is_cut_there():
    erased = (siamese.apply(torch.ones(2000, 1, 8, 8), draw("cutout", 2000)) == 0).double()
    corners = erased[:, 0, [0, 0, 7, 7], [0, 7, 0, 7]].mean(0)
    assert float(corners.min()) > 0.05
    assert float(corners.max() - corners.min()) < 0.05  # no corner is preferred
    assert int(erased.sum((1, 2, 3)).min()) == 4


def test_a_flip_mirrors_about_half_of_the_images():
    images = noise(4000, 1, 1, 2)
    flipped = (siamese.apply(images, draw("flip", 4000)) != images).any(3).double().mean()
    assert 0.47 < float(flipped) < 0.53


def test_operations_are_drawn_equally_often():
    source = generator()
    drawn = Counter(p.op for p in (siamese.sample(STRATEGY, 1, source) for _ in range(3000)) if p is not None)
    assert sorted(drawn) == OPS
    assert all(400 < times < 600 for times in drawn.values())


def test_a_strategy_draws_none_but_its_own_operations():
    source = generator()
    assert {p.op for p in (siamese.sample("crop_rotate", 1, source) for _ in range(50)) if p} == {"crop", "rotate"}


@pytest.mark.parametrize("op", OPS)
def test_images_of_one_batch_have_parameters_of_their_own(op: str):
    values = draw(op, 50).values
    assert len(values) == 50
    assert len(values.unique(dim=0)) > 40


@pytest.mark.parametrize("op", OPS)
def test_a_batch_equals_its_images_one_by_one(op: str):
    images, params = noise(5, 3, 9, 8), draw(op, 5)
    alone = [siamese.apply(images[i : i + 1], Params(op, params.values[i : i + 1])) for i in range(5)]
    torch.testing.assert_close(siamese.apply(images, params), torch.cat(alone), rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_a_shared_draw_does_the_same_to_batches_of_any_size(op: str):
    params = draw(op, 4, seed=3, shared=True)
    assert len(params.values) == 1
    real, synthetic = noise(7, 3, 8, 8), noise(7, 3, 8, 8)[:2]
    torch.testing.assert_close(siamese.apply(real, params)[:2], siamese.apply(synthetic, params), rtol=0, atol=1e-12)
    one = siamese.apply(real[6:], params)
    torch.testing.assert_close(siamese.apply(real, params)[6:], one, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_gradients_by_the_images_are_right(op: str):
    images = noise(2, 3, 6, 5).requires_grad_()
    params = draw(op, 2, seed=2)
    assert torch.autograd.gradcheck(lambda x: siamese.apply(x, params), images)


@pytest.mark.parametrize("op", OPS)
@given(weight=st.floats(-2, 3), seed=st.integers(0, 2**32))
def test_each_operation_is_affine_in_the_images(op: str, weight: float, seed: int):
    a, b, params = noise(2, 3, 8, 7, seed=1), noise(2, 3, 8, 7, seed=2), draw(op, 2, seed)
    mixed = siamese.apply(weight * a + (1 - weight) * b, params)
    expected = weight * siamese.apply(a, params) + (1 - weight) * siamese.apply(b, params)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_applying_a_draw_twice_gives_the_same_and_leaves_the_images_alone(op: str):
    images, params = noise(3, 3, 8, 8), draw(op, 3)
    before = images.clone()
    assert torch.equal(siamese.apply(images, params), siamese.apply(images, params))
    assert torch.equal(images, before)


def test_the_draw_depends_on_the_generator_alone():
    torch.manual_seed(1)
    first = siamese.sample(STRATEGY, 6, generator(5))
    torch.manual_seed(2)
    second = siamese.sample(STRATEGY, 6, generator(5))
    assert first is not None and second is not None
    assert first.op == second.op and torch.equal(first.values, second.values)


@pytest.mark.parametrize("op", OPS)
def test_the_type_of_the_images_is_kept(op: str):
    assert siamese.apply(torch.rand(2, 3, 8, 8), draw(op, 2)).dtype == torch.float32
    assert siamese.apply(noise(2, 3, 8, 8), draw(op, 2)).dtype == torch.float64


def test_the_strategy_none_draws_nothing_and_returns_the_images_themselves():
    source = generator()
    state = source.get_state()
    images = noise(2, 3, 8, 8)
    assert siamese.sample("none", 2, source) is None
    assert torch.equal(source.get_state(), state)
    assert siamese.apply(images, None) is images


def test_an_unknown_operation_is_answered_with_a_close_one():
    with pytest.raises(DstillError, match="unknown augmentation 'color' in 'crop_color'; did you mean colour"):
        siamese.sample("crop_color", 1, generator())


def test_a_draw_for_another_number_of_images_is_refused():
    with pytest.raises(ValueError, match="a draw for 3 images cannot be applied to 4"):
        siamese.apply(noise(4, 3, 8, 8), draw("flip", 3))
