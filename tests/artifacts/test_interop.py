"""Exported sets are read back exactly; foreign files are read as tensors or refused with a sentence."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tests.short import SHORT
from torch.utils.data import DataLoader

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts.importing import PUBLISHED_STATISTICS, published_preprocess
from dstill.artifacts.result import Claim, ProtocolId
from dstill.config.settings import NetConfig
from dstill.data import preprocess, siamese
from dstill.data.real import RealSet
from dstill.nets.networks import build


def make(real: RealSet, *, soft: bool = False, alpha: float | None = 0.02, ipc: int = 2) -> DistilledSet:
    rows = torch.cat([rows[:ipc] for rows in real.train.by_class(real.classes)])
    fitted = preprocess.fit("standardise", real.train.images)
    labels = torch.randn(len(rows), real.classes, generator=torch.Generator().manual_seed(1))
    return DistilledSet(
        images=fitted.forward(real.train.images[rows].float() / 255) * 1.3,
        labels=labels if soft else real.train.labels[rows],
        alpha=alpha,
        preprocess=fitted,
        method="ast",
        ipc=ipc,
        class_names=real.class_names,
        augmentation="crop_flip",
        net=NetConfig(width=4, depth=2),
        data=real.name,
        data_fingerprint=real.fingerprint,
        recipe=None,
        seed=3,
        accuracy=Claim(mean=0.5, std=0.1, n=5, net="convnet", protocol=ProtocolId(name="ast", version=1), measured_on="test"),
    )


def assert_equal(one: DistilledSet, other: DistilledSet) -> None:
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert (one.alpha, one.class_names, one.ipc) == (other.alpha, other.class_names, other.ipc)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("alpha", [None, 0.0123456789])
@pytest.mark.parametrize("kind", ["hf", "png", "npz", "pt"])
def test_an_export_comes_back_exactly(tiny_real: RealSet, tmp_path: Path, kind: str, soft: bool, alpha: float | None) -> None:
    one = make(tiny_real, soft=soft, alpha=alpha)
    told = {"preprocess": one.preprocess} if kind == "pt" else {}  # the other kinds contain it
    back = dstill.import_set(one.export(kind, tmp_path / kind), tiny_real, **told)
    assert_equal(one, back)
    if kind != "pt":
        assert back.header() == one.header()


@pytest.mark.parametrize("kind", ["hf", "npz"])
def test_the_file_of_an_export_comes_back_as_its_folder_does_if_it_fits(tiny_real: RealSet, tmp_path: Path, kind: str) -> None:
    one = make(tiny_real)
    folder = one.export(kind, tmp_path / kind)
    file = folder / "distilled.safetensors" if kind == "hf" else folder
    assert_equal(one, dstill.import_set(file, tiny_real))
    with pytest.raises(DstillError, match="has the classes"):
        dstill.import_set(file, dstill.load_real(tiny_real, classes=["stripes", "checks"]))


def test_the_hub_folder_is_read_by_datasets_and_its_metadata_are_true(tiny_real: RealSet, tmp_path: Path) -> None:
    one = make(tiny_real, soft=True)
    folder = one.export("hf", tmp_path / "hub")
    rows = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"), split="train")
    assert rows.features["label"].names == list(tiny_real.class_names)
    assert rows["label"] == one.class_ids.tolist()
    pixels = np.stack([np.asarray(image) for image in rows["image"]])
    expected = (one.pixels() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels, expected)
    assert np.allclose(rows["soft_label"], one.labels.softmax(1), atol=1e-6)
    croissant = json.loads((folder / "croissant.json").read_text())
    (shard,) = croissant["distribution"]
    assert shard["sha256"] == hashlib.sha256((folder / shard["contentUrl"]).read_bytes()).hexdigest()
    card = (folder / "README.md").read_text()
    assert "50.0 ± 10.0 %" in card and "0.02, learned" in card and card.startswith("---\n")


def test_pictures_lie_in_a_folder_a_class_whatever_its_name(tiny_real: RealSet, tmp_path: Path) -> None:
    one = replace(make(tiny_real), class_names=("../../etc", "a/b <script>", ""))
    folder = one.export("png", tmp_path / "out")
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert found == [f"{c}/{k:03d}.png" for c in ("000-______etc", "001-a_b__script_", "002-class") for k in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    with Image.open(folder / found[0]) as image:
        assert image.size == (8, 8)


def test_a_result_of_dc_is_read_with_numpy_numbers_beside_the_images(tiny_real: RealSet, tmp_path: Path) -> None:
    images, labels = torch.randn(3, 3, 8, 8), torch.arange(3)
    earlier = [torch.zeros(3, 3, 8, 8), labels]
    torch.save(
        {"data": [earlier, [images, labels]], "accs_all_exps": {"ConvNet": [np.float64(0.5), 0.25]}}, tmp_path / "res_DC.pt"
    )
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    one = dstill.import_set(tmp_path / "res_DC.pt", tiny_real, preprocess=fitted, method="dc")
    assert torch.equal(one.images, images) and torch.equal(one.labels, labels)
    assert (one.method, one.ipc, one.alpha) == ("dc", 1, None)
    assert dstill.evaluate(one, tiny_real, protocol="quick", networks=1, random=False).accuracy.n == 1


def test_probabilities_become_logits_that_give_them_back(tiny_real: RealSet, tmp_path: Path) -> None:
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0], [0.1, 0.1, 0.8]])
    for name, tensor in (("images", torch.randn(3, 3, 8, 8)), ("labels", probabilities)):
        torch.save(tensor, tmp_path / f"{name}_best.pt")
    one = dstill.import_set(tmp_path, tiny_real, preprocess=preprocess.fit("standardise", tiny_real.train.images))
    assert torch.allclose(one.labels.softmax(1), probabilities, atol=1e-6)


class _Runs:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


def test_code_is_refused_and_not_run(tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Runs()))
    torch.save({"data": [_Runs()]}, tmp_path / "zipped.pt")
    for name in ("plain.pt", "zipped.pt"):
        with pytest.raises(DstillError, match="refused"):
            dstill.import_set(name, tiny_real, preprocess=fitted)
        with pytest.raises(DstillError, match="refused"):
            dstill.import_experts([name], tmp_path / "experts")
    assert not (tmp_path / "executed").exists()


def _file(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "does not exist"),
        ({"images": torch.zeros(3, 3, 8, 8)}, "no labels beside"),
        ({"images": torch.zeros(3, 3, 9, 9), "labels": torch.arange(3)}, "is it another set"),
        ({"images": torch.zeros(3, 3, 8, 8), "labels": torch.arange(4)}, "3 images have labels"),
        ({"images": torch.zeros(3, 3, 8, 8), "labels": torch.tensor([0, 1, 7])}, "class ids from 0 to 7"),
        ({"images": torch.zeros(3, 3, 8, 8), "labels": torch.zeros(3, 5)}, "for 3 classes"),
        ({"images": "words"}, "holds str"),
        ({"images": {"data": 3}}, "no `data` of images"),
    ],
)
def test_what_does_not_fit_is_said(tiny_real: RealSet, tmp_path: Path, files: dict[str, Any], message: str) -> None:
    for name, content in files.items():
        _file(tmp_path / f"{name}_best.pt", content)
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    with pytest.raises(DstillError, match=message):
        dstill.import_set(tmp_path / "images_best.pt", tiny_real, preprocess=fitted)


def test_a_buffer_of_experts_is_matched(tiny_real: RealSet, tmp_path: Path) -> None:
    net = build(NetConfig(width=4, depth=1), 3, 3, (8, 8), torch.Generator().manual_seed(0))
    record = [parameter.detach() for parameter in net.parameters()]
    trajectory = [[tensor + 0.01 * epoch for tensor in record] for epoch in range(4)]
    path = _file(tmp_path / "replay_buffer_0.pt", [trajectory, trajectory])
    folder = dstill.import_experts([path], tmp_path / "experts")
    experts = dstill.Trajectories(folder)
    assert (len(experts), experts.epochs, experts.numel) == (2, 3, sum(tensor.numel() for tensor in record))
    expected = torch.cat([tensor.reshape(-1) for tensor in trajectory[2]])
    assert torch.equal(experts.rows(1, 2, 3)[0], expected)
    assert "accuracy" not in experts.summary(), "a buffer does not tell any"
    with pytest.raises(DstillError, match="holds experts already"):
        dstill.import_experts([path], folder)
    changes = ["net.width=4", "net.depth=1", "distill.iterations=1", "distill.student_steps=2"]
    one = dstill.distill(tiny_real, experts=folder, recipe="smoke", method="mtt", changes=changes)
    assert torch.isfinite(one.images).all()


def test_the_published_statistics_have_a_number_a_channel() -> None:
    real = dstill.load_real("digits")
    for unknown in (real, replace(real, name="mnist", known="")):
        with pytest.raises(DstillError, match="no published statistics"):
            published_preprocess("published", unknown)
    fitted = published_preprocess("published", replace(real, known="mnist"))
    assert fitted.forward(torch.full((1, 1, 8, 8), 0.1307)).abs().max() < 1e-6
    for mean, std in PUBLISHED_STATISTICS.values():
        assert len(mean) == len(std) in (1, 3)


def test_a_loader_sees_every_image_and_batches_are_augmented_together(tiny_real: RealSet) -> None:
    one = make(tiny_real)
    plain = list(DataLoader(one.as_dataset(augment=False), batch_size=4))
    assert torch.equal(torch.cat([images for images, _ in plain]), one.images)
    assert torch.equal(torch.cat([labels for _, labels in plain]), one.labels)
    ((images, _),) = DataLoader(one.as_dataset(seed=5), batch_size=6)
    drawn = siamese.sample(one.augmentation, 6, torch.Generator().manual_seed(5))
    assert torch.equal(images, siamese.apply(one.images, drawn))
    assert one.train_kwargs() == {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}


def test_a_run_starts_from_any_set(tiny_real: RealSet, tmp_path: Path) -> None:
    start = dstill.distill(tiny_real, recipe="smoke", method="random", ipc=2, seed=9)
    settings: dict[str, Any] = {"recipe": "smoke", "method": "dm", "ipc": 2, "changes": ["net.width=4"]}
    from_set = dstill.distill(tiny_real, init=start.save(tmp_path / "start"), out=tmp_path / "a", **settings)
    initial = DistilledSet.load(tmp_path / "a" / "initial.safetensors")
    pixels = [one.preprocess.invert(one.images) for one in (initial, start)]
    assert torch.allclose(*pixels, atol=1e-4), "the other set, in this method's preprocessing"
    assert not torch.equal(from_set.images, initial.images)
    once = dstill.Evaluation(networks=1, random=False)
    dstill.run(tiny_real, init=tmp_path / "start", out=tmp_path / "run", sets=2, evaluation=once, **settings)
    sets = [DistilledSet.load(tmp_path / "run" / f"set-{k}") for k in (0, 1)]
    assert torch.equal(sets[0].images, from_set.images), "run and distill do the same"
    begun = [DistilledSet.load(tmp_path / "run" / f"set-{k}" / "initial.safetensors") for k in (0, 1)]
    assert torch.equal(begun[0].images, begun[1].images) and not torch.equal(sets[0].images, sets[1].images)
    with pytest.raises(DstillError, match="initial set has"):
        dstill.distill(tiny_real, init=start, **{**settings, "ipc": 1})


def test_a_set_is_judged_without_its_labels_and_without_its_augmentation(tiny_real: RealSet, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "protocol": SHORT,
        "networks": 1,
        "machine": dstill.Machine(cache=tmp_path / "cache"),
        "whole": False,
    }
    judgement = dstill.judge(make(tiny_real, soft=True), tiny_real, out=tmp_path, **options)
    asked = [(row.labels, row.augmentation) for row in judgement.rows]
    assert asked == [("soft", "crop_flip"), ("soft", "none"), ("hard", "crop_flip"), ("hard", "none")]
    assert all(row.result.random is not None and row.result.labels == row.labels for row in judgement.rows)
    by_augmentation = {(row.augmentation, str(row.result.random)) for row in judgement.rows}
    assert len(by_augmentation) == 2
    assert len(list((tmp_path / "cache" / "random").iterdir())) == 2, "measured once for each augmentation"
    own = dstill.evaluate(make(tiny_real, soft=True), tiny_real, random=False, protocol=SHORT, networks=1)
    assert judgement.rows[0].result.accuracy == own.accuracy
    assert (tmp_path / "judgement.md").read_text().count("\n|") == 1 + 4


def test_pictures_do_not_join_those_of_a_larger_set(tiny_real: RealSet, tmp_path: Path) -> None:
    larger, smaller = make(tiny_real, ipc=3), make(tiny_real, ipc=1)
    for _ in range(2):  # writing the same again is allowed
        dstill.export(larger, "png", tmp_path)
    with pytest.raises(DstillError, match=r"holds other images .*001\.png"):
        dstill.export(smaller, "png", tmp_path)
    assert len(list(tmp_path.glob("*/*.png"))) == 9
