"""A run says before it begins how long it takes, and what it says it takes is what its stages tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.listening import Listener
from tests.short import SHORT

import dstill
from dstill.data.real import RealSet
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Choice
from dstill.planning.announce import announce
from dstill.planning.stages import Plan, Stage
from dstill.support.progress import Expectation


@pytest.mark.parametrize("method", ["ast", "mtt", "dm", "herding"])
def test_the_stages_that_come_are_those_that_were_expected(tiny_real: RealSet, tmp_path: Path, method: str) -> None:
    listener = Listener()
    once = dstill.Evaluation(networks=1, whole=True)
    options: dict[str, Any] = {"recipe": "smoke", "changes": {"protocol": SHORT}, "evaluation": once}
    options["machine"] = dstill.Machine(cache=tmp_path / "cache")
    dstill.run(tiny_real, method=method, sets=2, out=tmp_path / "run", progress=listener, **options)
    expected = [one.stage for one in listener.expected]
    assert set(listener.came) - {"fitting the whitening"} == set(expected)
    assert [stage for stage in dict.fromkeys(listener.came) if stage in expected] == expected, "in this order"
    assert [one.times for one in listener.expected if one.stage == "distilling"] in ([2], [])
    assert sum(note.startswith("this takes about ") for note in listener.notes) == 1


@pytest.mark.parametrize(
    ("until", "seconds", "offered"), [("evaluation", 1e5, True), ("evaluation", 1.0, False), ("experts", 1e5, False)]
)
def test_a_budget_is_offered_where_a_run_is_long(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Any, seconds: float, offered: bool
) -> None:
    stage = Stage(name="distilling", seconds=seconds, peak_bytes=0, disk_bytes=0)
    monkeypatch.setattr("dstill.planning.announce.plan_job", lambda *_: Plan(title="", stages=(stage,)))
    listener = Listener()
    place = Workplace.of(dstill.Machine(cache=tmp_path), listener)
    announce(Job.resolve(tiny_real, Choice("dm", recipe="smoke"), 0, place), Task(), until)
    assert any("--minutes 10" in note for note in listener.notes) == offered


def test_what_an_earlier_call_has_done_is_not_announced_again(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstill.planning.clock.Clock._time", lambda *_: 0.01)
    call: dict[str, Any] = {"method": "dm", "recipe": "smoke", "machine": dstill.Machine(cache=tmp_path / "cache"), "sets": 2}
    call["evaluation"] = dstill.Evaluation(networks=1, random=False)
    first, half, again = Listener(), Listener(), Listener()
    dstill.run(tiny_real, out=tmp_path / "run", progress=first, **call)
    (tmp_path / "run" / "set-1" / "distilled.safetensors").unlink()
    (tmp_path / "run" / "set-1" / "metrics.jsonl").unlink()
    dstill.run(tiny_real, out=tmp_path / "run", progress=half, **call)
    dstill.run(tiny_real, out=tmp_path / "run", progress=again, **call)
    times = [{one.stage: one.seconds for one in listener.expected} for listener in (first, half, again)]
    assert times[1]["distilling"] == pytest.approx(times[0]["distilling"] / 2)
    assert times[2]["distilling"] == 0
    assert times[2]["evaluation"] == times[0]["evaluation"]


def test_nothing_is_measured_if_nobody_is_told(tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstill.planning.announce.plan_job", lambda *_: pytest.fail("a plan was made"))
    place = Workplace.of(dstill.Machine(cache=tmp_path), False)
    announce(Job.resolve(tiny_real, Choice("dm", recipe="smoke"), 0, place), Task())


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"machine": dstill.Machine(cache=tmp_path / "cache")}


def test_distilling_and_training_experts_announce_no_more_than_they_do(tiny_real: RealSet, options: dict[str, Any]) -> None:
    for function, stages in ((dstill.train_experts, ["expert epochs"]), (dstill.distill, ["expert epochs", "distilling"])):
        listener = Listener()
        function(tiny_real, method="mtt", recipe="smoke", progress=listener, **options)  # type: ignore[operator]
        assert [one.stage for one in listener.expected] == stages


def test_an_evaluation_and_a_judgement_announce_all_their_networks(
    tiny_real: RealSet, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstill.planning.clock.Clock._time", lambda *_: 0.01)
    syn = dstill.distill(tiny_real, method="frepo", recipe="smoke", progress=False, **options)
    once, ways = Listener(), Listener()
    quick: dict[str, Any] = {"protocol": SHORT, "networks": 1, **options}
    dstill.evaluate(syn, tiny_real, progress=once, **quick)
    dstill.judge(syn, tiny_real, whole=False, progress=ways, **quick)
    assert [one.stage for one in once.expected] == ["evaluation", "random images"]
    four = [one._replace(seconds=4 * one.seconds, times=4) for one in once.expected]
    assert ways.expected[:-1] == four, "2 labels, 2 augmentations"
    validation, evaluation = ways.expected[-1], four[0]
    assert validation == ("validation", pytest.approx(3 * evaluation.seconds), 4), "three networks each time"
    assert set(ways.came) == {"evaluation", "random images", "validation"}
    for listener in (once, ways):
        assert sum(note.startswith("this takes about ") for note in listener.notes) == 1


def test_scores_announce_what_they_need_and_no_more(
    tiny_real: RealSet, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dstill.planning.clock.Clock._time", lambda *_: 0.01)
    syn = dstill.distill(tiny_real, method="frepo", recipe="smoke", progress=False, **options)
    quick: dict[str, Any] = {"protocol": SHORT, "networks": 1, **options}
    once, soft, hard = Listener(), Listener(), Listener()
    elsewhere = {"machine": dstill.Machine(cache=tmp_path / "elsewhere")}
    dstill.evaluate(syn, tiny_real, whole=True, progress=once, **quick | elsewhere)
    dstill.leaderboard(syn, tiny_real, progress=soft, **quick)
    dstill.leaderboard(syn.with_hard_labels().with_augmentation("none"), tiny_real, progress=hard, **quick)
    evaluation, random, whole = once.expected
    three = evaluation._replace(seconds=pytest.approx(3 * evaluation.seconds), times=3)
    two = random._replace(seconds=pytest.approx(2 * random.seconds), times=2)
    # 60 training images are one batch, and the clock gives each batch the same time.
    network = Expectation("network epochs", 30 * whole.seconds / 50)
    assert soft.expected == [network._replace(seconds=pytest.approx(network.seconds)), three, whole, two]
    assert list(dict.fromkeys(soft.came)) == [one.stage for one in soft.expected], "in this order"
    assert hard.expected == [evaluation, random, whole]
    for listener in (soft, hard):
        assert sum(note.startswith("this takes about ") for note in listener.notes) == 1


def test_a_search_tells_its_minutes(tiny_real: RealSet, options: dict[str, Any], tmp_path: Path) -> None:
    listener = Listener()
    dstill.tune(tiny_real, budget=0.001, method="mtt", recipe="smoke", out=tmp_path / "t.yaml", progress=listener, **options)
    assert "minutes of the search" in listener.came
    assert any(note.startswith("searching for 0.001 minutes") for note in listener.notes)
