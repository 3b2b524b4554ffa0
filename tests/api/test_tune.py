"""`tune` writes the best of its candidates, with that candidate's score."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import dstill
from dstill.api import tune as tuning
from dstill.config import recipes
from dstill.config.settings import Recipe
from dstill.errors import CollapseError, DstillError
from dstill.jobs.job import Job

SHORT = ("net.width=4", "distill.iterations=2", "distill.max_start_epoch=3", "distill.student_steps=4", "experts.count=1")


def test_the_score_is_that_of_the_recipe_with_experts_of_its_own(tmp_path: Path) -> None:
    real = dstill.load_real("digits", train_fraction=0.3)
    file = dstill.tune(
        real,
        budget=0,
        recipe="smoke",
        ipc=3,
        changes=SHORT,
        out=tmp_path / "best.yaml",
        machine=dstill.Machine(cache=tmp_path / "a"),
    )
    best = recipes.load_recipe(str(file))
    noted = re.search(r"tuned on the validation part: (\S+), best of 1", best.note)
    assert noted

    held = real.holdout(0)
    assert best.distill.initialisation == "representative"  # type: ignore[attr-defined]
    distilled = dstill.distill(held, recipe=best, machine=dstill.Machine(cache=tmp_path / "b"))
    again = dstill.evaluate(distilled, held, random=False, machine=dstill.Machine(cache=tmp_path / "b")).accuracy.mean
    assert noted[1] == f"{again:.1%}"


def test_a_method_without_experts_is_tuned_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "experts", lambda *_: pytest.fail("experts were trained that nothing reads"))
    file = dstill.tune(
        dstill.load_real("digits", train_fraction=0.3),
        budget=0,
        method="rat-bptt",
        recipe="smoke",
        changes=["net.width=4", "distill.iterations=2"],
        out=tmp_path / "best.yaml",
        machine=dstill.Machine(cache=tmp_path),
    )
    assert recipes.load_recipe(str(file)).note.endswith("best of 1 candidates")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate takes a minute, so that the budget is their number, plus the one in progress."""
    minutes = itertools.count()
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(minutes)))


def scored(monkeypatch: pytest.MonkeyPatch, score: Callable[[int], float | None]) -> list[Recipe]:
    """Replaces measured scores by a function of the candidate's number; returns the list to which candidates are added."""
    seen: list[Recipe] = []

    def judge(job: Job, *_: object) -> float | None:
        seen.append(job.recipe)
        return score(len(seen))

    monkeypatch.setattr(tuning, "_judge", judge)
    return seen


def test_candidates_never_need_longer_experts_than_the_recipe_asks_for(
    tmp_path: Path, clock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dstill.load_real("digits", train_fraction=0.3)
    seen = scored(monkeypatch, float)  # each better than the last, so that T+ may grow
    changes = (*SHORT, "experts.epochs=5")
    dstill.tune(
        real,
        budget=30,
        recipe="smoke",
        changes=changes,
        out=tmp_path / "best.yaml",
        machine=dstill.Machine(cache=tmp_path / "a"),
    )
    assert len(seen) == 31
    assert {settings.distill.epochs_needed for settings in seen} >= {5, 4}  # type: ignore[attr-defined]
    assert all(settings.distill.epochs_needed <= 5 for settings in seen)  # type: ignore[attr-defined]


def test_the_best_is_kept_when_the_search_is_interrupted(tmp_path: Path, clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def score(number: int) -> float | None:
        if number == 5:
            raise KeyboardInterrupt
        return (0.3, None, 0.5, 0.4)[number - 1]

    seen = scored(monkeypatch, score)
    target = tmp_path / "best.yaml"
    with pytest.raises(KeyboardInterrupt):
        dstill.tune("digits", budget=9, recipe="smoke", changes=SHORT, out=target, machine=dstill.Machine(cache=tmp_path / "a"))
    best = recipes.load_recipe(str(target))
    assert "50.0%, best of 4 candidates" in best.note
    assert best.distill == seen[2].distill


def test_a_search_goes_on_from_where_it_was(tmp_path: Path, clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = (0.3, None, 0.5, 0.4, 0.6, 0.1)

    def tuned(file: str, budget: int, numbers: Callable[[int], float | None]) -> list[Recipe]:
        seen = scored(monkeypatch, numbers)
        dstill.tune(
            "digits",
            budget=budget,
            recipe="smoke",
            changes=SHORT,
            out=tmp_path / file,
            machine=dstill.Machine(cache=tmp_path / "a"),
        )
        return seen

    def broken_off(number: int) -> float | None:
        if number == 4:
            raise KeyboardInterrupt
        return scores[number - 1]

    at_once = tuned("whole.yaml", 5, lambda number: scores[number - 1])
    with pytest.raises(KeyboardInterrupt):
        tuned("parts.yaml", 5, broken_off)
    rest = tuned("parts.yaml", 3, lambda number: scores[3 + number - 1])
    assert rest == at_once[3:]
    assert (tmp_path / "parts.yaml").read_text() == (tmp_path / "whole.yaml").read_text()
    lines = (tmp_path / "parts.tried.jsonl").read_text()
    assert lines == (tmp_path / "whole.tried.jsonl").read_text()
    assert lines.count("\n") == 6 and '"score": null' in lines
    (tmp_path / "parts.yaml").unlink()
    assert tuned("parts.yaml", 0, lambda number: scores[6]) == []
    assert (tmp_path / "parts.yaml").read_text() == (tmp_path / "whole.yaml").read_text(), "written from what was tried"


def test_a_candidate_that_collapses_is_out(tmp_path: Path, clock: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def collapse(*_: object, **__: object) -> None:
        raise CollapseError("gone")

    monkeypatch.setattr(tuning, "run_shared", collapse)
    with pytest.raises(DstillError, match="all of 4 candidates collapsed"):
        dstill.tune(
            "digits",
            budget=3,
            recipe="smoke",
            changes=SHORT,
            out=tmp_path / "best.yaml",
            machine=dstill.Machine(cache=tmp_path / "a"),
        )
