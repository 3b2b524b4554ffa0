"""The block in Triton kernels against the block in tensor operations, on a card or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from dstill.derivatives.engine import Derivatives
from dstill.derivatives.unit import TensorUnit
from dstill.nets.convnet import ConvNet

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
pytest.importorskip("triton", reason="Triton is not installed: the kernels for NVIDIA cards are not tested")


def forms(unit: TensorUnit, z: Tensor, dz: Tensor, gy: Tensor, dgy: Tensor, direction: tuple[Tensor | None, Tensor | None]):
    first = [unit.forward(z), unit.backward(gy), *unit.gradients(), unit.mean, unit.r]
    return [*first, *unit.tangent(dz, *direction), *unit.tangent_backward(dgy), *unit.tangent_gradients()]


# 1 to 256 rows per program; a last program that is not full; sides that are odd, not powers of two, or too large for a program.
@pytest.mark.parametrize("shape", [(3, 5, 8, 8), (1, 2, 6, 10), (7, 11, 2, 2), (3, 2, 32, 32), (2, 1, 7, 6), (1, 1, 130, 128)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_kernels_do_what_tensor_operations_do(
    shape: tuple[int, int, int, int], affine: bool, layout: torch.memory_format, dtype: torch.dtype, tolerance: float
) -> None:
    from dstill.derivatives.cuda_unit import ChannelsLastUnit, FusedUnit

    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = shape

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to("cuda" if CUDA else "cpu", dtype)

    scale, shift, z, dz = normal(channels), normal(channels), normal(*shape), normal(*shape)
    gy, dgy = (normal(batch, channels, height // 2, width // 2) for _ in range(2))
    direction = (normal(channels), normal(channels)) if affine else (None, None)
    # Memory comes in any order.
    given = [tensor.contiguous(memory_format=torch.channels_last) for tensor in (z, gy)]
    given = [given[0], dz, given[1], dgy]
    exact = [tensor.double() for tensor in (z, dz, gy, dgy)]
    exactly = (direction[0].double(), direction[1].double()) if affine else (None, None)
    truth = forms(TensorUnit(scale.double(), shift.double()), *exact, direction=exactly)
    made = ChannelsLastUnit if layout == torch.channels_last else FusedUnit
    found = forms(made(scale, shift), *given, direction=direction)
    if height % 2 == width % 2 == 0 and height * width <= 4 * 4096:
        assert found[0].is_contiguous(memory_format=layout), "the next convolution would copy it"
    for expected, value in zip(truth, found, strict=True):
        assert value.shape == expected.shape and value.dtype == dtype
        assert (value.double() - expected).norm() <= tolerance * expected.norm()


def test_what_is_not_a_number_stays_so() -> None:
    from dstill.derivatives.cuda_unit import FusedUnit

    z = torch.zeros(2, 3, 4, 4, device="cuda" if CUDA else "cpu")
    z[0, 1, 2, 2] = float("nan")
    y = FusedUnit(z.new_ones(3), z.new_ones(3)).forward(z)
    assert y.isnan().any(3).any(2).tolist() == [[False, True, False], [False, False, False]]


@pytest.mark.skipif(not CUDA, reason="derivatives use these kernels only on NVIDIA cards")
def test_derivatives_take_the_kernels_on_a_card() -> None:
    from dstill.derivatives.cuda_unit import FusedUnit

    net, device = ConvNet(3, 10, (8, 8), width=4, depth=2), torch.device("cuda")
    assert Derivatives(net, device).operations.unit is FusedUnit
    assert Derivatives(net, device, native=False).operations.unit is TensorUnit
