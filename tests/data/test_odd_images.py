"""Image files of all sorts: rotated, animated, of few or many bits, broken, linked, or no images at all."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from dstill.data.real import load_real
from dstill.errors import DstillError

_COLOURS = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


def folder(root: Path, put: Callable[[Path], object] = lambda _: None) -> Path:
    """Two classes, one image of each in both splits; `put` adds to the folder of the first training class."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            Image.fromarray(_COLOURS).save(root / split / name / "0.png")
    put(root / "train" / "a")
    return root


def second(root: Path, image: Image.Image, name: str, **options: object) -> Tensor:
    """An image as the loader reads it, `[C, H, W]`."""
    real = load_real(folder(root, lambda a: image.save(a / name, **options)))
    return real.train.images[1]


def test_a_camera_that_was_turned_gives_an_upright_image(tmp_path: Path) -> None:
    for orientation, upright in ((1, _COLOURS), (3, _COLOURS[::-1, ::-1]), (6, _COLOURS.transpose(1, 0, 2)[:, ::-1])):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found = second(tmp_path / str(orientation), Image.fromarray(_COLOURS), "1.png", exif=exif)
        assert np.array_equal(found.permute(1, 2, 0), upright)


@pytest.mark.parametrize("name", ["1.gif", "1.webp"])
def test_the_first_picture_of_an_animation_counts(tmp_path: Path, name: str) -> None:
    first, other = (Image.new("RGB", (8, 8), (value,) * 3) for value in (200, 10))
    found = second(tmp_path, first, name, save_all=True, append_images=[other])
    assert abs(int(found.float().mean()) - 200) < 3


@pytest.mark.parametrize(
    ("mode", "name", "off"),
    [("P", "1.png", 60), ("1", "1.png", 255), ("LA", "1.png", 255), ("RGBA", "1.png", 0), ("CMYK", "1.tiff", 2)],
)
def test_other_colour_models_become_three_channels(tmp_path: Path, mode: str, name: str, off: int) -> None:
    found = second(tmp_path, Image.fromarray(_COLOURS).convert(mode), name)
    assert tuple(found.shape) == (3, 8, 8)
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - _COLOURS.astype(int)).max() <= off


def test_a_palettes_transparency_is_no_obstacle(tmp_path: Path) -> None:
    assert tuple(second(tmp_path, Image.fromarray(_COLOURS).convert("P"), "1.png", transparency=0).shape) == (3, 8, 8)


def refused(root: Path, put: Callable[[Path], object]) -> str:
    with pytest.raises(DstillError) as error:
        load_real(folder(root, put))
    return str(error.value)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_without_a_known_range_are_refused(tmp_path: Path, kind: type) -> None:
    message = refused(tmp_path, lambda a: Image.fromarray(np.ones((8, 8), kind)).save(a / "1.tiff"))
    assert "1.tiff" in message and "range" in message


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    message = refused(tmp_path, lambda a: (a / "1.png").write_bytes(content))
    assert "1.png" in message and "not an image" in message and "0x" not in message


def test_an_image_that_was_cut_off_is_named(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))

    def put(a: Path) -> None:
        noise.save(a / "1.png")
        (a / "1.png").write_bytes((a / "1.png").read_bytes()[:-2000])

    message = refused(tmp_path, put)
    assert "1.png" in message and "truncated" in message


def test_an_image_that_unfolds_to_gigabytes_is_refused_before_it_does(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def bomb(a: Path) -> None:
        size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        (a / "1.png").write_bytes(
            b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
        )

    assert "3600000000 pixels" in refused(tmp_path, bomb)


def test_other_files_in_a_folder_are_passed_over(tmp_path: Path) -> None:
    def put(a: Path) -> None:
        for name in ("notes.txt", ".DS_Store", "Thumbs.db", "load.py", f"{tmp_path.name}.py"):
            (a / name).write_text("raise SystemExit")
        (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit")

    assert len(load_real(folder(tmp_path, put)).train) == 2


@pytest.mark.parametrize("name", ["1.heic", "1.avif", "1.svg"])
def test_an_image_of_an_unreadable_kind_is_named_and_not_left_out(tmp_path: Path, name: str) -> None:
    assert name in refused(tmp_path, lambda a: (a / name).write_bytes(b"some picture"))


def test_an_image_without_a_suffix_is_an_image(tmp_path: Path) -> None:
    assert len(load_real(folder(tmp_path, lambda a: (a / "0.png").rename(a / "0"))).train) == 2


def test_a_class_of_which_nothing_can_be_read_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, lambda a: (a / "0.png").rename(a / "0.txt"))
    assert "train/a holds no image" in message


def test_what_is_transparent_looks_as_on_white(tmp_path: Path) -> None:
    hidden = Image.fromarray(np.dstack([_COLOURS, np.full((8, 8), 255, np.uint8)]))
    hidden.paste((200, 0, 0, 0), (0, 0, 4, 8))
    found = second(tmp_path, hidden, "1.png").permute(1, 2, 0).numpy()
    assert (found[:, :4] == 255).all() and (found[:, 4:] == _COLOURS[:, 4:]).all()


def test_grey_with_transparency_stays_grey(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(np.dstack([np.full((8, 8), 40, np.uint8), np.eye(8, dtype=np.uint8) * 255]), "LA").save(
                tmp_path / split / name / "0.png"
            )
    real = load_real(tmp_path)
    assert real.channels == 1 and np.array_equal(real.train.images[0, 0], 255 - 215 * np.eye(8, dtype=np.uint8))


@pytest.mark.parametrize("target", ["nowhere.png", "1.png"])
def test_a_link_to_nothing_or_to_itself_is_named(tmp_path: Path, target: str) -> None:
    assert "1.png is a broken link" in refused(tmp_path, lambda a: os.symlink(a / target, a / "1.png"))


def test_a_link_to_an_image_is_that_image(tmp_path: Path) -> None:
    assert len(load_real(folder(tmp_path, lambda a: os.symlink(a / "0.png", a / "1.png"))).train) == 3


def test_a_link_to_a_folder_is_refused_and_not_walked_in_circles(tmp_path: Path) -> None:
    assert "link to a folder" in refused(tmp_path, lambda a: os.symlink(a.parent, a / "loop"))
    assert "link to a folder" in refused(tmp_path / "x", lambda a: os.symlink(a, a.parent / "c"))


@pytest.mark.parametrize("name", ["<script>alert(1)<", "[red]", "\x1b[31m", "a\nb", "*", "{0}", "é\u202e"])
def test_a_class_may_have_any_name_that_a_folder_can_have(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path)
    for split in ("train", "test"):
        (root / split / "a").rename(root / split / name)
    assert sorted(load_real(root).class_names) == sorted([name, "b"])


def test_a_name_that_is_no_text_is_refused_by_a_sentence(tmp_path: Path) -> None:
    root = folder(tmp_path)
    os.rename(bytes(root / "train" / "a"), bytes(root / "train") + b"/\xff\xfe")
    with pytest.raises(DstillError, match="could not be read"):
        load_real(root)
