"""What must be there before a set is distilled is made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dstill
from dstill import DstillError
from dstill.data.real import RealSet
from dstill.experts.trajectory import Trajectories, recorded_epochs
from dstill.recipes import load_recipe

SETTINGS: dict[str, Any] = {
    "method": "ast",
    "recipe": "smoke",
    "device": "cpu",
    "changes": ["net.width=4", "experts.count=2", "distill.initialisation=representative", "distill.feature_epochs=5"],
}


class _Counting:
    """Keeps the stages of the progress that is reported."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def note(self, text: str) -> None:
        """Nothing."""

    def progress(self, stage: str, _done: int, _total: int, _detail: str = "") -> None:
        self.stages.append(stage)


def test_the_expert_that_describes_images_is_trained_once_and_to_its_full_length(tiny_real: RealSet, tmp_path: Path) -> None:
    planned = dstill.plan(tiny_real, cache=tmp_path, **SETTINGS)
    reporter = _Counting()
    experts = dstill.train_experts(tiny_real, cache=tmp_path, reporter=reporter, **SETTINGS)
    assert [recorded_epochs(path) for path in experts.paths] == [5, experts.epochs]
    assert reporter.stages.count("expert epochs") == 5 + experts.epochs
    notes = [stage.note for stage in planned.stages if "expert" in stage.name]
    assert notes == ["1 of 5 epochs", f"1 of {experts.epochs} epochs"]

    reporter = _Counting()
    dstill.distill(tiny_real, cache=tmp_path, reporter=reporter, **SETTINGS)
    assert "expert epochs" not in reporter.stages


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"logs": ["tensorbord"]}, "unknown log 'tensorbord'"),
        ({"init": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"ipc": 100}, "fewer than the 100"),
        ({"net": "resnet19"}, "unknown network"),
    ],
)
def test_what_is_wrong_is_said_before_an_expert_is_trained(
    tiny_real: RealSet, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(DstillError, match=message):
        dstill.distill(tiny_real, cache=tmp_path, **{**SETTINGS, **wrong})
    assert not (tmp_path / "experts").exists()


def test_the_name_of_another_method_does_not_change_settings(tiny_real: RealSet) -> None:
    recipe = load_recipe("cifar10/ast-ipc1")
    with pytest.raises(DstillError, match="is for method 'ast', not 'mtt'"):
        dstill.plan(tiny_real, recipe=recipe, method="mtt")


def test_a_set_that_starts_from_given_images_needs_no_expert_to_describe_any(tiny_real: RealSet, tmp_path: Path) -> None:
    given = dstill.distill(tiny_real, method="random", recipe="smoke", device="cpu", changes=["net.width=4"])
    dstill.distill(tiny_real, cache=tmp_path, init=given, **SETTINGS)
    (folder,) = (tmp_path / "experts").iterdir()
    assert Trajectories(folder).epochs == max(recorded_epochs(path) for path in Trajectories(folder).paths) < 5
