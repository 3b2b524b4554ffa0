"""Networks of timm by name. A stand-in shows what timm is asked; timm itself, where it is installed, that its networks work."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import dstill
from dstill import DstillError
from dstill.config.settings import NetConfig, Protocol
from dstill.data.real import RealSet
from dstill.evaluation.networks import score_network, train_network
from dstill.nets import networks as nets

TINY = "timm:test_resnet"  # half a million weights, with batch norm


def build(name: str, size: tuple[int, int] = (8, 8), *, channels: int = 3, seed: int = 0) -> nn.Module:
    return nets.build(NetConfig(name=name), channels, 4, size, torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """A network for images of one size, with running statistics and dropout."""

    def __init__(self, in_chans: int, num_classes: int, img_size: tuple[int, int]) -> None:
        super().__init__()
        assert img_size[0] % 4 == 0, f"Input height ({img_size[0]}) should be divisible by patch size (4)."
        self.body = nn.Sequential(nn.Conv2d(in_chans, 6, img_size), nn.BatchNorm2d(6), nn.Flatten(), nn.Dropout(0.5))
        self.head = nn.Linear(6, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


class Free(nn.Module):
    """A network for images of any size from 8 pixels on."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.features, self.classes = nn.Conv2d(in_chans, 5, 8), nn.Linear(5, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classes(self.features(images).mean((2, 3)))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two networks under timm's functions. Returns what `create_model` was asked."""
    asked: list[dict[str, Any]] = []
    table = {"fixed": Fixed, "free": Free, "maps": lambda in_chans, num_classes: nn.Conv2d(in_chans, num_classes, 1)}

    def create_model(name: str, *, pretrained: bool, **shape: Any) -> nn.Module:
        asked.append({"name": name, "pretrained": pretrained, **shape})
        return table[name](**shape)

    module = SimpleNamespace(is_model=table.__contains__, list_models=lambda: sorted(table), create_model=create_model)
    monkeypatch.setitem(sys.modules, "timm", module)  # type: ignore[arg-type]
    return asked


def test_timm_is_asked_for_an_untrained_network_of_the_shape(stand_in: list[dict[str, Any]]) -> None:
    assert build("timm:fixed", (8, 12), channels=2)(torch.rand(3, 2, 8, 12)).shape == (3, 4)
    shape = {"pretrained": False, "in_chans": 2, "num_classes": 4}
    assert stand_in == [{"name": "fixed", "img_size": (8, 12), **shape}]
    stand_in.clear()
    assert build("timm:free", (8, 12), channels=2)(torch.rand(3, 2, 9, 9)).shape == (3, 4)
    assert stand_in == [{"name": "free", "img_size": (8, 12), **shape}, {"name": "free", **shape}]


def test_the_weights_depend_on_the_generator_alone(stand_in: list[dict[str, Any]]) -> None:
    torch.manual_seed(1)
    first = build("timm:free", seed=5)
    torch.manual_seed(2)
    second, other = build("timm:free", seed=5), build("timm:free", seed=6)
    assert torch.equal(first.features.weight, second.features.weight)
    assert not torch.equal(first.features.weight, other.features.weight)


def test_a_fresh_network_is_in_training_mode_with_fresh_statistics(stand_in: list[dict[str, Any]]) -> None:
    net = build("timm:fixed")
    assert net.training and int(net.body[1].num_batches_tracked) == 0


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        (
            "timm:fixed",
            (10, 12),
            r"timm:fixed takes no images of 3x10x12: Input height \(10\) should be divisible by patch size",
        ),
        ("timm:free", (4, 8), r"timm:free takes no images of 3x4x8: .*Kernel size.*or larger images with --image-size"),
        ("timm:maps", (8, 8), r"timm:maps is no classifier: it gives \(1, 4, 8, 8\)"),
        ("timm:fxed", (8, 8), r"unknown network 'timm:fxed'; did you mean timm:fixed"),
        ("timm:hf-hub:owner/name", (8, 8), r"unknown network 'timm:hf-hub:owner/name'; timm.list_models\(\) lists the names"),
    ],
)
def test_what_timm_cannot_do_is_a_sentence(
    stand_in: list[dict[str, Any]], name: str, size: tuple[int, int], sentence: str
) -> None:
    with pytest.raises(DstillError, match=sentence):
        build(name, size)


def test_an_option_is_refused(stand_in: list[dict[str, Any]]) -> None:
    with pytest.raises(DstillError, match="'timm:free' takes no option width"):
        nets.build(NetConfig(name="timm:free", width=3), 3, 4, (8, 8), torch.Generator())


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(DstillError, match=r"timm is not installed: pip install 'dstill\[timm\]'"):
        build(TINY)


@pytest.mark.parametrize(
    ("first_line", "sentence"),
    [
        ("raise RuntimeError('operator torchvision::nms does not exist')", "nms does not exist. Does torchvision fit"),
        ("import nowhere_at_all", "timm cannot be imported: No module named 'nowhere_at_all'"),
    ],
)
def test_a_timm_that_cannot_be_imported_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_line: str, sentence: str
) -> None:
    (tmp_path / "timm.py").write_text(first_line)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DstillError, match=sentence):
        build(TINY)


def test_timm_is_not_imported_because_a_file_names_it(tiny_real: RealSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    one = dstill.distill(tiny_real, method="random", recipe="smoke", progress=False).with_net(NetConfig(name=TINY))
    with pytest.raises(DstillError, match=f"pass --nets {TINY}"):
        dstill.evaluate(one, tiny_real, random=False, progress=False)


def measured(net: str, batch_size: int = 8) -> float:
    """The accuracy of a network that is trained for two passes on nine images."""
    images = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    protocol = Protocol(
        name="p", version=1, passes=2, batch_size=batch_size, momentum=0.9, weight_decay=0.0, lr=0.01, networks=1
    )
    test = (torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(200) % 4)
    generator = torch.Generator().manual_seed(3)
    shape: dict[str, Any] = {"classes": 4, "protocol": protocol, "lr": 0.01, "augmentation": "none", "generator": generator}
    network = train_network(NetConfig(name=net), images, torch.arange(9) % 4, **shape)
    return score_network(network, test, 4).accuracy


def test_dropout_is_drawn_from_the_seed(stand_in: list[dict[str, Any]]) -> None:
    torch.manual_seed(1)
    first, state = measured("timm:fixed", 5), torch.random.get_rng_state()
    torch.manual_seed(2)
    assert measured("timm:fixed", 5) == first
    torch.manual_seed(1)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's own draws go on as if nothing had been drawn"


def test_a_batch_of_a_single_image_is_refused_where_batch_norm_needs_two(stand_in: list[dict[str, Any]]) -> None:
    with pytest.raises(DstillError, match="of 9 images in batches of 8 one stays alone"):
        measured("timm:fixed", 8)
    assert 0 <= measured("timm:free", 8) <= 1


# --- with timm itself -------------------------------------------------------------------------------------------------


@pytest.fixture
def timm() -> ModuleType:
    return pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)


@pytest.mark.parametrize("name", ["timm:resnet18", TINY, "timm:vit_tiny_patch16_224", "timm:test_convnext"])
def test_a_network_of_timm_gives_one_row_of_logits_an_image(timm: ModuleType, name: str) -> None:
    assert build(name, (32, 32), channels=1)(torch.rand(2, 1, 32, 32)).shape == (2, 4)


def test_a_network_of_timm_is_drawn_from_the_generator(timm: ModuleType) -> None:
    first, second, other = (build(TINY, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_a_size_that_a_network_of_timm_cannot_take_is_refused(timm: ModuleType) -> None:
    with pytest.raises(DstillError, match=r"timm:inception_v3 takes no images of 3x32x32: .*Kernel size"):
        build("timm:inception_v3", (32, 32))
    with pytest.raises(DstillError, match="timm:test_vit takes no images of 3x33x32: Input height"):
        build("timm:test_vit", (33, 32))
    with pytest.raises(DstillError, match="did you mean timm:resnet18"):
        build("timm:resnet18x")


def test_a_set_is_evaluated_with_a_network_of_timm(timm: ModuleType, tiny_real: RealSet, tmp_path: Path) -> None:
    """Its running statistics come from the training; the project's ResNet-18 of batch norm is measured in the same way."""
    one = dstill.distill(tiny_real, method="random", ipc=10, recipe="smoke", progress=False)
    one.save(tmp_path / "set")
    (tmp_path / "tiny.yaml").write_text(
        "{name: tiny, version: 1, passes: 30, batch_size: 15, momentum: 0.9, weight_decay: 5e-4, lr: 0.01, networks: 2}"
    )
    options: dict[str, Any] = {"protocol": str(tmp_path / "tiny.yaml"), "random": False, "progress": False}
    result = dstill.evaluate(one, tiny_real, nets=[TINY, "convnet"], **options)
    assert list(result.nets) == [TINY, "convnet"] and result.accuracy.mean > 0.6
    assert dstill.evaluate(one, tiny_real, nets=[TINY], **options).accuracy == result.accuracy
