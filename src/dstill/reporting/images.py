"""The images of a run, class by class and over its iterations, ready for a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.pictures import grid, image_of, load_real, rows_by_class, uri_of
from dstill.artifacts.record import FRAMES_NAME

MOST_IMAGES = 200
MOST_FRAMES = 16
_REAL_QUALITY, _FRAME_QUALITY = 90, 75  # of WebP; the images of the set itself are exact


@dataclass(frozen=True)
class Picture:
    """One synthetic image.

    Attributes:
        source: the image as a data URI, exact.
        before: the image that it started from; empty if that is not known.
        label: the most likely classes of a soft label with their probabilities; empty for class ids.
    """

    source: str
    before: str
    label: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ClassImages:
    """What became of a class.

    Attributes:
        name: its name.
        real: a few real images of it in a square, as a data URI; empty if the run has kept none.
        pictures: its synthetic images, as networks see them.
        stored: the stored images as data URIs, if they hold several each.
    """

    name: str
    real: str
    pictures: tuple[Picture, ...]
    stored: tuple[str, ...]


@dataclass(frozen=True)
class Frame:
    """All images after an iteration.

    Attributes:
        iteration: number of iterations done.
        source: the picture as a data URI.
        width: its width in pixels.
    """

    iteration: int
    source: str
    width: int


def by_class(distilled: DistilledSet, initial: DistilledSet | None, real: Path) -> list[ClassImages]:
    """The images of a set, class by class, at most `MOST_IMAGES` and the same number for each class.

    Args:
        distilled: the set.
        initial: the set before the first iteration, if it is known.
        real: the file of real images, which may be missing.
    """
    seen, names = distilled.decoded, distilled.class_names[:MOST_IMAGES]
    each = max(1, MOST_IMAGES // distilled.classes)
    rows = [own[:each].tolist() for own in rows_by_class(seen)]
    held = [own[:each].tolist() for own in rows_by_class(distilled)]
    after, stored = _Uris(seen), _Uris(distilled)
    before = None if initial is None else _Uris(initial.decoded)
    squares = [uri_of(square, quality=_REAL_QUALITY) for square in load_real(real, distilled.classes)]
    return [
        ClassImages(
            name=name,
            real=squares[c] if squares else "",
            pictures=tuple(Picture(after[row], before[row] if before else "", _likeliest(seen, row)) for row in rows[c]),
            stored=tuple(stored[row] for row in held[c]) if distilled.parts > 1 else (),
        )
        for c, name in enumerate(names)
    ]


class _Uris:
    """The stored images of a set as data URIs, by their row."""

    def __init__(self, distilled: DistilledSet) -> None:
        self.pixels = (distilled.pixels() * 255).round().byte()

    def __getitem__(self, row: int) -> str:
        return uri_of(image_of(self.pixels[row]))


def _likeliest(distilled: DistilledSet, row: int, most: int = 3) -> tuple[tuple[str, float], ...]:
    if not distilled.labels.is_floating_point():
        return ()
    top = distilled.labels[row].softmax(0).topk(min(most, distilled.classes))
    return tuple((distilled.class_names[c], p) for c, p in zip(top.indices.tolist(), top.values.tolist(), strict=True))


def frames(folder: Path, initial: DistilledSet | None) -> list[Frame]:
    """The pictures that were kept of the iterations, at most `MOST_FRAMES` of them, from the start to the last.

    Args:
        folder: the folder of the set.
        initial: the set before the first iteration, if it is known.
    """
    kept = sorted((int(path.stem), path) for path in (folder / FRAMES_NAME).glob("*.png") if path.stem.isdecimal())
    if not kept:
        return []
    begin = [] if initial is None else [_frame(0, grid(initial))]
    chosen = [kept[k] for k in spread(len(kept), MOST_FRAMES - len(begin))]
    return begin + [_frame(iteration, Image.open(path)) for iteration, path in chosen]


def spread(count: int, most: int) -> list[int]:
    """The numbers of at most `most` of `count` items, at equal distances, with the first and the last.

    Example:
        >>> spread(10, 4), spread(2, 4)
        ([0, 3, 6, 9], [0, 1])
    """
    return list(range(count)) if count <= most else [round(k * (count - 1) / (most - 1)) for k in range(most)]


def _frame(iteration: int, picture: Image.Image) -> Frame:
    return Frame(iteration, uri_of(picture.convert("RGB"), quality=_FRAME_QUALITY), picture.width)
