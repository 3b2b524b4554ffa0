"""TensorBoard, Weights & Biases and pictures record a run and change none of its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dstill
from dstill import DistilledSet, DstillError
from dstill.data.real import RealSet

SETTINGS: dict[str, Any] = {"recipe": "smoke", "method": "dm", "changes": ["net.width=4"]}


def timeless(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_what_is_logged_is_what_happened_and_nothing_else_changes(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    dstill.distill(tiny_real, out=tmp_path / "plain", **SETTINGS)
    logged = dstill.Recording(logs=["tensorboard", "wandb"], picture_every=2, validate_every=3)
    dstill.distill(tiny_real, out=tmp_path / "logged", recording=logged, **SETTINGS)
    one, other = (DistilledSet.load(tmp_path / name) for name in ("plain", "logged"))
    assert one.images.equal(other.images)
    rows = timeless(tmp_path / "logged")
    assert [{k: v for k, v in row.items() if k != "validation_accuracy"} for row in rows] == timeless(tmp_path / "plain")

    events = EventAccumulator(str(tmp_path / "logged" / "tensorboard"), {"scalars": 0, "images": 0})
    events.Reload()
    points = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert points == [(int(row["iteration"]) + 1, row["loss"]) for row in rows]
    assert [event.step for event in events.Images("images")] == [2, 4, 5]
    assert list((tmp_path / "logged" / "wandb").glob("offline-run-*/*.wandb"))

    frames = sorted(path.name for path in (tmp_path / "logged" / "frames").iterdir())
    assert frames == ["0000002.png", "0000004.png", "0000005.png"]
    with Image.open(tmp_path / "logged" / "distilled.webp") as animation:
        assert animation.n_frames == 3
        animation.seek(2)
        with Image.open(tmp_path / "logged" / "distilled.png") as last:
            assert np.array_equal(np.asarray(animation.convert("RGB")), np.asarray(last.convert("RGB")))
    assert not (tmp_path / "plain" / "distilled.webp").exists()


def test_a_log_that_is_unknown_or_not_installed_is_answered_before_anything_runs(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DstillError, match="did you mean wandb"):
        dstill.distill(tiny_real, out=tmp_path / "a", recording=dstill.Recording(logs=["wandbb"]), **SETTINGS)
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(DstillError, match=r"pip install 'dstill\[wandb\]'"):
        dstill.distill(tiny_real, out=tmp_path / "b", recording=dstill.Recording(logs=["wandb"]), **SETTINGS)
    assert not (tmp_path / "b" / "metrics.jsonl").exists()
