"""A distilled set is read back as it was written, and no other file is accepted as one."""

from __future__ import annotations

import pickle
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dstill import DistilledSet, DstillError
from dstill.artifacts import files
from dstill.artifacts.pictures import grid
from dstill.artifacts.result import Claim, ProtocolId, Score
from dstill.config.settings import NetConfig
from dstill.data import preprocess
from dstill.data.real import RealSet


def make(real: RealSet, *, soft: bool = False, alpha: float | None = 0.02, kind: str = "zca", ipc: int = 1) -> DistilledSet:
    rows = torch.cat([(real.train.labels == c).nonzero().squeeze(1)[:ipc] for c in range(real.classes)])
    fitted = preprocess.fit(kind, real.train.images)
    labels = real.train.labels[rows]
    return DistilledSet(
        images=fitted.forward(real.train.images[rows].float() / 255),
        labels=torch.randn(len(rows), real.classes) if soft else labels,
        alpha=alpha,
        preprocess=fitted,
        method="ast",
        ipc=ipc,
        class_names=real.class_names,
        augmentation="crop",
        net=NetConfig(width=4, depth=2),
        data=real.name,
        data_fingerprint=real.fingerprint,
        recipe=None,
        seed=3,
        accuracy=Claim(mean=0.5, std=0.1, n=5, net="convnet", protocol=ProtocolId(name="ast", version=1), measured_on="test"),
    )


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.0123456789])
@pytest.mark.parametrize("kind", ["zca", "standardise"])
def test_a_set_comes_back_exactly(tiny_real: RealSet, tmp_path: Path, soft: bool, alpha: float | None, kind: str) -> None:
    one = make(tiny_real, soft=soft, alpha=alpha, kind=kind)
    back = DistilledSet.load(one.save(tmp_path))
    for name in ("images", "labels"):
        assert torch.equal(getattr(back, name), getattr(one, name))
    pixels = tiny_real.test.images.float() / 255
    assert torch.equal(back.preprocess.forward(pixels), one.preprocess.forward(pixels))
    plain = ("alpha", "method", "ipc", "class_names", "augmentation", "net", "data", "data_fingerprint", "seed", "accuracy")
    assert all(getattr(back, name) == getattr(one, name) for name in plain)


def test_a_set_and_its_data_say_in_a_line_what_they_are(tiny_real: RealSet) -> None:
    shape = "x".join(map(str, (tiny_real.channels, *tiny_real.size)))
    said = repr(make(tiny_real))
    assert (
        said == f"DistilledSet('ast' of {tiny_real.name!r}, {tiny_real.classes} images of {shape}, {tiny_real.classes} classes)"
    )
    assert f"images of {shape}, {tiny_real.classes} classes" in repr(tiny_real)


def test_pixels_are_the_images_before_preprocessing_clipped_to_what_can_be_shown(tiny_real: RealSet) -> None:
    one = make(tiny_real, kind="standardise")
    mean, std = (one.preprocess.tensors()[name].view(3, 1, 1) for name in ("mean", "std"))
    wide = replace(one, images=3 * one.images)
    expected = wide.images * std + mean
    assert expected.min() < 0 and expected.max() > 1
    torch.testing.assert_close(wide.pixels(), expected.clip(0, 1))


def test_the_class_of_a_soft_label_is_its_most_likely_one(tiny_real: RealSet) -> None:
    labels = torch.tensor([[0.1, 2.0, 0.3], [-1.0, -2.0, -3.0], [0.0, 0.0, 0.1]])
    one = replace(make(tiny_real), labels=labels)
    assert one.class_ids.tolist() == one.with_hard_labels().labels.tolist() == [1, 0, 2]
    assert make(tiny_real).class_ids.tolist() == [0, 1, 2]


def test_a_set_that_is_trained_otherwise_does_not_claim_the_accuracy_of_its_run(tiny_real: RealSet) -> None:
    one = make(tiny_real, soft=True)
    assert one.accuracy is not None
    for other in (one.with_hard_labels(), one.with_augmentation("flip"), one.with_net(NetConfig(name="alexnet"))):
        assert other.accuracy is None
        assert torch.equal(other.images, one.images)


@pytest.mark.parametrize("broken", ["images", "alpha"])
def test_a_set_that_is_not_finite_is_not_saved(tiny_real: RealSet, tmp_path: Path, broken: str) -> None:
    one = make(tiny_real)
    value = torch.full_like(one.images, float("inf")) if broken == "images" else float("nan")
    with pytest.raises(DstillError, match=f"non-finite {broken}"):
        replace(one, **{broken: value}).save(tmp_path)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_bit_is_noticed(tiny_real: RealSet, tmp_path: Path) -> None:
    path = make(tiny_real).save(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DstillError, match="damaged"):
        DistilledSet.load(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(tiny_real: RealSet, tmp_path: Path, share: float) -> None:
    path = make(tiny_real).save(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DstillError, match=r"distilled\.safetensors is damaged"):
        DistilledSet.load(path)


def test_a_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"

    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (trap,))  # type: ignore[return-value]

    path = tmp_path / "distilled.safetensors"
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(DstillError, match="not a safetensors file"):
        DistilledSet.load(path)
    assert not trap.exists()


def test_the_folder_of_a_run_stands_for_its_only_set_and_several_are_named(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real, kind="standardise")
    one.save(tmp_path / "set-0")
    assert torch.equal(DistilledSet.load(tmp_path).images, one.images)
    for k in (10, 2):
        one.save(tmp_path / f"set-{k}")
    with pytest.raises(DstillError, match=r"with 3 sets: pass one of .*set-0, .*set-2, .*set-10$"):
        DistilledSet.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DstillError, match=r"distilled\.safetensors does not exist"):
        DistilledSet.load(tmp_path / "empty")


def test_foreign_wrong_and_newer_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(2)}, foreign)
    with pytest.raises(DstillError, match="another program"):
        DistilledSet.load(foreign)
    files.save(tmp_path / "wrong.safetensors", "expert trajectory", {"x": torch.zeros(2)}, {})
    with pytest.raises(DstillError, match="holds an expert trajectory, not a distilled set"):
        DistilledSet.load(tmp_path / "wrong.safetensors")
    files.save(tmp_path / "newer.safetensors", "distilled set", {"x": torch.zeros(2)}, {"format": 99})
    with pytest.raises(DstillError, match="upgrade dstill"):
        DistilledSet.load(tmp_path / "newer.safetensors")
    with pytest.raises(DstillError, match="does not exist"):
        DistilledSet.load(tmp_path / "missing.safetensors")


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["zca", "standardise"])
def test_the_picture_shows_the_original_pixels(tiny_real: RealSet, kind: str) -> None:
    one = make(tiny_real, kind=kind, ipc=3)
    picture = np.asarray(grid(one))
    assert picture.shape == (3 * 66 + 2, 3 * 66 + 2, 3)
    first = (tiny_real.train.labels == 0).nonzero().squeeze(1)[0]
    tile = picture[2:66:8, 2:66:8].transpose(2, 0, 1)
    assert np.abs(tile.astype(int) - tiny_real.train.images[first].numpy().astype(int)).max() <= 1


def test_a_score_pools_sets_and_networks_with_the_sample_deviation() -> None:
    by_set = [[0.1, 0.3, 0.2], [0.5, 0.4, 0.6]]
    score = Score.of(by_set)
    assert score.mean == pytest.approx(np.mean(by_set))
    assert score.std == pytest.approx(np.std(by_set, ddof=1))
    assert score.n == 6
    assert score.between_sets == pytest.approx(statistics.stdev([0.2, 0.5]))
    assert Score.of([[0.7]]).std == 0
