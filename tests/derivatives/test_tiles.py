"""The table that says where our own convolutions run."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstill.config.yamls import dump
from dstill.derivatives import tiles
from dstill.derivatives.tiles import Row, Table, Tile
from dstill.errors import DstillError


@pytest.fixture(autouse=True)
def afresh() -> None:
    tiles.measured.cache_clear()


ROWS = (
    Row(product="tf32x3", inputs=128, outputs=128, size=(16, 16), tile=Tile(rows=128, warps=8), speed=1.7),
    Row(product="bfloat16", inputs=128, outputs=128, size=(16, 16), tile=Tile(columns=128), speed=1.2),
)


def test_a_tile_is_found_by_everything_that_it_was_measured_for() -> None:
    table = Table(cards={"Card": ROWS})
    assert table.tile("Card", "tf32x3", 128, 128, (16, 16)) == ROWS[0].tile
    assert table.tile("Card", "bfloat16", 128, 128, (16, 16)) == ROWS[1].tile
    assert table.tile("Another", "tf32x3", 128, 128, (16, 16)) is None
    assert table.tile("Card", "tf32", 128, 128, (16, 16)) is None
    assert table.tile("Card", "tf32x3", 64, 128, (16, 16)) is None
    assert table.tile("Card", "tf32x3", 128, 64, (16, 16)) is None
    assert table.tile("Card", "tf32x3", 128, 128, (16, 8)) is None


def test_the_table_that_is_named_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSTILL_TILES", raising=False)
    assert "Card" not in tiles.measured().cards
    file = tmp_path / "tiles.yaml"
    file.write_text(dump(Table(cards={"Card": ROWS}).model_dump(mode="json")))
    monkeypatch.setenv("DSTILL_TILES", str(file))
    tiles.measured.cache_clear()
    assert tiles.measured().cards == {"Card": ROWS}


@pytest.mark.parametrize("text", [None, "cards: {Card: [{rows: 1}]}", "- 1", "cards: [", "cards: {Card: 3}"])
def test_a_file_that_is_none_is_named(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiles.yaml"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("DSTILL_TILES", str(file))
    with pytest.raises(DstillError, match=r"tiles\.yaml \(DSTILL_TILES\)"):
        tiles.measured()
