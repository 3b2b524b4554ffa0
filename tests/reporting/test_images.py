"""The slider of a page has the kept pictures in their order, from the start to the last, and not too many of them."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dstill import DistilledSet
from dstill.reporting.images import MOST_FRAMES, by_class, frames


def one(count: int = 3) -> DistilledSet:
    pixels = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return DistilledSet.from_tensors(pixels, torch.arange(count) % 3)


def keep(folder: Path, iterations: range) -> None:
    """Pictures whose grey says after how many iterations they were kept."""
    (folder / "frames").mkdir(exist_ok=True)
    for iteration in iterations:
        Image.new("RGB", (64, 32), (iteration, iteration, iteration)).save(folder / "frames" / f"{iteration:07d}.png")


def grey(source: str) -> int:
    with Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) as picture:
        return int(np.asarray(picture)[16, 32, 0])


def test_a_folder_without_pictures_has_no_slider(tmp_path: Path) -> None:
    assert frames(tmp_path, one()) == []


def test_kept_pictures_follow_the_start(tmp_path: Path) -> None:
    keep(tmp_path, range(20, 70, 10))
    shown = frames(tmp_path, one())
    assert [frame.iteration for frame in shown] == [0, 20, 30, 40, 50, 60]
    assert all(abs(grey(frame.source) - frame.iteration) <= 2 for frame in shown[1:])
    assert [frame.iteration for frame in frames(tmp_path, None)] == [20, 30, 40, 50, 60]


def test_too_many_are_thinned_out_and_the_last_stays(tmp_path: Path) -> None:
    keep(tmp_path, range(1, 101))
    shown = [frame.iteration for frame in frames(tmp_path, one())]
    assert len(shown) == MOST_FRAMES and shown[:2] == [0, 1] and shown[-1] == 100
    assert len(set(np.diff(shown[1:]))) <= 2, "at equal distances, but for rounding"


def test_each_class_has_its_images_beside_those_that_they_started_from(tmp_path: Path) -> None:
    start = one(6)
    shown = by_class(replace(start, images=start.images.flip(0)), start, tmp_path / "real.webp")
    assert [(own.name, len(own.pictures), own.real, own.stored) for own in shown] == [(str(c), 2, "", ()) for c in range(3)]
    for c, own in enumerate(shown):
        for k, picture in enumerate(own.pictures):
            mirrored = 5 - (c + 3 * k)
            assert picture.source == shown[mirrored % 3].pictures[mirrored // 3].before


def test_soft_labels_that_all_favour_one_class_hide_no_image(tmp_path: Path) -> None:
    soft = replace(one(), labels=torch.tensor([[5.0, 0.0, 1.0]]).repeat(3, 1))
    shown = by_class(soft, None, tmp_path / "real.webp")
    assert [len(own.pictures) for own in shown] == [1, 1, 1]
    names = [name for name, _ in shown[1].pictures[0].label]
    assert names == ["0", "2", "1"]
