"""The score that `tune` writes down is the one that its recipe has."""

from __future__ import annotations

import re
from pathlib import Path

import dstill
from dstill import recipes

SHORT = ("net.width=4", "distill.iterations=2", "distill.max_start_epoch=3", "distill.student_steps=4", "experts.count=1")


def test_the_score_is_that_of_the_recipe_with_experts_of_its_own(tmp_path: Path) -> None:
    real = dstill.load_real("digits", train_fraction=0.3)
    file = dstill.tune(real, budget=0, recipe="smoke", ipc=3, changes=SHORT, out=tmp_path / "best.yaml", cache=tmp_path / "a")
    best = recipes.load_recipe(str(file))
    noted = re.search(r"tuned on the validation part: (\S+), best of 1", best.note)
    assert noted

    held = real.holdout(0)
    assert best.distill.initialisation == "representative"  # type: ignore[attr-defined]
    distilled = dstill.distill(held, recipe=best, cache=tmp_path / "b")
    again = dstill.evaluate(distilled, held, random=False, cache=tmp_path / "b").accuracy.mean
    assert noted[1] == f"{again:.1%}"
