"""DM and CAFE against naive means, and the outputs of blocks that CAFE matches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dstill.methods.batches import mean_distance
from dstill.methods.cafe import discrimination, spread_of
from dstill.nets import networks as nets
from dstill.nets.convnet import ConvNet
from dstill.nets.networks import NETWORKS


def test_alignment_is_the_squared_distance_of_the_means_summed_over_all_numbers() -> None:
    real, synthetic = torch.randn(8, 5, 2, 2, dtype=torch.float64), torch.randn(3, 5, 2, 2, dtype=torch.float64)
    flat = real.flatten(1).tolist(), synthetic.flatten(1).tolist()
    means = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in flat]
    by_hand = sum((a - b) ** 2 for a, b in zip(*means, strict=True))
    assert float(mean_distance(real, synthetic)) == pytest.approx(by_hand, rel=1e-12)
    assert float(mean_distance(real.flatten(1), synthetic.flatten(1))) == pytest.approx(by_hand, rel=1e-12)


def test_discrimination_takes_the_centres_for_a_classifier() -> None:
    real, labels, centres = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(3, 4)
    expected = -sum(F.log_softmax(centres @ image, 0)[label] for image, label in zip(real, labels, strict=True))
    torch.testing.assert_close(discrimination(real, labels, centres), expected)


def test_the_loops_look_back_on_a_full_window_alone() -> None:
    assert spread_of([0.1, 0.9], 3) is None
    assert spread_of([0.0, 0.5, 0.4, 0.6], 3) == pytest.approx(0.2)
    assert spread_of([0.9, 0.5, 0.4, 0.6], 3) == pytest.approx(0.2)


def test_the_layers_of_a_convnet_are_its_maps_before_pooling_and_its_features() -> None:
    net, images = ConvNet(3, 2, (16, 16), width=4, depth=3), torch.randn(2, 3, 16, 16)
    found = nets.layers(net, images)
    assert [tuple(layer.shape[1:]) for layer in found] == [(4, 16, 16), (4, 8, 8), (4, 4, 4), (16,)]
    torch.testing.assert_close(F.avg_pool2d(found[-2], 2).flatten(1), found[-1])


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_network_has_layers_and_forgets_the_hooks(name: str) -> None:
    from dstill.config.settings import NetConfig

    net = nets.build(NetConfig(name=name), 3, 2, (16, 16), torch.Generator().manual_seed(0))
    images = torch.randn(2, 3, 16, 16)
    found = nets.layers(net, images)
    assert len(found) >= 3 and found[-1].dim() == 2
    assert len(nets.layers(net, images)) == len(found)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
