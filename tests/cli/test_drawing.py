"""What a terminal shows of a set is its images, in its colours, as wide as it is; where there are no colours, nothing."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from dstill import DistilledSet
from dstill.cli.drawing import Drawing, can_draw
from dstill.cli.show import print_drawing

CELL = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m(▀+)\x1b\[0m| |[^\x1b ]")


def pixels(count: int, channels: int = 3, side: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def printed(one: DistilledSet, width: int, colours: str = "truecolor", *, stored: bool = False) -> list[str]:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, color_system=colours, width=width, _environ={})  # type: ignore[arg-type]
    console.print(Drawing(one, stored=stored))
    return file.getvalue().splitlines()


def cells(line: str) -> list[tuple[tuple[int, ...], tuple[int, ...]] | None]:
    """The upper and the lower colour of each character; None for a character of text."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = []
    for match in CELL.finditer(line):
        numbers = [int(number) for number in match.groups()[:6] if number is not None]
        found += [(tuple(numbers[:3]), tuple(numbers[3:]))] * len(match.group(7)) if numbers else [None]
    return found


def plain(line: str) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", line)


def test_each_character_is_two_pixels_in_their_colours() -> None:
    original = pixels(3)
    lines = printed(DistilledSet.from_tensors(original, [0, 1, 2], class_names=["cat", "dog", "a long name"]), 40)
    assert plain(lines[4]) == "cat      dog      a long n"
    assert len(lines) == 5
    for y, line in enumerate(lines[:4]):
        row = cells(line)
        assert len(row) == 3 * 8 + 2 and row[8] is None and row[17] is None, "a space between images"
        for k in range(3):
            upper, lower = (original[k, :, 2 * y + half].T.tolist() for half in (0, 1))
            expected = [(tuple(a), tuple(b)) for a, b in zip(upper, lower, strict=True)]
            assert row[9 * k : 9 * k + 8] == expected


def test_grey_images_are_grey() -> None:
    original = pixels(2, channels=1)
    first = cells(printed(DistilledSet.from_tensors(original, [0, 1]), 40)[0])[:8]
    assert [cell and cell[0] for cell in first] == [(v, v, v) for v in original[0, 0, 0].tolist()]


def test_a_terminal_with_256_colours_gets_these() -> None:
    line = printed(DistilledSet.from_tensors(pixels(2), [0, 1]), 40, "256")[0]
    assert re.search(r"\x1b\[38;5;\d+;48;5;\d+m▀", line) and ";2;" not in line


@pytest.mark.parametrize("width", [3, 20, 40, 80, 300])
@pytest.mark.parametrize(("count", "ipc", "side"), [(10, 1, 8), (20, 1, 32), (100, 1, 32), (120, 12, 8), (20, 10, 64)])
def test_nothing_is_wider_than_the_terminal(count: int, ipc: int, side: int, width: int) -> None:
    labels = torch.arange(count // ipc).repeat_interleave(ipc)
    lines = printed(DistilledSet.from_tensors(pixels(count, side=side), labels), width)
    assert 0 < max(len(plain(line)) for line in lines) <= width


def test_wide_terminals_have_larger_images_up_to_their_pixels() -> None:
    one = DistilledSet.from_tensors(pixels(10, side=32), range(10))
    widths = [plain(printed(one, width)[0]).index(" ") for width in (80, 200, 400)]
    assert widths == [16, 19, 32]


def test_lines_are_filled_evenly() -> None:
    lines = [plain(line) for line in printed(DistilledSet.from_tensors(pixels(10), range(10)), 80)]
    assert [line.split() for line in lines if "▀" not in line] == [list("01234"), list("56789")]


def test_more_than_one_image_of_a_class_stand_in_a_row_beside_its_name() -> None:
    original = pixels(6)
    lines = printed(DistilledSet.from_tensors(original, [1, 0, 1, 0, 1, 0], class_names=["cat", "a very long name"]), 60)
    assert [plain(line)[:15] for line in lines if "▀" in line] == [
        "cat            ",
        *[" " * 15] * 3,
        "a very long na ",
        *[" " * 15] * 3,
    ]
    for y, rows in ((0, (1, 3, 5)), (5, (0, 2, 4))):
        row = cells(lines[y])[15:]
        for k, image in enumerate(rows):
            cell = row[9 * k]
            assert cell is not None and cell[0] == tuple(original[image, :, 0, 0].tolist())


def test_what_is_left_out_is_counted_and_no_class_is() -> None:
    labels = torch.arange(10).repeat_interleave(12)
    lines = [plain(line) for line in printed(DistilledSet.from_tensors(pixels(120), labels), 200)]
    assert [line[0] for line in lines if line[:1].isdigit()][:10] == list("0123456789")
    assert lines[-1] == "… and 20 more"
    many = printed(DistilledSet.from_tensors(pixels(101), range(101)), 80)
    assert many[-1] == "… and 1 more"


def test_an_image_that_is_not_square_keeps_its_shape() -> None:
    wide = torch.zeros(2, 3, 8, 16, dtype=torch.uint8)
    assert sum("▀" in line for line in printed(DistilledSet.from_tensors(wide, [0, 1]), 80)) == 4


def test_parts_are_drawn_as_networks_see_them_or_as_they_are_stored() -> None:
    one = replace(DistilledSet.from_tensors(pixels(2), [0, 1]), parts=2)
    assert len(cells(printed(one, 80)[0])) == 2 + 4 * 8 + 3
    assert len(cells(printed(one, 80, stored=True)[0])) == 2 * 8 + 1


def test_a_name_cannot_control_the_terminal() -> None:
    lines = printed(DistilledSet.from_tensors(pixels(2, side=16), [0, 1], class_names=["a\x1b[2J", "b"]), 40)
    assert lines[-1].startswith("a\\x1b[2J")


@pytest.mark.parametrize(
    ("environment", "terminal", "drawn"),
    [
        ({"TERM": "xterm-256color"}, True, True),
        ({"TERM": "xterm", "COLORTERM": "truecolor"}, True, True),
        ({"TERM": "xterm-256color"}, False, False),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_only_a_terminal_with_colours_is_drawn_on(environment: dict[str, str], terminal: bool, drawn: bool) -> None:
    assert can_draw(Console(file=io.StringIO(), force_terminal=terminal, _environ=environment)) == drawn


def test_a_terminal_without_unicode_is_not_drawn_on() -> None:
    latin = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    assert not can_draw(Console(file=latin, force_terminal=True, color_system="256"))


def test_sets_and_run_folders_are_drawn_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm-256color"), ("COLUMNS", "40")):
        monkeypatch.setenv(name, value)
    DistilledSet.from_tensors(pixels(2), [0, 1]).save(tmp_path / "run" / "set-0")
    (tmp_path / "run" / "result.json").touch()
    for path in ("run", "run/set-0", "run/set-0/distilled.safetensors"):
        print_drawing(tmp_path / path)
        assert capsys.readouterr().out.count("▀") == 2 * 8 * 4
    for path in ("run/result.json", "."):
        print_drawing(tmp_path / path)
        assert capsys.readouterr().out == ""
    print_drawing(Path("digits-ipc1"))
    assert "▀" in capsys.readouterr().out, "a set that ships with the package"
    monkeypatch.setenv("NO_COLOR", "1")
    print_drawing(tmp_path / "run")
    assert capsys.readouterr().out == ""
