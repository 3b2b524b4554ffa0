"""Finds the shapes at which our own convolutions are faster than the library's on this NVIDIA card, and their tiles.

    python benchmarks/tiles_cuda.py -o tiles.yaml            # minutes; then DSTILL_TILES=tiles.yaml dstill run …

Most of the time goes to the compiler, which runs on all cores.

The products of one step of the unrolled gradient are measured in turns, by medians: two forward, two by the input and two by
the weight, one of each a sum of two. A shape is written if our own kernels win at every size of batch. Tiles whose error
against float64 is more than twice the library's in the same precision are left out.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from speed import in_turns
from torch import Tensor

from dstill.artifacts import files
from dstill.config.yamls import dump
from dstill.derivatives.convolution import Convolution, Direct
from dstill.derivatives.cuda_convolution import Tiled
from dstill.derivatives.tiles import Product, Row, Table, Tile
from dstill.errors import DstillError
from dstill.support.devices import full_precision
from dstill.support.workers import cores

TILES = [
    Tile(rows=rows, columns=columns, depth=32, warps=warps, stages=stages)
    for rows, columns, warps in ((32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8))
    for stages in (2, 4)
]
REPEATS, WARM = 10, 2  # products per measurement; measurements that are not counted


class Shape(NamedTuple):
    """Channels in and out, and the side of the images."""

    inputs: int
    outputs: int
    side: int


def shapes(width: int, side: int) -> list[Shape]:
    """The 3x3 convolutions of a ConvNet on images of this side, down to images of 8 pixels."""
    found = [Shape(3, width, side)]
    while (side := side // 2) >= 8:
        found.append(Shape(width, width, side))
    return found


def operands(shape: Shape, batch: int, device: str, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Images, weight and gradient by the output: of the network, then of a direction."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = (batch, shape.inputs, shape.side, shape.side), (shape.outputs, shape.inputs, 3, 3)
    sizes += ((batch, shape.outputs, shape.side, shape.side),)
    x, w, g = ([torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(2)] for size in sizes)
    return list(zip(x, w, g, strict=True))


def products(conv: Convolution, given: Iterable[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    """What one step multiplies in one block, transformed there and back."""
    (x, w, g), (dx, dw, dg) = ((conv.input(x), conv.weight(w), conv.output(g)) for x, w, g in given)
    found = [conv.forward((x, w)), conv.forward((dx, w), (x, dw)), conv.by_input((g, w)), conv.by_input((dg, w), (g, dw))]
    return [*found, *(conv.weight_adjoint(conv.by_weight(*pairs)) for pairs in ([(g, x)], [(dg, x), (g, dx)]))]


def error(conv: Convolution, shape: Shape, device: str) -> float:
    """The largest relative error of the products of four images against float64."""
    given = operands(shape, 4, device)
    exact = products(Direct(torch.float64), [tuple(t.double() for t in some) for some in given])  # type: ignore[misc]
    pairs = zip(products(conv, given), exact, strict=True)
    return max(float((found - truth).norm() / truth.norm()) for found, truth in pairs)


def fastest(shape: Shape, product: Product, batches: Iterable[int], rounds: int, device: str) -> Row | None:
    """The row of a shape; None where the library is as fast at one size of batch."""
    library = Direct(torch.float32, torch.bfloat16 if product == "bfloat16" else None)
    allowed = 2 * error(library, shape, device)
    with executor() as pool:  # each leaves what it has compiled on disk
        fit = list(pool.map(_runs, TILES, *(itertools.repeat(same) for same in (product, shape, allowed, device))))
    ways = {tile: Tiled(product, tile) for tile, runs in zip(TILES, fit, strict=True) if runs}
    speeds: dict[Tile, list[float]] = {tile: [] for tile in ways}
    for batch in batches:
        given = operands(shape, batch, device)
        work = {"library": repeated(library, given, device)}
        work |= {str(tile): repeated(way, given, device) for tile, way in ways.items()}
        seconds = in_turns(work, rounds, WARM, torch.cuda.synchronize if device == "cuda" else lambda: None)
        for tile, found in speeds.items():
            found.append(seconds["library"] / seconds[str(tile)])
    best = max(speeds, key=lambda tile: min(speeds[tile]), default=None)
    if best is None:
        return None
    print(shape, product, best, speeds[best], flush=True)
    if min(speeds[best]) <= 1:
        return None
    size = (shape.side, shape.side)
    return Row(product=product, inputs=shape.inputs, outputs=shape.outputs, size=size, tile=best, speed=min(speeds[best]))


def repeated(conv: Convolution, given: Any, device: str) -> Callable[[], object]:
    """The products, some times over. On a card they are replayed, as in a distillation: launching them would take longer."""

    def work() -> None:
        for _ in range(REPEATS):
            products(conv, given)

    if device != "cuda":
        return work
    work()  # compiles, and lets the library choose
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def executor() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(min(len(TILES), cores()), multiprocessing.get_context("spawn"))


def _runs(tile: Tile, product: Product, shape: Shape, allowed: float, device: str) -> bool:
    """Whether a tile fits the card and is accurate enough."""
    try:
        with full_precision(), torch.no_grad():
            return error(Tiled(product, tile), shape, device) <= allowed
    except Exception as found:  # of many types: too much shared memory, a compiler that gives up
        print(shape, tile, str(found).splitlines()[:1], flush=True)
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="the table to write")
    parser.add_argument("--widths", default="128", help="joined by commas")
    parser.add_argument("--sides", default="32", help="sides of the images, joined by commas")
    parser.add_argument("--batches", default="10,100", help="images at once, joined by commas")
    parser.add_argument("--products", default="tf32x3,bfloat16", help="joined by commas")
    parser.add_argument("--rounds", type=int, default=7, help="number of measurements per time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise DstillError("this measures an NVIDIA card, and torch finds none here")
    given = (options.batches, options.widths, options.sides)
    batches, widths, sides = ([int(one) for one in text.split(",")] for text in given)
    wanted = dict.fromkeys(shape for width, side in itertools.product(widths, sides) for shape in shapes(width, side))
    rows: list[Row] = []
    for product, shape in itertools.product(options.products.split(","), wanted):
        with full_precision(), torch.no_grad():
            row = fastest(shape, product, batches, options.rounds, "cuda")
        rows += [] if row is None else [row]
        table = Table(cards={torch.cuda.get_device_name(): tuple(rows)})
        files.write_text(options.out, dump(table.model_dump(mode="json")))


if __name__ == "__main__":
    main()
