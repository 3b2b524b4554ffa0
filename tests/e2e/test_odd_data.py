"""Degenerate data give a correct result, or a sentence that says what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import dstill
from dstill import DistilledSet, DstillError
from dstill.config.registry import METHODS
from dstill.data.real import RealSet, Split


def data(
    counts: Sequence[int] = (6, 6, 6), *, channels: int = 3, size: tuple[int, int] = (8, 8), content: str = "noise"
) -> RealSet:
    """Data with `counts` training images per class, and two test images."""
    generator = torch.Generator().manual_seed(0)

    def split(counts: Sequence[int]) -> Split:
        labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        images = torch.randint(0, 256, (len(labels), channels, *size), generator=generator)
        match content:
            case "a value a class":
                images = (40 * labels + 10).view(-1, 1, 1, 1).expand_as(images)
            case "a picture a class":
                images = images[labels]
            case "one picture":
                images = images[:1].expand_as(images)
            case "one value":
                images = torch.full_like(images, 77)
            case "a channel of one value":
                images[:, 0] = 5
        return Split(images.to(torch.uint8).contiguous(), labels)

    names = tuple(f"class {i}" for i in range(len(counts)))
    return RealSet(content, split(counts), split([2] * len(counts)), names)


DATA = {
    "noise": data(),
    "one value a class": data(content="a value a class"),
    "one picture a class": data(content="a picture a class"),
    "one picture for all": data(content="one picture"),
    "one value": data(content="one value"),
    "a channel of one value": data(content="a channel of one value"),
    "two classes": data((6, 6)),
    "200 classes": data([2] * 200),
    "an image a class": data((1, 1, 1)),
    "unbalanced": data((1, 50, 9)),
    "one channel": data(channels=1),
    "four channels": data(channels=4),
    "9 px": data(size=(9, 9)),
    "16 x 8 px": data(size=(8, 16)),
    "32 px": data(size=(32, 32)),
}


def smoke(real: RealSet, method: str, folder: Path, *changes: str) -> DistilledSet:
    changes = ("net.width=8", *changes)
    return dstill.distill(
        real, method=method, recipe="smoke", out=folder / "out", changes=changes, machine=dstill.Machine(cache=folder / "cache")
    )


@pytest.mark.parametrize("method", ["ast", "dc", "frepo"])
@pytest.mark.parametrize("name", DATA)
def test_odd_data_give_finite_images_or_a_sentence(name: str, method: str, tmp_path: Path) -> None:
    real = DATA[name]
    if method == "dc" and name in ("one value", "a channel of one value"):  # its recipe standardises
        with pytest.raises(DstillError, match=r"channel is constant.*preprocess=zca"):
            smoke(real, method, tmp_path)
    elif method == "frepo" and name in ("one value", "one picture for all"):  # a singular kernel
        with pytest.raises(DstillError, match=r"raise distill\.ridge"):
            smoke(real, method, tmp_path)
    elif method == "ast" and name == "one value a class":  # the gradient penalty has no effect: weights of 1e23
        with pytest.raises(DstillError, match=r"features that are not finite: lower experts\.lr"):
            smoke(real, method, tmp_path)
    else:
        one = smoke(real, method, tmp_path)
        assert bool(torch.isfinite(one.images).all()) and bool(torch.isfinite(one.pixels()).all())
        assert one.alpha is None or (math.isfinite(one.alpha) and one.alpha > 0)
        assert torch.bincount(one.class_ids).tolist() == [1] * real.classes
        assert DistilledSet.load(tmp_path / "out").images.equal(one.images)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_takes_a_class_of_one_image_and_batches_of_one(method: str, tmp_path: Path) -> None:
    changes = ["experts.batch_size=1"] if METHODS[method].needs_experts else []
    one = smoke(DATA["an image a class"], method, tmp_path, *changes)
    assert bool(torch.isfinite(one.images).all())


@pytest.mark.parametrize("change", ["distill.lr_alpha=1e38", "distill.alpha_init=1e30"])
def test_a_run_that_diverges_says_so_and_saves_nothing_non_finite(change: str, tmp_path: Path) -> None:
    with pytest.raises(DstillError, match=r"lower distill\.lr_images or lr_alpha"):
        smoke(DATA["noise"], "ast", tmp_path, change, "distill.iterations=60")
    for path in tmp_path.rglob("*.safetensors"):
        assert "distilled" not in path.name
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()
