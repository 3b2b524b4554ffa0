"""Where our own convolutions run on NVIDIA cards: a table of the shapes at which they were measured to be faster.

The table is data, not code: `tiles.yaml`, or the file that DSTILL_TILES names. `benchmarks/tiles_cuda.py` writes it.
"""

from __future__ import annotations

import functools
import os
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dstill.config.yamls import parse
from dstill.errors import DstillError

Product = Literal["tf32x3", "tf32", "bfloat16", "ieee"]
"""How numbers are multiplied. `tf32x3`: with the accuracy of float32. `tf32` and `bfloat16`: rounded first. `ieee`: as they
are, without tensor cores; the only one for float64."""
_Power = Annotated[int, Field(ge=16, le=256)]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tile(_Data):
    """How a product is divided.

    Attributes:
        rows, columns: numbers of the result that a program computes; powers of two.
        depth: numbers of each operand that it multiplies at once; a power of two.
        warps: its warps.
        stages: blocks of operands that are loaded ahead.

    Example:
        >>> Tile(rows=128).columns
        64
    """

    rows: _Power = 64
    columns: _Power = 64
    depth: _Power = 32
    warps: Literal[4, 8] = 4
    stages: Annotated[int, Field(ge=1, le=6)] = 3


class Row(_Data):
    """A shape at which our own kernels were faster.

    Attributes:
        product: how numbers are multiplied.
        inputs, outputs: channels.
        size: height and width of the images.
        tile: the fastest tile.
        speed: how many times as fast as the library it was, over all products.
    """

    product: Product
    inputs: int
    outputs: int
    size: tuple[int, int]
    tile: Tile
    speed: float


class Table(_Data):
    """The rows of each card, by the name that torch gives it."""

    cards: dict[str, tuple[Row, ...]] = {}

    def tile(self, card: str, product: Product, inputs: int, outputs: int, size: tuple[int, int]) -> Tile | None:
        """The tile for a shape; None where the library is as fast, or nobody has measured.

        Example:
            >>> Table().tile("NVIDIA H200", "tf32x3", 128, 128, (16, 16)) is None
            True
        """
        wanted = (product, inputs, outputs, size)
        found = (row.tile for row in self.cards.get(card, ()) if (row.product, row.inputs, row.outputs, row.size) == wanted)
        return next(found, None)


@functools.cache
def measured() -> Table:
    """The table of DSTILL_TILES, or the one of this package.

    Raises:
        DstillError: the file of DSTILL_TILES cannot be read.
    """
    named = os.environ.get("DSTILL_TILES")
    file = Path(named) if named else resources.files(__package__).joinpath("tiles.yaml")
    source = f"{file} (DSTILL_TILES)" if named else str(file)
    try:
        return Table.model_validate(parse(file.read_text(encoding="utf-8"), source))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise DstillError(f"{source} is not a table of tiles: {str(error).splitlines()[0]}") from error
