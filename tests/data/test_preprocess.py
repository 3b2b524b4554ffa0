from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from kornia.enhance import ZCAWhitening
from torch import Tensor

import dstill
from dstill.data import preprocess
from dstill.data.preprocess import ZCA, Preprocess, Standardise
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Choice

KINDS = ("standardise", "zca")


def images(count: int, channels: int = 3, side: int = 4, seed: int = 0) -> Tensor:
    """uint8 images whose channels differ in mean and spread and whose pixels are correlated."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(count, 1, side, 1, generator=generator)
    mixed = 0.6 * base + 0.4 * torch.rand(count, channels, side, side, generator=generator)
    scale = torch.linspace(0.4, 1, channels).view(-1, 1, 1)
    return (255 * scale * mixed).round().to(torch.uint8)


def pixels(batch: Tensor) -> Tensor:
    return batch.double() / 255


def kornia_zca(fitted_on: Tensor) -> ZCAWhitening:
    """Its conventions: samples on axis 0, covariance over n - 1, U diag(1 / sqrt(S + eps)) U^T."""
    return ZCAWhitening(dim=0, eps=0.1, unbiased=True, compute_inv=True).fit(pixels(fitted_on))


def test_standardise_takes_numpys_mean_and_population_std_of_each_channel():
    train = images(50)
    fitted = Standardise.fit(train)
    reference = train.numpy() / 255
    np.testing.assert_allclose(fitted.mean, reference.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(fitted.std, reference.std((0, 2, 3)), rtol=1e-6)


def test_standardised_training_images_have_mean_0_and_std_1():
    train = images(50)
    result = Standardise.fit(train).forward(pixels(train))
    assert result.mean((0, 2, 3)).abs().max() < 1e-6
    assert (result.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6


def test_standardise_is_exact_where_a_float32_sum_would_not_be():
    train = torch.full((300, 1, 64, 64), 200, dtype=torch.uint8)
    train[::2] = 201
    fitted = Standardise.fit(train)
    assert float(fitted.mean) * 255 == pytest.approx(200.5, rel=1e-6)
    assert float(fitted.std) * 255 == pytest.approx(0.5, rel=1e-6)


def test_a_constant_channel_cannot_be_standardised():
    train = images(10)
    train[:, 1] = 37
    with pytest.raises(DstillError, match="a colour channel is constant"):
        Standardise.fit(train)


@pytest.mark.parametrize("count", [200, 20], ids=["full-rank", "rank-deficient"])
def test_zca_equals_kornia(count: int):
    train, other = images(count), pixels(images(7, seed=1))  # 48 pixels an image
    torch.testing.assert_close(ZCA.fit(train).forward(other), kornia_zca(train)(other), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [200, 20], ids=["full-rank", "rank-deficient"])
def test_the_inverse_of_zca_equals_kornias(count: int):
    train, whitened = images(count), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    expected = kornia_zca(train).inverse_transform(whitened)
    torch.testing.assert_close(ZCA.fit(train).invert(whitened), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [200, 20], ids=["full-rank", "rank-deficient"])
@pytest.mark.parametrize("kind", KINDS)
def test_inverting_gives_the_pixels_back_also_outside_their_range(kind: str, count: int):
    fitted = preprocess.fit(kind, images(count))
    wanted = torch.linspace(-1, 2, 6 * 48, dtype=torch.float64).view(6, 3, 4, 4)
    torch.testing.assert_close(fitted.invert(fitted.forward(wanted)), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fitted.forward(fitted.invert(wanted)), wanted, rtol=1e-5, atol=1e-5)


def test_zca_brings_each_principal_variance_s_to_s_over_s_plus_a_tenth():
    train = images(400)
    before, after = (torch.cov(flat.flatten(1).T) for flat in (pixels(train), ZCA.fit(train).forward(pixels(train))))
    variance = torch.linalg.eigvalsh(before)
    torch.testing.assert_close(torch.linalg.eigvalsh(after), variance / (variance + 0.1), rtol=1e-5, atol=1e-6)


def test_zca_of_more_images_than_a_block_equals_kornia():
    train = images(4100, channels=1, side=3)
    torch.testing.assert_close(ZCA.fit(train).forward(pixels(train)), kornia_zca(train)(pixels(train)), rtol=1e-5, atol=1e-5)


def test_zca_needs_two_images():
    with pytest.raises(DstillError, match="at least two training images"):
        ZCA.fit(images(1))


@pytest.mark.parametrize("kind", KINDS)
def test_type_and_shape_of_the_images_are_kept(kind: str):
    fitted = preprocess.fit(kind, images(20))
    for dtype in (torch.float32, torch.float64):
        result = fitted.forward(torch.rand(2, 3, 4, 4, dtype=dtype))
        assert (result.dtype, result.shape) == (dtype, (2, 3, 4, 4))
        assert fitted.invert(result).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_a_preprocessing_is_rebuilt_exactly_from_its_tensors(kind: str):
    fitted = preprocess.fit(kind, images(20))
    rebuilt = preprocess.from_tensors(kind, {key: tensor.clone() for key, tensor in fitted.tensors().items()})
    other = pixels(images(3, seed=1))
    assert isinstance(rebuilt, Preprocess)
    assert (type(rebuilt), rebuilt.kind) == (type(fitted), kind)
    assert torch.equal(rebuilt.forward(other), fitted.forward(other))
    assert torch.equal(rebuilt.invert(other), fitted.invert(other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_tensor_is_reported_by_name(kind: str):
    tensors = preprocess.fit(kind, images(20)).tensors()
    del tensors["mean"]
    with pytest.raises(DstillError, match=f"stored {kind} preprocessing is incomplete or damaged.*mean"):
        preprocess.from_tensors(kind, tensors)


def test_an_unknown_kind_in_a_file_is_reported():
    with pytest.raises(DstillError, match="unknown preprocessing 'pca' in the file"):
        preprocess.from_tensors("pca", {})


def test_an_unknown_kind_asked_for_is_answered_with_a_close_one():
    with pytest.raises(DstillError, match="unknown preprocessing 'standardize'; did you mean standardise"):
        preprocess.fit("standardize", images(3))


def test_a_damaged_whitening_in_the_cache_is_fitted_again(tiny_real: RealSet, tmp_path: Path) -> None:
    choice = Choice("random", recipe="smoke", changes={"preprocess": "zca"})
    job = Job.resolve(tiny_real, choice, 0, Workplace.of(dstill.Machine(cache=tmp_path), False))
    right = {name: tensor.clone() for name, tensor in job.preprocess().tensors().items()}
    (path,) = (tmp_path / "preprocess").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-3])
    again = job.preprocess()
    assert path.read_bytes() == content
    assert all(again.tensors()[name].equal(tensor) for name, tensor in right.items())
