"""Convolutions in Triton kernels against torch's, on a card or in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dstill.derivatives import build
from dstill.derivatives.convolution import Direct
from dstill.derivatives.engine import Derivatives, describe
from dstill.derivatives.tangent import Operations
from dstill.derivatives.tiles import Row, Table, Tile
from dstill.nets.convnet import ConvNet

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
pytest.importorskip("triton", reason="Triton is not installed: the kernels for NVIDIA cards are not tested")
DEVICE = "cuda" if CUDA else "cpu"
SMALL, LARGE = Tile(rows=16, columns=16, depth=16, stages=1), Tile(rows=64, columns=16, depth=64, stages=1)


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def three(x: Tensor, w: Tensor, g: Tensor) -> list[Tensor]:
    """The convolution and its two transposes by autograd."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    z = F.conv2d(x, w, padding=1)
    return [z.detach(), *torch.autograd.grad(z, (x, w), g)]


SHAPES = [(2, 3, 5, 6, 4), (1, 17, 20, 4, 4), (3, 5, 3, 1, 7), (2, 1, 1, 3, 3)]  # B, I, O, H, W


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pairs", [1, 2])
def test_the_products_are_those_of_autograd(shape: tuple[int, ...], pairs: int) -> None:
    from dstill.derivatives.cuda_convolution import Tiled

    batch, inputs, outputs, height, width = shape
    conv = Tiled("ieee", SMALL, programs=5)
    given, expected = [], list[list[Tensor]]()
    for seed in range(pairs):
        x, w = normal(batch, inputs, height, width, seed=seed), normal(outputs, inputs, 3, 3, seed=seed + 10)
        g = normal(batch, outputs, height, width, seed=seed + 20)
        given.append((conv.input(x), conv.weight(w), conv.output(g)))
        expected.append(three(x, w, g))
    found = [
        conv.forward(*((x, w) for x, w, _ in given)),
        conv.by_input(*((g, w) for _, w, g in given)),
        conv.weight_adjoint(conv.by_weight(*((g, x) for x, _, g in given))),
    ]
    for value, *terms in zip(found, *expected, strict=True):
        torch.testing.assert_close(value, torch.stack(terms).sum(0), rtol=0, atol=1e-12)


def test_what_is_not_a_number_spreads_to_its_neighbours_alone() -> None:
    """The last block of places and channels is not full."""
    from dstill.derivatives.cuda_convolution import Tiled

    x, w = normal(1, 5, 7, 7, seed=0), normal(3, 5, 3, 3, seed=1)
    x[0, 2, 3, 3] = float("nan")
    conv = Tiled("ieee", SMALL)
    found = conv.forward((conv.input(x), conv.weight(w)))
    assert torch.equal(found.isnan(), F.conv2d(x, w, padding=1).isnan())


@pytest.mark.parametrize(("product", "tolerance"), [("tf32x3", 1e-6), ("tf32", 2e-3), ("bfloat16", 2e-2)])
def test_float32_is_as_accurate_as_its_product_allows(product: Any, tolerance: float) -> None:
    """The interpreter multiplies as float32; a card rounds first."""
    if product == "bfloat16" and not CUDA:
        pytest.skip("Triton's interpreter takes the bits of bfloat16 for whole numbers")
    from dstill.derivatives.cuda_convolution import Tiled

    x, w, g = (normal(*size, seed=seed) for seed, size in enumerate([(2, 20, 6, 6), (9, 20, 3, 3), (2, 9, 6, 6)]))
    conv = Tiled(product, LARGE, programs=8)
    a, b, c = conv.input(x.float()), conv.weight(w.float()), conv.output(g.float())
    found = conv.forward((a, b)), conv.by_input((c, b)), conv.weight_adjoint(conv.by_weight((c, a)))
    for value, exact in zip(found, three(x, w, g), strict=True):
        assert value.dtype == torch.float32
        assert (value - exact).norm() <= tolerance * exact.norm()
    rounded = not torch.allclose(found[0].double(), three(x, w, g)[0], rtol=1e-5, atol=1e-5)
    assert rounded == (CUDA and product != "tf32x3")


def test_the_derivatives_of_a_network_in_these_kernels_are_those_in_tensor_operations() -> None:
    from dstill.derivatives.cuda_convolution import Tiled
    from dstill.derivatives.cuda_unit import ChannelsLastUnit

    net = ConvNet(3, 4, (8, 8), width=5, depth=2).double().to(DEVICE)
    parameters, direction = ([normal(*p.shape, seed=i) for p in net.parameters()] for i in (1, 2))
    images, targets = normal(3, 3, 8, 8, seed=3), normal(3, 4, seed=4).softmax(1)
    results = []
    for own in (False, True):
        derivatives = Derivatives(net, torch.device(DEVICE), torch.float64, native=False)
        if own:
            convolutions = [Tiled("ieee", LARGE, programs=2) for _ in derivatives.geometry]
            derivatives.operations = Operations(ChannelsLastUnit, convolutions, convolutions)
        gradient = derivatives.gradient(parameters, images, targets, keep=True)
        tangents = derivatives.tangents(parameters, direction, images, targets, gradient.kept)
        penalty, by_penalty = derivatives.penalty(parameters, images, pixelwise=False)
        results.append([*gradient.parameters, *tangents.parameters, tangents.images, penalty, *by_penalty])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-11)


ROW = Row(product="tf32x3", inputs=3, outputs=4, size=(8, 8), tile=Tile(rows=32), speed=2.0)


def test_a_shape_that_was_measured_runs_in_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from dstill.derivatives.cuda_convolution import Tiled
    from dstill.derivatives.cuda_unit import ChannelsLastUnit, FusedUnit

    monkeypatch.setattr(build, "_found_fused", lambda: (FusedUnit, ""))
    monkeypatch.setattr(build.tiles, "measured", lambda: Table(cards={"Card": (ROW,)}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    net, card = ConvNet(3, 10, (8, 8), width=4, depth=2), torch.device("cuda")
    first, second = Derivatives(net, card).operations.first
    assert isinstance(first, Tiled) and first.product == "tf32x3" and first.tile.rows == 32
    assert isinstance(second, Direct)
    assert Derivatives(net, card).operations.unit is ChannelsLastUnit
    assert describe(net, card) == "fused kernels with own convolutions in block 1"
    assert describe(net, card, "bfloat16") == "fused kernels"
    for without in (
        Derivatives(net, card, native=False),
        Derivatives(net, card, torch.float64),
        Derivatives(net, card, precision="bfloat16"),
        Derivatives(ConvNet(3, 10, (8, 8), width=5, depth=2), card),
        Derivatives(net, torch.device("cpu")),
    ):
        assert not any(isinstance(conv, Tiled) for conv in without.operations.first)
    assert Derivatives(net, card, precision="bfloat16").operations.unit is FusedUnit
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    assert not any(isinstance(conv, Tiled) for conv in Derivatives(net, card).operations.first)
    monkeypatch.setattr(build, "_found_fused", lambda: (None, "install triton"))
    assert build.tiled(card, "tf32x3", 3, 4, (8, 8)) is None


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dstill.derivatives.cuda_convolution import _convolve, _correlate

CONSTANTS = {"PAIRS": 2, "TRANSPOSED": False, "H": 16, "W": 16, "C": 128, "N": 128}
CONSTANTS |= {"PRODUCT": "tf32x3", "ROWS": 64, "COLUMNS": 64, "DEPTH": 32}
for kernel in (_convolve, _correlate):
    types, constants = {}, {}
    for number, name in enumerate(kernel.arg_names):
        if name in CONSTANTS:
            types[name], constants[number,] = "constexpr", CONSTANTS[name]
        else:
            types[name] = "i32" if name in ("count", "share") else "*fp32"
    made = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(made.asm["ptx"].count("wgmma.mma_async"), made.asm["ptx"].count("fma.rn.f32"))
"""


def test_the_compiler_puts_them_on_the_tensor_cores_of_an_h100() -> None:
    """Three products for one, and none beside the tensor cores. This needs no card."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        on_tensor_cores, beside = map(int, line.split())
        assert on_tensor_cores > 0 and on_tensor_cores % 3 == 0 and beside == 0
    assert len(done.stdout.splitlines()) == 2
