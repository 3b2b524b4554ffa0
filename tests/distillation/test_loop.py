"""The outer loop ends a run whose images run away, and leaves others alone."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dstill.artifacts.run_folder import RunFolder
from dstill.data.real import RealSet
from dstill.distillation import loop
from dstill.distillation.loop import Cadence, run_method
from dstill.errors import CollapseError
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Choice, Machine
from dstill.methods.base import Problem


def problem(real: RealSet, cache: Path, lr_images: float, iterations: int) -> Problem:
    changes = {"distill": {"lr_images": lr_images, "iterations": iterations}}
    place = Workplace.of(Machine(device="cpu", cache=cache), False)
    return Job.resolve(real, Choice("dm", 1, "smoke", changes=changes), 0, place).problem(0, None)


@pytest.mark.parametrize(("iterations", "every", "named"), [(2, 100, 2), (7, 3, 3)])
def test_images_that_run_away_end_the_run_with_advice(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iterations: int, every: int, named: int
) -> None:
    monkeypatch.setattr(loop, "_CHECK_EVERY", every)
    with pytest.raises(CollapseError, match=f"after {named} iterations a pixel lies .* lower distill.lr_images"):
        run_method(problem(tiny_real, tmp_path, 1e9, iterations))
    assert bool(torch.isfinite(run_method(problem(tiny_real, tmp_path, 1.0, iterations)).images).all())


def test_a_run_that_is_killed_at_a_checkpoint_has_painted_and_kept_before(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()

    def killed(*_: object) -> None:
        seen.append("checkpoint")
        raise MemoryError

    monkeypatch.setattr(RunFolder, "checkpoint", killed)
    folder, cadence = RunFolder(tmp_path / "run", {}), Cadence(checkpoint=1, picture=1, keep=1)
    with pytest.raises(MemoryError):
        run_method(
            problem(tiny_real, tmp_path, 1.0, 3),
            folder,
            cadence=cadence,
            painter=lambda *_: seen.append("painted"),
            keeper=lambda *_: seen.append("kept"),
        )
    assert seen == ["painted", "kept", "checkpoint"]


def test_no_iteration_begins_after_the_end(tiny_real: RealSet, tmp_path: Path) -> None:
    seen, painted = list[tuple[int, int]](), list[int]()
    some = problem(tiny_real, tmp_path, 1.0, 7)
    cadence = Cadence(validate=5, picture=5, until=time.perf_counter())
    rows = list[dict[str, float]]()
    run_method(
        some,
        cadence=cadence,
        observer=lambda iteration, total, row: (seen.append((iteration, total)), rows.append(row)),  # type: ignore[func-returns-value]
        painter=lambda done, _: painted.append(done),
    )
    assert seen == [(0, 7)], "the iteration under way is finished"
    assert painted == [1], "and its images are shown and measured"
    assert "validation_accuracy" in rows[0]
    seen.clear()
    run_method(
        some, cadence=replace(cadence, until=math.inf), observer=lambda iteration, total, _: seen.append((iteration, total))
    )
    assert len(seen) == 7
