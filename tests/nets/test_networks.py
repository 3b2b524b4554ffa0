from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from dstill.config.settings import NetConfig
from dstill.errors import DstillError
from dstill.nets import networks as nets
from dstill.nets.alexnet import AlexNet
from dstill.nets.norm import Norm
from dstill.nets.resnet import ResNet18, ResNet18AvgPool
from dstill.nets.vgg import VGG11

ALL = sorted(nets.NETWORKS)
NORMED = [VGG11, ResNet18, ResNet18AvgPool]


def build(name: str, size: tuple[int, int] = (8, 8), *, channels: int = 3, classes: int = 10, seed: int = 0) -> nn.Module:
    return nets.build(NetConfig(name=name), channels, classes, size, torch.Generator().manual_seed(seed))


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("channels", "classes", "size"), [(3, 10, (32, 32)), (1, 10, (8, 8)), (3, 4, (9, 14)), (3, 2, (17, 16))]
)
def test_every_network_gives_one_row_of_logits_an_image(name: str, channels: int, classes: int, size: tuple[int, int]):
    net = build(name, size, channels=channels, classes=classes)
    assert net(torch.rand(2, channels, *size)).shape == (2, classes)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(32, 32), (8, 8)])
def test_features_are_what_enters_the_last_linear_layer(name: str, size: tuple[int, int]):
    net, images = build(name, size), torch.rand(2, 3, *size)
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    features = nets.features(net, images)
    assert features.shape == (2, last.in_features)
    torch.testing.assert_close(last(features), net(images))


@pytest.mark.parametrize("name", ALL)
def test_images_of_8x8_pixels_can_be_told_apart(name: str):
    """An instance norm over a single pixel would give the same features for every image."""
    features = nets.features(build(name), torch.rand(6, 3, 8, 8))
    assert (features.std(0) > 1e-6).float().mean() > 0.4  # a ReLU may silence some


@pytest.mark.parametrize("name", ALL)
def test_every_weight_receives_a_gradient_at_8x8(name: str):
    net = build(name)
    nn.functional.cross_entropy(net(torch.rand(8, 3, 8, 8)), torch.arange(8)).backward()
    for key, parameter in net.named_parameters():
        if parameter.ndim != 1:  # a bias before a norm has none
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, key


def test_alexnet_has_the_published_layers():
    plan = [(3, 128, 5), (128, 192, 5), (192, 256, 3), (256, 192, 3), (192, 192, 3)]
    expected = sum(o * i * k * k + o for i, o, k in plan) + 192 * 4 * 4 * 10 + 10
    assert count(AlexNet(3, 10, (32, 32))) == expected == 1_872_202


def test_vgg11_has_the_usual_number_of_parameters():
    assert count(VGG11(3, 10, (32, 32))) == 9_231_114


def test_resnet18_has_the_usual_number_of_parameters():
    assert count(ResNet18(3, 10, (32, 32))) == 11_173_962


def test_resnet18_with_average_pooling_differs_in_the_linear_layer_alone():
    flattened, averaged = 512 * 4 * 4, 512
    assert count(ResNet18AvgPool(3, 10, (32, 32))) == count(ResNet18(3, 10, (32, 32))) + 10 * (flattened - averaged)


def test_resnet18_with_average_pooling_has_no_strided_convolution():
    strides = {m.stride for m in ResNet18AvgPool(3, 10, (32, 32)).modules() if isinstance(m, nn.Conv2d)}
    assert strides == {(1, 1)}


def test_a_residual_block_without_its_residual_is_the_identity_on_positive_maps():
    block = ResNet18(3, 10, (8, 8)).body[3]
    nn.init.zeros_(block.residual[-1].weight)
    maps = torch.rand(2, 64, 8, 8)
    torch.testing.assert_close(block(maps), maps)


@pytest.mark.parametrize("cls", [VGG11, ResNet18])
def test_a_small_image_changes_no_parameter_shape(cls):
    small, usual = cls(3, 10, (8, 8)), cls(3, 10, (32, 32))
    assert [p.shape for p in small.parameters()] == [p.shape for p in usual.parameters()]


@pytest.mark.parametrize("cls", NORMED)
def test_by_default_each_image_is_normalised_alone_without_running_statistics(cls):
    net, images = cls(3, 4, (8, 8)).double(), torch.rand(3, 3, 8, 8, dtype=torch.float64)
    assert list(net.buffers()) == []
    torch.testing.assert_close(net(images)[:1], net(images[:1]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("cls", NORMED)
@pytest.mark.parametrize("norm", get_args(Norm))
def test_every_norm_fits_every_network(cls, norm: Norm):
    assert cls(3, 4, (9, 8), norm=norm)(torch.rand(2, 3, 9, 8)).shape == (2, 4)


@pytest.mark.parametrize("cls", NORMED)
def test_an_unknown_norm_is_refused(cls):
    with pytest.raises(ValueError, match="unknown norm 'spectral'"):
        cls(3, 4, (8, 8), norm="spectral")


@pytest.mark.parametrize(("cls", "smallest"), [(AlexNet, 8), (VGG11, 2), (ResNet18, 2), (ResNet18AvgPool, 2)])
def test_the_smallest_image_is_accepted_and_a_smaller_one_refused_with_a_sentence(cls, smallest: int):
    assert cls(3, 4, (smallest, smallest))(torch.rand(2, 3, smallest, smallest)).shape == (2, 4)
    for size in [(smallest - 1, 32), (32, smallest - 1)]:
        with pytest.raises(ValueError, match=f"at least {smallest} pixels a side, got {size[0]}x{size[1]}"):
            cls(3, 4, size)


@pytest.mark.parametrize("name", ALL)
def test_the_weights_depend_on_the_generator_alone(name: str):
    torch.manual_seed(1)
    first = build(name, seed=5)
    torch.manual_seed(2)
    second, other = build(name, seed=5), build(name, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_two_networks_of_one_generator_differ():
    generator = torch.Generator().manual_seed(0)
    first, second = (nets.build(NetConfig(width=4), 3, 10, (8, 8), generator) for _ in range(2))
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_building_leaves_the_global_random_state_untouched():
    before = torch.random.get_rng_state()
    build("convnet")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_options_reach_the_network():
    net = nets.build(NetConfig(width=5, depth=2, norm="none"), 3, 10, (8, 8), torch.Generator())
    assert [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)] == [5, 5]
    assert [m for m in net.modules() if isinstance(m, nn.GroupNorm)] == []


def test_an_unknown_name_is_answered_with_a_close_one():
    with pytest.raises(DstillError, match="unknown network 'convnett'; did you mean convnet"):
        build("convnett")


def test_an_option_that_the_network_does_not_take_is_named():
    with pytest.raises(DstillError, match="'alexnet' takes no option width"):
        nets.build(NetConfig(name="alexnet", width=64), 3, 10, (32, 32), torch.Generator())


@pytest.mark.parametrize("name", ["nowhere_at_all:Net", "dstill.nets.convnet:Convnet"])
def test_a_class_that_cannot_be_imported_is_reported_with_its_path(name: str):
    with pytest.raises(DstillError, match=f"network '{name}' cannot be imported"):
        build(name)


def test_an_image_too_small_is_reported_as_the_users_error():
    with pytest.raises(DstillError, match="at least 8 pixels a side, got 4x4"):
        build("alexnet", (4, 4))


def test_the_users_own_class_is_built_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own_network.py").write_text(
        "from torch import nn\n"
        "class Perceptron(nn.Module):\n"
        "    def __init__(self, channels, classes, size, width=7):\n"
        "        super().__init__()\n"
        "        inputs = channels * size[0] * size[1]\n"
        "        hidden = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU())\n"
        "        self.layers = nn.Sequential(hidden, nn.Linear(width, classes))\n"
        "    def forward(self, images):\n"
        "        return self.layers(images)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    net = nets.build(NetConfig(name="own_network:Perceptron", width=11), 2, 3, (4, 5), torch.Generator())
    images = torch.rand(6, 2, 4, 5)
    assert net(images).shape == (6, 3)
    assert nets.features(net, images).shape == (6, 11)


def test_a_network_without_a_linear_layer_has_no_features():
    with pytest.raises(DstillError, match="Conv2d has no linear layer"):
        nets.features(nn.Conv2d(3, 4, 1), torch.rand(1, 3, 4, 4))


def test_reading_features_leaves_no_hook_on_the_network():
    net = build("convnet")
    nets.features(net, torch.rand(1, 3, 8, 8))
    assert all(not module._forward_pre_hooks for module in net.modules())


def test_the_own_network_keeps_its_options_among_the_evaluation_networks():
    own = NetConfig(name="convnet", width=7)
    assert nets.evaluation_nets(own, []) == [own]
    assert nets.evaluation_nets(own, [nets.network_class("vgg11"), "convnet"]) == [NetConfig(name="vgg11"), own]
