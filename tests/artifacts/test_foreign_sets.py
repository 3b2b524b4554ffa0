"""An import checks itself: network, classes, preprocessing and names are compared with the data before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts.looks import Correlations, look_of
from dstill.cli import main as cli
from dstill.data import preprocess
from dstill.data.real import RealSet, Split
from dstill.errors import DstillWarning


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))


def smooth(count: int, side: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    """Images whose neighbours and channels correlate as those of photographs do, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 3, 3, generator=generator) + 0.2 * torch.rand(count, channels, 3, 3, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    fine = fine + 0.1 * torch.rand(count, channels, side, side, generator=generator)
    return (fine / 1.3 * 255).byte()


@pytest.fixture(scope="module")
def real() -> RealSet:
    """Four classes of smooth colour images."""
    labels = torch.arange(4).repeat(100)
    return RealSet("smooth", Split(smooth(400), labels), Split(smooth(40, seed=1), labels[:40]), ("ant", "bee", "cat", "dog"))


def stored(folder: Path, images: Tensor, labels: Any, **more: Any) -> Path:
    for name, content in {"images": images, "labels": labels, **more}.items():
        torch.save(content, folder / f"{name}_best.pt")
    return folder / "images_best.pt"


@pytest.fixture
def silent() -> Iterator[None]:
    """Any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DstillWarning)
        yield


# --- network, augmentation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "depth"), [(8, 2), (16, 2), (32, 3), (64, 4), (128, 5)])
def test_the_depth_of_the_network_follows_from_the_size_of_the_images(tmp_path: Path, side: int, depth: int) -> None:
    split = Split(torch.randint(0, 255, (2, 3, side, side)).byte(), torch.tensor([0, 1]))
    data = RealSet("sized", split, split, ("a", "b"))
    path = stored(tmp_path, torch.randn(2, 3, side, side), torch.tensor([0, 1]))
    net = dstill.import_set(path, data, preprocess="standardise").net
    assert (net.name, net.depth, net.width, net.norm) == ("convnet", depth, None, None)
    told = dstill.import_set(path, data, preprocess="standardise", changes=["net.depth=1", "net.width=7", "net.norm=batch"]).net
    assert (told.depth, told.width, told.norm) == (1, 7, "batch")
    assert dstill.import_set(path, data, preprocess="standardise", net="resnet18").net.depth is None


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"net": "convnte"}, "unknown network 'convnte'; did you mean convnet"),
        ({"augmentation": "flip_crp"}, "unknown augmentation 'crp'"),
        ({"changes": ["net.depht=3"]}, "unknown key 'depht'; did you mean depth"),
        ({"changes": ["distill.iterations=3"]}, "no setting 'distill'"),
        ({"changes": ["net.depth=9"]}, "a ConvNet of depth 9 needs images"),
        ({"net": "resnet18", "changes": ["net.depth=3"]}, "takes no option depth"),
        ({"preprocess": "zac"}, "unknown preprocessing 'zac'; did you mean zca"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_written(
    real: RealSet, tmp_path: Path, told: dict[str, Any], message: str
) -> None:
    path = stored(tmp_path, torch.randn(4, 3, 8, 8), torch.arange(4))
    with pytest.raises(DstillError, match=message):
        dstill.import_set(path, real, **{"preprocess": "standardise", **told})


def test_the_command_imports_what_the_function_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path, torch.randn(10, 1, 8, 8), torch.arange(10), lr=torch.tensor(0.5))
    monkeypatch.chdir(tmp_path)

    def called(*arguments: str) -> int:
        argv = ["dstill", "import", ".", "digits", "--preprocess", "standardise", *arguments]
        monkeypatch.setattr("sys.argv", argv)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    assert called("-o", "no", "--net", "nonesuch") == 2 and not (tmp_path / "no").exists()
    assert called("-o", "out", "--method", "mtt", "--set", "net.width=4", "net.norm=none") == 0
    one = DistilledSet.load("out")
    assert (one.method, one.alpha, one.net.depth, one.net.width, one.net.norm) == ("mtt", 0.5, 2, 4, "none")


# --- classes ----------------------------------------------------------------------------------------------------------


def test_a_part_of_a_set_is_refused_and_says_which_classes_are_missing(real: RealSet, tmp_path: Path) -> None:
    path = stored(tmp_path, torch.randn(4, 3, 8, 8), torch.tensor([0, 0, 2, 2]))
    for said in ("standardise", "zca"):
        with pytest.raises(DstillError, match=r"images of 2 of 4 classes and none of bee, dog: .* pass --classes ant,cat"):
            dstill.import_set(path, real, preprocess=said)
    assert not (tmp_path / "cache").exists(), "no whitening was fitted first"
    some = dstill.load_real(real, classes=["ant", "cat"])
    path = stored(tmp_path, torch.randn(4, 3, 8, 8), torch.tensor([0, 0, 1, 1]))
    assert dstill.import_set(path, some, preprocess="standardise").ipc == 2


def test_classes_that_no_soft_label_favours_and_uneven_classes_are_named(real: RealSet, tmp_path: Path) -> None:
    path = stored(tmp_path, torch.randn(4, 3, 8, 8), torch.eye(4)[[0, 1, 1, 3]] * 5)
    with pytest.warns(DstillWarning, match=r"favours 1 of 4 classes \(cat\)"):
        assert dstill.import_set(path, real, preprocess="standardise").ipc == 1
    path = stored(tmp_path, torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 1, 1, 2, 3]))
    with pytest.warns(DstillWarning, match=r"has from 1 \(ant\) to 3 images of a class"):
        assert dstill.import_set(path, real, preprocess="standardise").ipc == 3


# --- preprocessing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", ["standardise", "zca"])
@pytest.mark.parametrize("said", ["standardise", "zca"])
def test_images_that_look_otherwise_than_is_said_are_noticed(real: RealSet, tmp_path: Path, applied: str, said: str) -> None:
    images = preprocess.fit(applied, real.train.images).forward(smooth(40, seed=7).float() / 255)
    images = images + 0.2 * images.std() * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    path = stored(tmp_path, images, torch.arange(4).repeat(10))
    assert look_of(images, real).kind == applied
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one = dstill.import_set(path, real, preprocess=said)
    assert one.preprocess.kind == said
    told = [str(warning.message) for warning in caught if issubclass(warning.category, DstillWarning)]
    if applied == said:
        assert not told
    else:
        remedy = "zca" if applied == "zca" else "published or standardise"
        assert len(told) == 1 and f"pass --preprocess {remedy}" in told[0] and f"preprocess {said} says" in told[0]


def test_images_that_tell_nothing_raise_no_warning(real: RealSet, tmp_path: Path, silent: None) -> None:
    for images in (torch.randn(4, 3, 8, 8), torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), float("nan"))):
        assert look_of(images, real).kind == ""
        for said in ("standardise", "zca"):
            dstill.import_set(stored(tmp_path, images, torch.arange(4)), real, preprocess=said)
    assert look_of(torch.zeros(0, 3, 8, 8), real).kind == ""


def test_plain_pixels_are_noticed_and_standardised_if_that_is_said(real: RealSet, tmp_path: Path) -> None:
    pixels = smooth(4, seed=5)
    expected = preprocess.fit("standardise", real.train.images).forward(pixels.float() / 255)
    for images, said in ((pixels.float() / 255, "pixels"), (pixels, "pixels"), (pixels, "standardise"), (pixels, "published")):
        with warnings.catch_warnings():
            warnings.simplefilter("error", DstillWarning)
            one = dstill.import_set(stored(tmp_path, images, torch.arange(4)), real, preprocess=said)
        torch.testing.assert_close(one.images, expected)
    with pytest.warns(DstillWarning, match=r"pixels without any preprocessing: they lie between .* pass --preprocess pixels"):
        dstill.import_set(stored(tmp_path, pixels.float() / 255, torch.arange(4)), real, preprocess="standardise")


def test_bytes_that_are_stored_as_floats_are_pixels_and_standardised_images_are_not(
    real: RealSet, tmp_path: Path, silent: None
) -> None:
    pixels = smooth(4, seed=5)
    fitted = preprocess.fit("standardise", real.train.images)
    one = dstill.import_set(stored(tmp_path, pixels.float(), torch.arange(4)), real, preprocess="pixels")
    torch.testing.assert_close(one.images, fitted.forward(pixels.float() / 255))
    outside = (pixels.float() / 255 - 0.5) * 1.5 + 0.5  # a little, as distilled pixels are
    one = dstill.import_set(stored(tmp_path, outside, torch.arange(4)), real, preprocess="pixels")
    torch.testing.assert_close(one.images, fitted.forward(outside))
    path = stored(tmp_path, fitted.forward(smooth(40, seed=5).float() / 255), torch.arange(4).repeat(10))
    with pytest.raises(DstillWarning, match="do not look as preprocess pixels says, but standardised"):
        dstill.import_set(path, real, preprocess="pixels")


def test_a_preprocessing_beside_the_images_must_fit_them(real: RealSet, tmp_path: Path) -> None:
    path = stored(tmp_path, torch.randn(4, 3, 8, 8), torch.arange(4))
    zca = preprocess.fit("zca", real.train.images).tensors()
    for wrong in (
        {"mean": torch.zeros(2), "std": torch.ones(2)},
        {"mean": torch.full((3,), float("nan")), "std": torch.ones(3)},
        {**zca, "basis": torch.zeros(5, 5)},
        {"mean": torch.zeros(3)},
        {"mean": torch.zeros(3), "std": torch.ones(3), "fingerprint": torch.ones(1)},
    ):
        torch.save({f"preprocess.{name}": tensor for name, tensor in wrong.items()}, tmp_path / "preprocess.pt")
        with pytest.raises(DstillError, match="preprocess"):
            dstill.import_set(path, real)


def test_correlations_are_those_of_neighbours_and_of_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(50, 2, 6, 9, generator=generator, dtype=torch.float64)
    images[:, 1] += images[:, 0]
    found = Correlations.of(images)
    centred = images - images.mean((0, 2, 3), keepdim=True)
    neighbours = float((centred[..., 1:] * centred[..., :-1]).mean() / centred.square().mean())
    flat = images.transpose(0, 1).reshape(2, -1).numpy()
    assert found == pytest.approx((neighbours, np.corrcoef(flat)[0, 1]))
    assert Correlations.of(images[:, :1]).channels == 0
    assert Correlations(0.0, 0.3).distance(Correlations(0.4, 0.0)) == pytest.approx(0.5)


def test_an_imported_whitening_is_fitted_once(real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path, torch.randn(4, 3, 8, 8), torch.arange(4))
    first = dstill.import_set(path, real, preprocess="zca")
    monkeypatch.setattr(preprocess, "fit", lambda *_: pytest.fail("fitted again"))
    again = dstill.import_set(path, real, preprocess="zca")
    assert torch.equal(first.pixels(), again.pixels())
    file = again.save(tmp_path / "out")
    assert list(file.parent.iterdir()) == [file], "the whitening lies in the cache"


def test_our_own_pt_export_brings_its_preprocessing_unless_another_is_said(real: RealSet, tmp_path: Path) -> None:
    for kind in ("standardise", "zca"):
        fitted = preprocess.fit(kind, real.train.images)
        one = DistilledSet.from_tensors(
            fitted.forward(smooth(4, seed=3).float() / 255), [0, 1, 2, 3], real=real, preprocess=fitted
        )
        folder = one.export("pt", tmp_path / kind)
        back = dstill.import_set(folder, real)
        assert (
            back.preprocess.kind == kind and torch.equal(back.images, one.images) and torch.equal(back.pixels(), one.pixels())
        )
    assert dstill.import_set(folder, real, preprocess="standardise").preprocess.kind == "standardise"


# --- folders of images ------------------------------------------------------------------------------------------------


def written(path: Path, image: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(path)


NAMINGS = {
    "names": lambda c, k: f"{('ant', 'bee', 'cat', 'dog')[c]}/{k}.png",
    "other case": lambda c, k: f"{('Ant', 'BEE', 'Cat', 'dog')[c]}/{k}.png",
    "numbers": lambda c, k: f"{c:05d}/{c:05d}_{k}.png",
    "RDED": lambda c, k: f"{c:05d}/class{c:05d}_id{k:05d}.png",
    "SRe2L": lambda c, k: f"new{c:03d}/class{c:03d}_id{k:03d}.png",
    "dstill": lambda c, k: f"{c:03d}-{('ant', 'bee', 'cat', 'dog')[c]}/{k:03d}.png",
    "flat": lambda c, k: f"class{c:03d}_id{k:03d}.png",
    "flat names": lambda c, k: f"{('ant', 'bee', 'cat', 'dog')[c]}_{k}.png",
    "flat numbers": lambda c, k: f"{c}-{k}.png",
}


@pytest.mark.parametrize("naming", list(NAMINGS))
def test_a_folder_of_images_is_read_by_names_or_numbers_of_classes(
    real: RealSet, tmp_path: Path, naming: str, silent: None
) -> None:
    pixels = smooth(8, seed=4)
    for c in range(4):
        for k in range(2):
            written(tmp_path / NAMINGS[naming](c, k), pixels[2 * c + k])
    (tmp_path / "README.md").write_text("words")
    (tmp_path / ".hidden").mkdir()
    written(tmp_path / ".hidden" / "0.png", pixels[0])
    one = dstill.import_set(tmp_path, real, method="rded")
    assert one.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and one.ipc == 2
    fitted = preprocess.fit("standardise", real.train.images)
    torch.testing.assert_close(one.images, fitted.forward(pixels.float() / 255))
    torch.testing.assert_close(one.pixels(), pixels.float() / 255)
    whitened = dstill.import_set(tmp_path, real, preprocess="zca")
    torch.testing.assert_close(whitened.pixels(), pixels.float() / 255, atol=1e-4, rtol=0)


def test_one_image_a_class_may_be_named_by_its_number_alone(real: RealSet, tmp_path: Path) -> None:
    pixels = smooth(4, seed=4)
    for c in range(4):
        written(tmp_path / f"{c:05d}.png", pixels[c])
    torch.testing.assert_close(dstill.import_set(tmp_path, real).pixels(), pixels.float() / 255)
    for c in range(4):  # as many again: the numbers count images
        written(tmp_path / f"{c + 4:05d}.png", pixels[c])
    with pytest.raises(DstillError, match=r"00000\.png does not say its class: '00000' is neither"):
        dstill.import_set(tmp_path, real)


def test_pictures_of_dstill_come_back_without_their_overview(real: RealSet, tmp_path: Path) -> None:
    one = DistilledSet.from_tensors(smooth(4, seed=3), [0, 1, 2, 3], real=real)
    written(one.export("pictures", tmp_path) / "overview.png", smooth(1, side=30)[0])
    torch.testing.assert_close(dstill.import_set(tmp_path, real).images, one.images)


def test_grey_data_read_grey_images(tmp_path: Path) -> None:
    digits = dstill.load_real("digits")
    for c in range(10):
        written(tmp_path / str(c) / "x.png", digits.train.images[digits.train.labels == c][0].expand(3, -1, -1))
    one = dstill.import_set(tmp_path, digits)
    assert one.images.shape == (10, 1, 8, 8) and one.labels.tolist() == list(range(10))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"eagle/0.png": 8}, r"eagle/0\.png does not say its class: 'eagle' is neither a class nor the number of one"),
        ({"00004/0.png": 8}, "'00004' is neither"),
        ({"ant/0.png": 9}, r"has 9x9 pixels, smooth has 8x8 as it is read here: pass --image-size 9"),
        ({"ant/0.png": 8}, "images of 1 of 4 classes and none of bee, cat, dog"),
        ({"ant/0.png": None}, r"ant/0\.png cannot be read \(not an image\)"),
        ({}, "holds no set: there is no images_best.pt"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(
    real: RealSet, tmp_path: Path, files: dict[str, int | None], message: str
) -> None:
    for name, side in files.items():
        written(tmp_path / name, smooth(1, side or 8)[0])
        if side is None:
            (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(DstillError, match=message):
        dstill.import_set(tmp_path, real)


def test_deep_images_are_refused_and_classes_called_by_numbers_are_not_counted(real: RealSet, tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    Image.fromarray(np.full((8, 8), 3000, dtype=np.uint16)).save(tmp_path / "ant" / "0.png")
    with pytest.raises(DstillError, match="more than 8 bits"):
        dstill.import_set(tmp_path, real)
    digits = dstill.load_real("digits", classes=["4", "9"])
    for name in ("04", "1"):
        written(tmp_path / "some" / name / "0.png", smooth(1, channels=1)[0])
    with pytest.raises(DstillError, match="'1' is neither a class"):
        dstill.import_set(tmp_path / "some", digits)


def test_several_sets_in_a_folder_are_named(real: RealSet, tmp_path: Path) -> None:
    for name in ("images_1.pt", "images_2.pt"):
        torch.save(torch.zeros(4, 3, 8, 8), tmp_path / name)
    with pytest.raises(DstillError, match=r"holds several sets: pass one of .*images_1\.pt, .*images_2\.pt"):
        dstill.import_set(tmp_path, real)


def test_the_folder_of_a_run_is_imported(real: RealSet, tmp_path: Path) -> None:
    one = DistilledSet.from_tensors(smooth(4, seed=3), [0, 1, 2, 3], real=real)
    one.save(tmp_path / "run" / "set-0")
    assert torch.equal(dstill.import_set(tmp_path / "run", real).images, one.images)
    one.save(tmp_path / "run" / "set-1")
    with pytest.raises(DstillError, match="with 2 sets"):
        dstill.import_set(tmp_path / "run", real)
