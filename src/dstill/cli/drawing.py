"""The images of a set in a terminal: each character is two pixels, the upper in its own colour, the lower behind it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style
from torch import Tensor

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.pictures import image_of, rows_by_class
from dstill.support.console import printable

Rows = Sequence[Sequence[int]]
Drawn = Generator[Segment, None, int]  # returns how many images it has drawn
_UPPER_HALF = "▀"
_LARGE, _SMALL = 16, 8  # least characters across an image, for few images and for many
_FEW = 20
_MOST = 100
_NAME = 14


def can_draw(console: Console) -> bool:
    """Whether a console shows colours and block characters: a terminal that is not dumb, without `NO_COLOR`, in Unicode.

    Example:
        >>> import io
        >>> can_draw(Console(file=io.StringIO(), force_terminal=True, color_system="256", no_color=False))
        True
        >>> can_draw(Console(file=io.StringIO()))
        False
    """
    colours = console.is_terminal and not console.no_color and console.color_system is not None
    return colours and console.encoding.startswith("utf")


@dataclass(frozen=True)
class Drawing:
    """The images of a set, to be printed by a rich console, which reduces the colours to those that it has.

    Of a set with one image for each class, as many as fit stand side by side, above the names of their classes. Of a set with
    more, each class has a row, beside its name. At most 100 images are drawn; a line says how many are left out.

    Args:
        distilled: the set.
        stored: the stored images, instead of what they hold.
    """

    distilled: DistilledSet
    stored: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, one = options.max_width, self.distilled if self.stored else self.distilled.decoded
        pixels = (one.pixels() * 255).round().byte()
        rows, names = [own.tolist() for own in rows_by_class(one)], [printable(name) for name in one.class_names]
        if max(map(len, rows)) == 1:
            drawn = yield from _side_by_side(pixels, rows, names, width)
        else:
            drawn = yield from _row_by_row(pixels, rows, names, width)
        if drawn < len(pixels):
            yield Segment(f"… and {len(pixels) - drawn} more")
            yield Segment.line()


def _side_by_side(pixels: Tensor, rows: Rows, names: Sequence[str], width: int) -> Drawn:
    flat = [(own[0], name) for own, name in zip(rows, names, strict=False) if own][:_MOST]
    across = _across(pixels, width, len(flat))
    lines = -(-len(flat) // _fitting(width, across))
    each = -(-len(flat) // lines)  # about as many in the last line as in the others
    for first in range(0, len(flat), each):
        group = flat[first : first + each]
        yield from _lines([_reduced(pixels[row], across) for row, _ in group], 0, "")
        yield Segment(" ".join(set_cell_size(name, across) for _, name in group).rstrip())
        yield Segment.line()
    return len(flat)


def _row_by_row(pixels: Tensor, rows: Rows, names: Sequence[str], width: int) -> Drawn:
    beside = min(_NAME, max(map(cell_len, names))) + 1
    beside = beside if width >= beside + 2 * (_SMALL + 1) else 0
    across = _across(pixels, width - beside, sum(map(len, rows)))
    each = min(_fitting(width - beside, across), max(1, _MOST // len(rows)))
    shown = [(own[:each], name) for own, name in zip(rows, names, strict=False) if own][:_MOST]
    for own, name in shown:
        yield from _lines([_reduced(pixels[row], across) for row in own], beside, name)
        yield Segment.line()
    return sum(len(own) for own, _ in shown)


def _across(pixels: Tensor, width: int, count: int) -> int:
    """Characters across an image: ten to a row if they can be large enough, and no more than it has pixels."""
    wanted = max(width // min(10, count) - 1, _LARGE if count <= _FEW else _SMALL)
    return max(1, min(pixels.shape[3], wanted, width))


def _fitting(width: int, across: int) -> int:
    """How many images stand in a row, with a space between them."""
    return max(1, (width + 1) // (across + 1))


def _reduced(pixels: Tensor, across: int) -> Image.Image:
    """An image of this width and of an even height."""
    picture = image_of(pixels).convert("RGB")
    return picture.resize((across, 2 * max(1, round(across * picture.height / picture.width / 2))), Image.Resampling.BOX)


def _lines(images: Sequence[Image.Image], beside: int, name: str) -> Iterator[Segment]:
    """Images side by side, line by line, with a name before the first line."""
    for y in range(0, images[0].height, 2):
        if beside:
            yield Segment(set_cell_size(name if y == 0 else "", beside - 1) + " ")
        for k, image in enumerate(images):
            if k:
                yield Segment(" ")
            for x in range(image.width):
                yield Segment(_UPPER_HALF, Style(color=_colour(image, x, y), bgcolor=_colour(image, x, y + 1)))
        yield Segment.line()


def _colour(image: Image.Image, x: int, y: int) -> Color:
    red, green, blue = image.getpixel((x, y))  # type: ignore[misc]
    return Color.from_rgb(red, green, blue)
