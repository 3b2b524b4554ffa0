"""Several images in one: what a stored image holds, the adjoint of decoding, and real images shrunk into the parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dstill.data.formation import check_parts, decode, decoded_labels, encode, pull_back
from dstill.errors import DstillError

SIDES = [(8, 8, 2), (6, 9, 3), (7, 8, 3), (5, 5, 2)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_by_one(images: Tensor, parts: int) -> Tensor:
    """Each cell is cut out and enlarged by torch, image by image and row by row."""
    found = []
    for image in images:
        for band in image.tensor_split(parts, dim=1):
            for cell in band.tensor_split(parts, dim=2):
                found.append(F.interpolate(cell[None], size=image.shape[1:], mode="bilinear", align_corners=False)[0])
    return torch.stack(found)


@pytest.mark.parametrize(("height", "width", "parts"), SIDES)
def test_decoding_cuts_out_each_cell_and_enlarges_it_bilinearly(height: int, width: int, parts: int) -> None:
    images = noise(3, 2, height, width)
    torch.testing.assert_close(decode(images, parts), one_by_one(images, parts), rtol=0, atol=1e-12)
    torch.testing.assert_close(decode(images.float(), parts), one_by_one(images, parts).float())


@pytest.mark.parametrize(("height", "width", "parts"), SIDES)
def test_the_gradient_is_pulled_back_by_the_adjoint(height: int, width: int, parts: int) -> None:
    images, weights = noise(3, 2, height, width).requires_grad_(), noise(3 * parts**2, 2, height, width, seed=1)
    decoded = decode(images, parts)
    (by_autograd,) = torch.autograd.grad(decoded, images, weights)
    torch.testing.assert_close(pull_back(weights, parts), by_autograd, rtol=0, atol=1e-12)
    inner = float((decoded.detach() * weights).sum() - (images.detach() * pull_back(weights, parts)).sum())
    assert abs(inner) < 1e-10, "<decode(x), y> = <x, pull_back(y)>"


def test_decoding_is_linear_and_keeps_flat_images_and_differences() -> None:
    x, y = noise(2, 1, 8, 8), noise(2, 1, 8, 8, seed=1)
    torch.testing.assert_close(decode(2 * x - 3 * y, 2), 2 * decode(x, 2) - 3 * decode(y, 2))
    torch.testing.assert_close(decode(torch.full((1, 3, 9, 9), 7.0), 3), torch.full((9, 3, 9, 9), 7.0))


def test_one_part_changes_nothing_not_even_the_memory() -> None:
    images, labels = noise(2, 3, 5, 5), torch.tensor([1, 0])
    assert decode(images, 1) is images and encode(images, 1) is images and pull_back(images, 1) is images
    assert decoded_labels(labels, 1) is labels


def test_labels_are_those_of_the_stored_image() -> None:
    assert decoded_labels(torch.tensor([2, 0]), 3).tolist() == [2] * 9 + [0] * 9
    assert decoded_labels(torch.tensor([[0.1, 0.9], [0.7, 0.3]]), 2)[3:5].tolist() == [
        pytest.approx([0.1, 0.9]),
        pytest.approx([0.7, 0.3]),
    ]


@pytest.mark.parametrize(("height", "width", "parts"), SIDES)
def test_real_images_lie_in_the_cells_that_they_are_decoded_from(height: int, width: int, parts: int) -> None:
    flat = torch.arange(2.0 * parts**2).view(-1, 1, 1, 1).expand(-1, 3, height, width)
    stored = encode(flat, parts)
    assert stored.shape == (2, 3, height, width)
    torch.testing.assert_close(decode(stored, parts), flat)


def test_a_shrunk_pixel_is_the_mean_of_those_it_covers() -> None:
    images = noise(4, 1, 4, 4)
    expected = images.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5))
    stored = encode(images, 2)
    torch.testing.assert_close(stored[0, :, :2, 2:], expected[1])
    torch.testing.assert_close(stored[0, :, 2:, :2], expected[2])


def test_parts_that_do_not_fit_are_refused() -> None:
    check_parts((8, 8), 8)
    for parts in (0, 9):
        with pytest.raises(DstillError, match=f"cannot hold {parts}x{parts} parts"):
            check_parts((8, 9), parts)
    with pytest.raises(DstillError, match=r"8x8 pixels cannot hold 9x9 parts: lower distill.parts"):
        decode(noise(1, 1, 8, 8), 9)
    with pytest.raises(DstillError, match="3 images do not fill stored ones that hold 4 each"):
        encode(noise(3, 1, 8, 8), 2)
