from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from dstill.nets.convnet import ConvNet
from dstill.nets.norm import Norm


@pytest.mark.parametrize(
    ("classes", "side", "depth", "published"),
    [(10, 32, 3, 320_010), (100, 32, 3, 504_420), (200, 64, 4, 857_160), (10, 128, 5, 615_690)],
)
def test_it_has_the_published_number_of_parameters(classes: int, side: int, depth: int, published: int):
    net = ConvNet(3, classes, (side, side), depth=depth)
    assert sum(parameter.numel() for parameter in net.parameters()) == published


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("size", [(8, 8), (9, 13)])
def test_every_norm_gives_one_row_of_logits_an_image(norm: Norm, size: tuple[int, int]):
    net = ConvNet(2, 5, size, width=8, norm=norm)
    assert net(torch.rand(3, 2, *size)).shape == (3, 5)


def test_the_instance_norm_removes_mean_and_scale_of_each_channel_of_each_image():
    block = ConvNet(3, 2, (8, 8), width=4, depth=1).body[:2]
    maps = block(torch.rand(5, 3, 8, 8))
    assert maps.mean((2, 3)).abs().max() < 1e-5
    assert (maps.var((2, 3), correction=0) - 1).abs().max() < 1e-2  # the norm's epsilon


def test_the_instance_norm_is_affine_and_keeps_no_running_statistics():
    net = ConvNet(3, 10, (8, 8))
    assert [name for name, _ in net.named_buffers()] == []
    assert len([m for m in net.modules() if isinstance(m, nn.GroupNorm) and m.affine]) == 3


def test_each_block_averages_2x2_pixels():
    net = ConvNet(3, 2, (10, 6), width=4, depth=2)
    assert net.body(torch.rand(1, 3, 10, 6)).shape == (1, 4, 2, 1)
    assert [m for m in net.modules() if isinstance(m, nn.MaxPool2d)] == []


@pytest.mark.parametrize("size", [(7, 32), (32, 7)])
def test_a_side_too_small_for_the_depth_is_refused_with_the_smallest_one(size: tuple[int, int]):
    with pytest.raises(ValueError, match="at least 8 pixels a side"):
        ConvNet(3, 10, size, depth=3)


def test_the_smallest_side_of_a_depth_is_accepted():
    assert ConvNet(3, 10, (8, 8), depth=3)(torch.rand(1, 3, 8, 8)).shape == (1, 10)


def test_an_unknown_norm_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="take one of instance, group, batch, layer, none"):
        ConvNet(3, 10, (8, 8), norm="spectral")  # type: ignore[arg-type]
