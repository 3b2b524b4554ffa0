"""The compact file of a set: a quarter of the size, from which networks learn the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts import files, set_file, whitening
from dstill.artifacts.exporting import write
from dstill.data import preprocess
from dstill.data.preprocess import Preprocess
from dstill.data.real import RealSet
from dstill.errors import DstillWarning

WIDE = torch.tensor([0.5, 2.0, 8.0]).view(3, 1, 1)  # channels with different ranges


def make(real: RealSet, fitted: Preprocess | None = None, *, soft: bool = False, ipc: int = 1) -> DistilledSet:
    rows = torch.cat([rows[:ipc] for rows in real.train.by_class(real.classes)])
    fitted, labels = fitted or preprocess.fit("standardise", real.train.images), real.train.labels[rows]
    return DistilledSet.from_tensors(
        WIDE * fitted.forward(real.train.images[rows].float() / 255),
        torch.nn.functional.one_hot(labels, real.classes) * 2.5 if soft else labels,
        real=real,
        preprocess=fitted,
        alpha=0.0123456789,
        seed=3,
    )


@pytest.mark.parametrize("soft", [False, True])
def test_images_are_half_a_step_away_at_most_and_all_else_is_exact(tiny_real: RealSet, tmp_path: Path, soft: bool) -> None:
    one = make(tiny_real, soft=soft)
    back = DistilledSet.load(one.export("compact", tmp_path))
    low, high = one.images.amin((0, 2, 3)).clamp_max(0), one.images.amax((0, 2, 3)).clamp_min(1)
    off = (back.images - one.images).abs().amax((0, 2, 3))
    assert bool((off <= (high - low) / 255 / 2 * 1.001).all()) and bool((off > 0).all())
    assert torch.equal(back.labels, one.labels) and back.alpha == one.alpha
    assert back.header() == one.header() and back.images.dtype == torch.float32


def test_the_file_has_a_byte_for_each_value(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real, ipc=4)
    exact, compact = one.save(tmp_path / "exact"), set_file.save_compact(one, tmp_path / "compact")
    saved = exact.stat().st_size - compact.stat().st_size
    assert 3 * one.images.numel() * 0.95 < saved <= 3 * one.images.numel()


def test_the_command_says_how_much_is_rounded(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real)
    said = write(one, "compact", tmp_path)
    back = DistilledSet.load(tmp_path)
    share = float((back.images - one.images).norm() / one.images.norm())
    assert f"rounded by {100 * share:.2g} % (root mean square, of their own), to 8 bits." in said
    assert "whitening" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["distilled.safetensors"]


def test_a_whitening_stays_behind_and_the_real_data_give_it_back(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))
    one = make(tiny_real, whitening.fitted("zca", tiny_real, tmp_path / "elsewhere"))
    said = write(one, "compact", tmp_path / "out")
    assert f"The whitening is not in the file: pass {tiny_real.name} once" in said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["distilled.safetensors"]
    with pytest.warns(DstillWarning, match="the whitening of"):
        without = DistilledSet.load(tmp_path / "out")
    assert without.export("compact", tmp_path / "again") == tmp_path / "again", "needs no whitening"
    back = DistilledSet.load(tmp_path / "again", real=tiny_real)
    pixels = tiny_real.test.images.float() / 255
    assert torch.equal(back.preprocess.forward(pixels), one.preprocess.forward(pixels))


def test_the_whitening_of_a_run_that_set_images_aside_comes_back_from_all_data(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))
    held = tiny_real.holdout(3)
    one = make(held, whitening.fitted("zca", held, tmp_path / "elsewhere"))
    one = replace(one, data=tiny_real.name, data_fingerprint=tiny_real.fingerprint)
    assert one.seed == 3
    with pytest.warns(DstillWarning, match="the whitening of"):
        moved = DistilledSet.load(one.export("compact", tmp_path / "out"))
    back = whitening.completed(moved, tiny_real, tmp_path / "cache")
    assert back.pixels(clip=False).allclose(one.pixels(clip=False), atol=0.05)
    with pytest.raises(DstillError, match="is not what the set was distilled from"):
        whitening.completed(replace(moved, seed=4), tiny_real, tmp_path / "empty")


def test_stored_images_stay_stored(tmp_path: Path) -> None:
    held = DistilledSet.from_tensors(torch.rand(2, 3, 8, 8), [0, 1], class_names=["cat", "dog"], parts=2)
    back = DistilledSet.load(held.export("compact", tmp_path))
    assert back.parts == 2 and back.images.shape == held.images.shape


def test_exact_images_are_not_overwritten(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real)
    one.save(tmp_path)
    with pytest.raises(DstillError, match="holds a set with exact images, which would be lost: pass another folder"):
        DistilledSet.load(tmp_path).export("compact", tmp_path)
    assert torch.equal(DistilledSet.load(tmp_path).images, one.images)
    for _ in range(2):
        one.export("compact", tmp_path / "small")


def test_a_whitening_that_could_not_be_fitted_again_is_not_left_behind(tiny_real: RealSet, tmp_path: Path) -> None:
    own = make(tiny_real, preprocess.fit("zca", tiny_real.train.images))
    with pytest.raises(DstillError, match="not that of known data, and could not be fitted again: export dstill"):
        own.export("compact", tmp_path)


def test_older_versions_refuse_it_with_advice(tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = set_file.save_compact(make(tiny_real), tmp_path)
    monkeypatch.setattr(files, "FORMAT", 3)
    with pytest.raises(DstillError, match="has format 4, this dstill reads up to 3: upgrade dstill"):
        DistilledSet.load(file)


def test_a_diverged_set_is_not_written(tiny_real: RealSet, tmp_path: Path) -> None:
    with pytest.raises(DstillError, match="non-finite images and is not saved"):
        set_file.save_compact(replace(make(tiny_real), images=make(tiny_real).images * float("nan")), tmp_path)
    assert not list(tmp_path.iterdir())


def test_networks_learn_from_it_what_they_learn_from_the_exact_images(tmp_path: Path) -> None:
    real, exact = dstill.load_real("digits"), dstill.load_set("digits-ipc1")
    compact = DistilledSet.load(exact.export("compact", tmp_path))
    given = {"networks": 1, "random": False, "protocol": "quick"}
    ours, theirs = (dstill.evaluate(one, real, **given).accuracy.mean for one in (compact, exact))
    assert ours > 0.8 and abs(ours - theirs) < 0.03
