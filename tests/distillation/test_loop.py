"""The outer loop ends a run whose images run away, and leaves others alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstill.data.real import RealSet
from dstill.distillation import loop
from dstill.distillation.loop import run_method
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
