"""A set is as small as its images: its whitening lies elsewhere, is found again, and is packed for another machine."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts import files, set_file, whitening
from dstill.artifacts.result import Result
from dstill.cli.show import describe, write_picture
from dstill.config.settings import NetConfig
from dstill.data import preprocess
from dstill.data.preprocess import ZCA
from dstill.data.real import RealSet
from dstill.errors import DstillWarning

QUICK: dict[str, Any] = {"protocol": "quick", "networks": 1, "random": False, "progress": False}
ZCA_RUN = {"preprocess": "zca", "distill.iterations": 2}
MISSING = r"whitening of tiny .* \(--source DATA.*dstill export SET dstill"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def alike(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Pixels that differ by no more than the rounding of a whitening whose numbers lie otherwise in memory."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def make(real: RealSet, fitted: preprocess.Preprocess, **changes: Any) -> DistilledSet:
    rows = torch.cat([rows[:2] for rows in real.train.by_class(real.classes)])
    return DistilledSet(
        images=fitted.forward(real.train.images[rows].float() / 255),
        labels=real.train.labels[rows],
        alpha=0.02,
        preprocess=fitted,
        method="dm",
        ipc=2,
        class_names=real.class_names,
        augmentation="none",
        net=NetConfig(width=4, depth=2),
        data=real.name,
        data_fingerprint=real.fingerprint,
        recipe=None,
        seed=3,
        **changes,
    )


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def tensor_bytes(path: Path) -> int:
    """Bytes of the tensors of a file, without its header."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


@pytest.fixture
def distilled(tiny_real: RealSet, cache: Path) -> DistilledSet:
    """A whitened set whose whitening lies in the cache."""
    return make(tiny_real, whitening.fitted("zca", tiny_real, cache))


def test_a_file_has_the_bytes_of_its_images_and_labels_and_finds_its_whitening_in_the_cache(
    distilled: DistilledSet, tmp_path: Path
) -> None:
    path = distilled.save(tmp_path / "a")
    assert files_in(tmp_path / "a") == ["distilled.safetensors"]
    assert tensor_bytes(path) == 4 * distilled.images.numel() + 8 * len(distilled.labels) + 8  # and α
    assert path.stat().st_size == distilled.file_bytes
    back = DistilledSet.load(path)
    assert torch.equal(back.images, distilled.images) and torch.equal(back.pixels(), distilled.pixels())
    assert back.header() == distilled.header() and back.file_bytes == distilled.file_bytes


def test_a_whitening_that_lies_nowhere_is_written_once_for_all_sets_of_a_run(tiny_real: RealSet, tmp_path: Path) -> None:
    own = preprocess.fit("zca", tiny_real.train.images)
    for k in range(2):
        make(tiny_real, own).save(tmp_path / "run" / f"set-{k}")
    make(tiny_real, own).save(tmp_path / "alone" / "one.safetensors")
    (written,) = (tmp_path / "run").glob("*.safetensors")
    assert files_in(tmp_path / "run") == ["set-0/distilled.safetensors", "set-1/distilled.safetensors", written.name]
    assert files_in(tmp_path / "alone") == ["one.safetensors", written.name]
    for path in (tmp_path / "run" / "set-1", tmp_path / "alone" / "one.safetensors"):
        alike(DistilledSet.load(path).pixels(), make(tiny_real, own).pixels())


def test_a_set_without_its_whitening_says_what_to_do_and_does_all_that_does_not_need_it(
    distilled: DistilledSet, tiny_real: RealSet, cache: Path, tmp_path: Path
) -> None:
    distilled.save(tmp_path / "set")
    shutil.rmtree(cache)
    with pytest.warns(DstillWarning, match=MISSING):
        lone = DistilledSet.load(tmp_path / "set")
    assert torch.equal(lone.images, distilled.images) and lone.header() == distilled.header()
    assert len(list(lone.as_dataset())) == 6 and lone.train_kwargs()["lr"] == 0.02 and "6 images" in repr(lone)
    again = lone.save(tmp_path / "again")
    assert again.read_bytes() == (tmp_path / "set" / "distilled.safetensors").read_bytes()
    assert "whitening of tiny" in describe(tmp_path / "set")
    assert "whitening of tiny" in lone._repr_html_() and "6 images" in lone._repr_html_()
    needing: list[Any] = [
        lone.pixels,
        lone.tensors,
        lambda: lone.save(tmp_path / "whole", whole=True),
        lambda: lone.export("npz", tmp_path / "npz"),
        lambda: lone.preprocess.forward(lone.images),
        lambda: write_picture(tmp_path / "set", tmp_path / "x.png"),
    ]
    for call in needing:
        with pytest.raises(DstillError, match=MISSING):
            call()
    assert not (tmp_path / "whole").exists()


def test_the_data_give_a_missing_whitening_back_and_the_cache_keeps_it(
    distilled: DistilledSet, tiny_real: RealSet, cache: Path, tmp_path: Path
) -> None:
    distilled.save(tmp_path / "set")
    expected = dstill.evaluate(distilled, tiny_real, **QUICK).accuracy
    shutil.rmtree(cache)
    assert dstill.evaluate(tmp_path / "set", tiny_real, **QUICK).accuracy == expected
    torch.testing.assert_close(DistilledSet.load(tmp_path / "set").pixels(), distilled.pixels(), atol=1e-5, rtol=0)
    shutil.rmtree(cache)
    judged = dstill.judge(tmp_path / "set", tiny_real, protocol="quick", networks=1, whole=False, augmentations=["none"])
    assert judged.rows[0].result.accuracy == expected
    shutil.rmtree(cache)
    torch.testing.assert_close(DistilledSet.load(tmp_path / "set", real=tiny_real).pixels(), distilled.pixels())
    shutil.rmtree(cache)
    write_picture(tmp_path / "set", tmp_path / "x.png", real=tiny_real)
    shutil.rmtree(cache)
    start = {"recipe": "smoke", "method": "dm", "ipc": 2, "changes": ["net.width=4", "distill.iterations=1"]}
    dstill.distill(tiny_real, init=tmp_path / "set", **start)  # type: ignore[arg-type]


def test_the_folder_of_a_run_stands_for_its_set_in_every_function(
    distilled: DistilledSet, tiny_real: RealSet, tmp_path: Path
) -> None:
    distilled.save(tmp_path / "run" / "set-0")
    expected = dstill.evaluate(distilled, tiny_real, **QUICK).accuracy
    assert dstill.evaluate(tmp_path / "run", tiny_real, **QUICK).accuracy == expected
    judged = dstill.judge(tmp_path / "run", tiny_real, protocol="quick", networks=1, whole=False, augmentations=["none"])
    assert judged.rows[0].result.accuracy == expected
    assert "2 image(s) of each of 3 classes" in describe(tmp_path / "run")
    write_picture(tmp_path / "run", tmp_path / "x.png")
    start: dict[str, Any] = {"recipe": "smoke", "method": "dm", "ipc": 2, "changes": ["net.width=4", "distill.iterations=1"]}
    dstill.distill(tiny_real, init=tmp_path / "run", **start)
    distilled.save(tmp_path / "run" / "set-1")
    for call in (
        lambda: dstill.evaluate(tmp_path / "run", tiny_real, **QUICK),
        lambda: dstill.judge(tmp_path / "run", tiny_real),
        lambda: dstill.distill(tiny_real, init=tmp_path / "run", **start),
        lambda: write_picture(tmp_path / "run", tmp_path / "x.png"),
    ):
        with pytest.raises(DstillError, match="with 2 sets: pass one of"):
            call()


def test_a_set_says_its_size_and_that_of_its_file(distilled: DistilledSet, tmp_path: Path) -> None:
    path = distilled.save(tmp_path / "set")
    said = f"{(6 * 192 + 6) / 1024:.1f} KiB of 8-bit pixels and labels, {path.stat().st_size / 1024:.1f} KiB as a file"
    assert said in describe(path) and path.stat().st_size < 8 * 1024
    packed = distilled.save(tmp_path / "packed", whole=True)
    assert f"{packed.stat().st_size / 1024:.1f} KiB as a file" in describe(packed)
    assert packed.stat().st_size > 4 * 192 * 192


def test_other_data_do_not_give_a_missing_whitening(
    distilled: DistilledSet, tiny_real: RealSet, cache: Path, tmp_path: Path
) -> None:
    distilled.save(tmp_path / "set")
    shutil.rmtree(cache)
    half = dstill.load_real(tiny_real, train_fraction=0.5)
    for call in (
        lambda: dstill.evaluate(tmp_path / "set", half, **QUICK),
        lambda: DistilledSet.load(tmp_path / "set", real=half),
    ):
        with pytest.raises(DstillError, match=f"fingerprint {half.fingerprint}.* is not what the set was distilled from"):
            call()


def test_a_whole_file_needs_nothing_else_and_older_versions_read_it(
    distilled: DistilledSet, tiny_real: RealSet, cache: Path, tmp_path: Path
) -> None:
    path = distilled.export("dstill", tmp_path / "packed") / "distilled.safetensors"
    assert files_in(tmp_path / "packed") == ["distilled.safetensors"]
    light = distilled.save(tmp_path / "light")
    shutil.rmtree(cache)
    back = DistilledSet.load(tmp_path / "packed")
    assert torch.equal(back.pixels(), distilled.pixels())
    assert files.load(path, None)[0]["format"] == 1 and files.load(light, None)[0]["format"] == 3
    back.save(tmp_path / "unpacked")  # the whitening keeps the name of its data
    name = f"zca-{tiny_real.fingerprint}.safetensors"
    assert files_in(tmp_path / "unpacked") == ["distilled.safetensors", name]


def test_files_of_formats_1_and_2_still_load(tiny_real: RealSet, tmp_path: Path) -> None:
    own = preprocess.fit("zca", tiny_real.train.images)
    for since, changes in ((1, {}), (2, {"parts": 2})):
        one = make(tiny_real, own, **changes)
        files.save(tmp_path / f"{since}.safetensors", set_file.KIND, one.tensors(), one.header(), since=since)
        back = DistilledSet.load(tmp_path / f"{since}.safetensors")
        alike(back.pixels(), one.pixels())
        assert back.parts == one.parts
        with safe_open(tmp_path / f"{since}.safetensors", framework="pt") as file:
            assert "preprocess.basis" in set(file.keys())


def test_another_whitening_under_the_same_name_does_not_take_the_place_of_ours(
    distilled: DistilledSet, tiny_real: RealSet, tmp_path: Path
) -> None:
    assert isinstance(distilled.preprocess, ZCA)
    other = preprocess.fit("zca", 255 - tiny_real.train.images)
    assert isinstance(other, ZCA)
    mine = make(tiny_real, other.known_as(tiny_real.fingerprint))
    for _ in range(2):
        mine.save(tmp_path / "set")
        alike(DistilledSet.load(tmp_path / "set").pixels(), mine.pixels())
    assert len(files_in(tmp_path / "set")) == 2


def test_a_damaged_whitening_counts_as_missing(
    distilled: DistilledSet, tiny_real: RealSet, cache: Path, tmp_path: Path
) -> None:
    expected = distilled.pixels()
    distilled.save(tmp_path / "set")
    (file,) = (cache / "preprocess").iterdir()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.warns(DstillWarning, match=MISSING):
        DistilledSet.load(tmp_path / "set")
    torch.testing.assert_close(DistilledSet.load(tmp_path / "set", real=tiny_real).pixels(), expected)
    assert (cache / "preprocess" / f"{file.name}.damaged").exists()


def test_a_whitening_of_other_data_under_a_wrong_name_is_not_taken(
    distilled: DistilledSet, cache: Path, tmp_path: Path
) -> None:
    distilled.save(tmp_path / "set")
    (file,) = (cache / "preprocess").iterdir()
    files.save(file, whitening.KIND, distilled.preprocess.tensors(), {"data": "other"})
    with pytest.warns(DstillWarning, match=MISSING):
        DistilledSet.load(tmp_path / "set")


def test_a_run_with_a_cache_of_its_own_leaves_a_folder_that_is_complete(tiny_real: RealSet, tmp_path: Path) -> None:
    once = {"evaluation": dstill.Evaluation(networks=1, random=False), "machine": dstill.Machine(cache=tmp_path / "mine")}
    result = dstill.run(tiny_real, method="dm", recipe="smoke", changes=ZCA_RUN, sets=2, out=tmp_path / "run", **once)  # type: ignore[arg-type]
    assert [path.name for path in (tmp_path / "run").glob("*.safetensors")] == [f"zca-{tiny_real.fingerprint}.safetensors"]
    for k in range(2):
        assert DistilledSet.load(tmp_path / "run" / f"set-{k}").pixels().shape == (3, 3, 8, 8)
    assert not (tmp_path / "cache").exists()
    assert result.file_bytes == (tmp_path / "run" / "set-0" / "distilled.safetensors").stat().st_size
    assert Result.load(tmp_path / "run" / "result.json").file_bytes == result.file_bytes
    moved = shutil.move(tmp_path / "run" / "set-1", tmp_path / "moved")
    page = dstill.report([moved], tmp_path / "report.html").read_text()
    assert "The images cannot be shown: the whitening of tiny" in page


def test_a_set_alone_is_finished_again_from_what_its_run_knows(tiny_real: RealSet, cache: Path, tmp_path: Path) -> None:
    again: dict[str, Any] = {"method": "dm", "recipe": "smoke", "changes": ZCA_RUN, "out": tmp_path / "set"}
    first = dstill.distill(tiny_real, **again)
    shutil.rmtree(cache)
    assert torch.equal(dstill.distill(tiny_real, **again).pixels(), first.pixels())


def test_a_set_of_standardised_images_is_complete_in_itself(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real, preprocess.fit("standardise", tiny_real.train.images))
    path = one.save(tmp_path / "set")
    assert files_in(tmp_path / "set") == ["distilled.safetensors"] and files.load(path, None)[0]["format"] == 1
    assert replace(one, alpha=None).file_bytes < one.file_bytes == path.stat().st_size
