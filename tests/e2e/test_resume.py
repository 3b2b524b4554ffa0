"""A run that is interrupted and repeated ends where the uninterrupted one ends, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dstill

SMOKE = ["distill.iterations=8", "experts.count=1", "net.width=4", "distill.batch_syn=2", "distill.image_ema=0.9"]
COMMAND = """
import torch, dstill
torch.set_num_threads(1)
options = dict(recipe="smoke", method="ast", ipc=1, changes={changes!r}, checkpoint_every=1)
dstill.distill("digits", out={out!r}, cache={cache!r}, **options)
"""


class Interrupt:
    """A reporter that presses Ctrl-C after some iterations."""

    def __init__(self, after: int) -> None:
        self.after = after

    def note(self, text: str) -> None:
        pass

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "distilling" and done == self.after:
            raise KeyboardInterrupt


def distil(out: Path, cache: Path, **options: Any) -> dstill.DistilledSet:
    return dstill.distill("digits", recipe="smoke", method="ast", ipc=1, changes=SMOKE, out=out, cache=cache, **options)


def timeless(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    a, b = dstill.DistilledSet.load(one), dstill.DistilledSet.load(other)
    assert torch.equal(a.images, b.images)
    assert a.alpha == b.alpha
    assert timeless(one) == timeless(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An uninterrupted run and its cache."""
    folder, cache = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache")
    distil(folder, cache)
    return folder, cache


@pytest.mark.parametrize("every", [1, 3, 100])
def test_a_run_continued_after_ctrl_c_equals_the_uninterrupted_one(
    whole: tuple[Path, Path], tmp_path: Path, every: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path, whole[1], checkpoint_every=every, reporter=Interrupt(5))
    assert not (tmp_path / "distilled.safetensors").exists()
    distil(tmp_path, whole[1])
    assert_same(tmp_path, whole[0])


def test_a_killed_process_loses_nothing_that_was_checkpointed(whole: tuple[Path, Path], tmp_path: Path) -> None:
    code = COMMAND.format(changes=[*SMOKE, "distill.student_steps=60"], out=str(tmp_path), cache=str(whole[1]))
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size > 0):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "distilled.safetensors").exists()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    reference = tmp_path.with_name("reference")
    again = COMMAND.format(changes=[*SMOKE, "distill.student_steps=60"], out=str(reference), cache=str(whole[1]))
    subprocess.run([sys.executable, "-c", again], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert_same(tmp_path, reference)


def test_a_finished_run_is_not_run_again(whole: tuple[Path, Path], tmp_path: Path) -> None:
    distil(tmp_path, whole[1])
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    distil(tmp_path, whole[1], reporter=Interrupt(1))
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_folder_of_other_settings_is_refused_naming_them(whole: tuple[Path, Path]) -> None:
    with pytest.raises(dstill.DstillError, match="seed: 0 there, 1 now"):
        distil(whole[0], whole[1], seed=1, expert_seed=0)


def test_the_same_seed_gives_the_same_set_and_another_seed_another(whole: tuple[Path, Path], tmp_path: Path) -> None:
    distil(tmp_path / "again", whole[1])
    distil(tmp_path / "other", whole[1], seed=1, expert_seed=0)
    first = dstill.DistilledSet.load(whole[0]).images
    assert torch.equal(first, dstill.DistilledSet.load(tmp_path / "again").images)
    assert not torch.equal(first, dstill.DistilledSet.load(tmp_path / "other").images)
