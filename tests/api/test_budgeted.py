"""A call with `minutes` chooses settings that fit, stores them, and ends in time."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.listening import Listener
from tests.steady import Steady

import dstill
from dstill.api import budgeted
from dstill.api import run as running
from dstill.api.rivals import best_of, candidate
from dstill.artifacts import set_file
from dstill.artifacts.record import METRICS_NAME, read_metrics
from dstill.data.preprocess import from_bytes
from dstill.data.real import RealSet
from dstill.distillation.folder import distill_into
from dstill.distillation.loop import Cadence
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Budget, Choice
from dstill.methods.base import Method, State
from dstill.planning import budget as planned
from dstill.planning.budget import Rivals
from dstill.support.progress import Silent

PROTOCOL = "{name: tiny, version: 1, passes: 4, batch_size: 8, momentum: 0.9, weight_decay: 5e-4, lr: 0.05, networks: 2}"
STEPS = 6  # iterations that the budget buys at the pace below


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of known speed, so that nothing here depends on that of the real one, and a shorter protocol `quick`."""
    monkeypatch.setattr(budgeted, "Clock", lambda shape, device, pains: Steady(shape, 1e-4))
    monkeypatch.setattr("dstill.api.rivals.load_protocol", lambda name: load_protocol(name).model_copy(update={"passes": 60}))
    monkeypatch.setattr(budgeted, "_pace", lambda problem, most, workers: 3600 / (STEPS + 0.5))


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """An hour, in which nothing takes long."""
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    changes = {"net.width": 4, "protocol": str(tmp_path / "tiny.yaml"), "distill.batch_real": 16}
    return {"minutes": 60, "changes": changes, "machine": dstill.Machine(cache=tmp_path / "cache"), "progress": Listener()}


def stored(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / budgeted.NAME).read_text()))


def done(folder: Path) -> int:
    return len(read_metrics(folder / METRICS_NAME))


def test_a_run_within_a_budget_chooses_competes_and_measures(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    out, notes = tmp_path / "run", options["progress"]
    result = dstill.run(tiny_real, out=out, **options)
    offer = stored(out)["offer"]
    assert (result.accuracy.n, result.random is not None) == (offer["networks"], offer["random"])
    assert notes.have("image(s) per class: dm, convnet of width 4")
    assert notes.have(f"an iteration takes 5.5e+02 s here: {STEPS} iterations")
    assert notes.have("on 6 images set aside: dm ")
    assert done(out / "candidates" / "dm") == STEPS
    syn = dstill.DistilledSet.load(out)
    assert syn.data_fingerprint == result.data_fingerprint == tiny_real.fingerprint
    assert syn.accuracy is not None
    assert syn.accuracy.mean == result.accuracy.mean
    assert {path.name for path in (out / "candidates").iterdir()} == {"dm", "random", "herding", "kmeans"}
    assert (out / "report.html").exists()


def test_what_a_budget_hands_out_says_how_its_data_were_read(tmp_path: Path, options: dict[str, Any]) -> None:
    digits = dstill.load_real("digits", train_fraction=0.1)
    out = tmp_path / "run"
    dstill.run(digits, out=out, **options)
    assert json.loads((out / "set-0" / "source.json").read_text()) == {"source": "digits", "train_fraction": 0.1}
    assert "dstill evaluate" in (out / "report.html").read_text()


def test_a_run_within_a_budget_starts_from_a_given_set_without_rivals(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    given = dstill.distill(tiny_real, method="random", recipe="smoke", changes=["net.width=4"], seed=5)
    dstill.run(tiny_real, init=given, out=tmp_path / "run", **options)
    assert not (tmp_path / "run" / "candidates").exists(), "the given set may have seen the images set aside"
    begun = dstill.DistilledSet.load(tmp_path / "run" / "set-0" / "initial.safetensors")
    assert torch.allclose(begun.pixels(), given.pixels(), atol=1e-4)


def test_the_same_call_goes_on_with_the_choice_of_the_first(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    first = dstill.run(tiny_real, out=out, **options)
    images = dstill.DistilledSet.load(out).images
    for name in ("best_offer", "_pace"):
        monkeypatch.setattr(budgeted, name, lambda *_: pytest.fail("chosen again"))
    again = dstill.run(tiny_real, out=out, **options)
    assert options["progress"].have("chosen in an earlier call are used again")
    assert again.accuracy == first.accuracy
    assert torch.equal(dstill.DistilledSet.load(out).images, images)
    with pytest.raises(dstill.DstillError, match=r"another request \(minutes: 60 there, 61 now\)"):
        dstill.run(tiny_real, out=out, **{**options, "minutes": 61})
    given = dstill.distill(tiny_real, method="random", recipe="smoke", changes=["net.width=4"])
    with pytest.raises(dstill.DstillError, match=r"another request \(initial: None there, [0-9a-f]+ now\)"):
        dstill.run(tiny_real, init=given, out=out, **options)
    without = dstill.Evaluation(random=False)
    with pytest.raises(dstill.DstillError, match=r"another request \(random: None there, False now\)"):
        dstill.run(tiny_real, out=out, evaluation=without, **options)
    (out / budgeted.NAME).write_text("{")
    with pytest.raises(dstill.DstillError, match="is damaged: remove the folder"):
        dstill.run(tiny_real, out=out, **options)


def test_a_choice_that_was_not_settled_is_settled_by_the_next_call(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(budgeted, "_pace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            dstill.distill(tiny_real, out=tmp_path / "out", **options)
    assert not stored(tmp_path / "out")["settled"]
    dstill.distill(tiny_real, out=tmp_path / "out", **options)
    assert stored(tmp_path / "out")["settled"]
    assert done(tmp_path / "out") == STEPS


def test_several_sets_share_the_time(tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]) -> None:
    result = dstill.run(tiny_real, sets=2, out=tmp_path / "run", **options)
    assert result.sets == 2
    assert [done(tmp_path / "run" / f"set-{k}") for k in (0, 1)] == [STEPS // 2, STEPS // 2]


def test_time_that_passed_before_the_call_counts(tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]) -> None:
    begun = Budget.of(60)
    assert begun is not None
    late = begun._replace(began=begun.began - 1800)
    dstill.distill(tiny_real, out=tmp_path, **{**options, "minutes": late})
    assert done(tmp_path) == STEPS // 2


def test_a_distillation_that_is_too_slow_is_ended(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgeted.Budgeted, "until", lambda self, sets_left: time.perf_counter())
    changes = {"net.width": 4, "protocol": str(tmp_path / "tiny.yaml")}
    dstill.run(tiny_real, method="dm", out=tmp_path / "run", **{**options, "changes": changes})
    assert done(tmp_path / "run" / "set-0") == 1
    assert options["progress"].have(f"ended after 1 of {STEPS} iterations")


def test_a_distillation_alone_that_is_too_slow_is_ended_and_says_so(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgeted.Budgeted, "until", lambda self, sets_left: time.perf_counter())
    dstill.distill(tiny_real, out=tmp_path / "out", **options)
    assert done(tmp_path / "out") == 1
    assert options["progress"].have(f"ended after 1 of {STEPS} iterations")


def test_sets_that_were_made_without_a_budget_are_not_replaced(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    plain: dict[str, Any] = {"method": "random", "recipe": "smoke", "machine": options["machine"], "progress": False}
    once = dstill.Evaluation(networks=1, random=False)
    dstill.run(tiny_real, out=tmp_path / "run", evaluation=once, **plain)
    dstill.distill(tiny_real, out=tmp_path / "set", **plain)
    kept = [(path / "distilled.safetensors").read_bytes() for path in (tmp_path / "run" / "set-0", tmp_path / "set")]
    for function, folder in ((dstill.run, "run"), (dstill.distill, "set")):
        with pytest.raises(dstill.DstillError, match=f"{folder} holds a run without a budget: pass another -o"):
            function(tiny_real, out=tmp_path / folder, **options)  # type: ignore[operator]
    assert [(path / "distilled.safetensors").read_bytes() for path in (tmp_path / "run" / "set-0", tmp_path / "set")] == kept


def test_the_end_of_a_distillation_leaves_time_for_what_follows(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = list[float]()
    until = budgeted.Budgeted.until
    monkeypatch.setattr(budgeted.Budgeted, "until", lambda self, left: ends.append(until(self, left)) or ends[-1])  # type: ignore[func-returns-value]
    begun = time.perf_counter()
    dstill.run(tiny_real, out=tmp_path / "run", **options)
    stages = {one["name"]: one["seconds"] for one in stored(tmp_path / "run")["offer"]["stages"]}
    after = sum(seconds for name, seconds in stages.items() if name not in ("distilling",))
    assert after > 0
    assert ends[0] - begun == pytest.approx(3600 - after + 0.05 * 3600, abs=30)


def test_what_follows_a_late_distillation_is_cut(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budgeted, "Clock", lambda shape, device, pains: Steady(shape, 1.0))
    distilled = running._distilled

    def late(*arguments: Any, **named: Any) -> Any:
        """Distils, and passes all but the last moments of the budget."""
        monkeypatch.setattr(Budget, "left", property(lambda self: 0.01))
        return distilled(*arguments, **named)

    monkeypatch.setattr("dstill.api.run._distilled", late)
    monkeypatch.setattr(budgeted.Budgeted, "until", lambda self, sets_left: time.perf_counter())
    dstill.run(tiny_real, out=tmp_path / "run", **{**options, "minutes": 1e5})
    offer, notes = stored(tmp_path / "run")["offer"], options["progress"]
    assert len(offer["rivals"]["methods"]) > 1
    assert offer["networks"] > 1
    assert notes.have("time is short: only random images compete")
    assert notes.have("time is short: the set is measured with 1 network(s)")
    assert {path.name for path in (tmp_path / "run" / "candidates").iterdir()} == {"dm", "random"}
    result = dstill.Result.load(tmp_path / "run" / "result.json")
    assert (result.accuracy.n, result.random) == (1, None)


def test_experts_that_are_given_are_used_within_a_budget_or_refused(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]
) -> None:
    few = {**options, "changes": {"net.width": 4, "experts.count": 1, "preprocess": "standardise"}}
    asked = {name: few[name] for name in ("changes", "machine")}
    experts = dstill.train_experts(tiny_real, method="mtt", **asked)
    place = {**few, "machine": dstill.Machine(cache=tmp_path / "elsewhere")}
    syn = dstill.distill(tiny_real, method="mtt", experts=experts.folder, **place)
    assert syn.recipe is not None and syn.recipe.distill.iterations == STEPS
    assert not (tmp_path / "elsewhere" / "experts").exists()
    for method in (None, "dm"):
        with pytest.raises(dstill.DstillError, match=r"method 'dm' uses no experts: leave them out, or name one that does"):
            dstill.distill(tiny_real, method=method, experts=experts, **place)


def test_looks_that_take_as_long_as_iterations_leave_time_for_half_as_many(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned, each = budgeted.Budgeted._planned, 3600 / (STEPS + 0.5)

    def slow(self: budgeted.Budgeted, *names: str) -> float:
        return each * self.recipe.distill.iterations if names == ("validation",) else planned(self, *names)

    monkeypatch.setattr(budgeted.Budgeted, "_planned", slow)
    dstill.distill(tiny_real, method="dm", recording=dstill.Recording(validate_every=1), out=tmp_path / "out", **options)
    rows = read_metrics(tmp_path / "out" / METRICS_NAME)
    assert len(rows) == STEPS // 2 and all("validation_accuracy" in row for row in rows)


def test_experts_are_trained_within_a_budget(tiny_real: RealSet, options: dict[str, Any]) -> None:
    syn = dstill.distill(tiny_real, method="mtt", **{**options, "changes": {"net.width": 4, "experts.count": 1}})
    assert syn.recipe is not None
    assert syn.recipe.distill.iterations == STEPS


def test_the_pace_is_that_of_iterations_after_the_first(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    place = Workplace.of(dstill.Machine(device="cpu", cache=tmp_path), False)
    problem = Job.resolve(tiny_real, Choice("dm", recipe="smoke", changes=["distill.iterations=9"]), 0, place).problem(0, None)
    now, asked = 0.0, list[int]()

    def step(self: Method, state: State, iteration: int, generator: torch.Generator) -> dict[str, float]:
        nonlocal now
        now += 10.0 if iteration == 0 else 4.0
        asked.append(iteration)
        return {"loss": 0.0}

    monkeypatch.setattr("dstill.api.budgeted.time.perf_counter", lambda: now)
    monkeypatch.setattr("dstill.methods.distribution_matching.DistributionMatching.step", step)
    assert budgeted._pace(problem, 15, 1) == 4
    assert asked == [0, 1, 2], "one to warm up, then until fifteen seconds have passed"
    asked.clear()
    assert budgeted._pace(problem, 1e9, 1) == 4
    assert len(asked) == 9, "no more than there are"
    assert budgeted._pace(problem, 5, 1) == 10, "there was time for one only"


@pytest.mark.parametrize("better", ["random", "rat-bptt"])
def test_the_best_on_images_set_aside_is_handed_out(tiny_real: RealSet, tmp_path: Path, better: str) -> None:
    notes = Listener()
    place = Workplace.of(dstill.Machine(device="cpu", cache=tmp_path / "cache"), notes)
    job = Job.resolve(tiny_real, Choice("rat-bptt", recipe="smoke", changes=["preprocess=standardise"]), 0, place)
    held = job.on(tiny_real.holdout(0))
    distilled = distill_into(candidate(tmp_path, "rat-bptt"), held.problem(0, None), held.identity(0), Cadence(), Silent())
    if better == "rat-bptt":
        distilled = replace(distilled, images=_means(held, tiny_real))
    else:
        distilled = replace(distilled, labels=distilled.labels.roll(1, 0))
    winner = best_of(distilled, held, Rivals(methods=("random",), epochs=0, networks=2), tmp_path, tiny_real)
    assert winner.method == better
    assert winner.data_fingerprint == tiny_real.fingerprint
    assert set_file.read(tmp_path).method == better
    assert notes.have("images set aside: rat-bptt ")
    assert notes.have("is handed out") == (better == "random")


def _means(job: Job, real: RealSet) -> torch.Tensor:
    """The mean image of each class, which is better than any single one."""
    pixels = from_bytes(job.preprocess(), real.train.images, torch.device("cpu"))
    return torch.stack([pixels[rows].mean(0) for rows in real.train.by_class(real.classes)])


def test_no_candidate_has_seen_the_images_set_aside(tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]) -> None:
    out = tmp_path / "run"
    dstill.run(tiny_real, out=out, **options)
    held = tiny_real.holdout(0)
    for method in ("random", "herding", "kmeans"):
        coreset = set_file.read(out / "candidates" / method)
        real = from_bytes(coreset.preprocess, held.train.images, torch.device("cpu"))
        assert all((real - image).abs().amax((1, 2, 3)).min() < 1e-5 for image in coreset.images)
    settings = json.loads((out / "candidates" / "dm" / "settings.json").read_text())
    assert settings["data"] == held.fingerprint != tiny_real.fingerprint


def test_a_class_too_small_to_set_images_aside_is_no_obstacle(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = torch.cat([rows[:1] for rows in tiny_real.train.by_class(3)])
    lonely = dstill.RealSet("lonely", tiny_real.train.take(first), tiny_real.test, tiny_real.class_names)
    result = dstill.run(lonely, **options)
    assert result.method == "dm"
    folder = tmp_path / "runs" / "lonely-ipc1-seed0-60min"
    assert stored(folder)["offer"]["rivals"]["methods"] == [], "and the folder names no method that was not asked for"
    assert not options["progress"].have("compare the set with coresets"), "which more time would not change"


def test_it_is_said_if_there_is_no_time_for_coresets(
    tiny_real: RealSet, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for share in ("_FOR_RIVALS", "_FOR_ONE_RIVAL"):
        monkeypatch.setattr(planned, share, 0.0)
    result = dstill.run(tiny_real, out=tmp_path / "run", **options)
    assert result.method == "dm"
    assert not (tmp_path / "run" / "candidates").exists()
    assert options["progress"].have("there is no time to compare the set with coresets: allow more")


def test_the_rows_of_a_comparison_share_a_budget(tiny_real: RealSet, tmp_path: Path, options: dict[str, Any]) -> None:
    changes = {"net.width": 4, "distill.iterations": 3}
    call = {**options, "changes": changes, "out": tmp_path, "protocol": str(tmp_path / "tiny.yaml"), "methods": ["dc", "dm"]}
    table = dstill.compare(tiny_real, **call)
    assert [row.reason for row in table.rows] == ["", ""]
    assert all(row.result is not None and row.result.whole is None for row in table.rows)
    assert [stored(tmp_path / f"{method}-ipc1")["asked"]["minutes"] for method in ("dc", "dm")] == [30, 30]
    assert dstill.compare(tiny_real, **call) == table
    assert sum("is finished: reused" in note for note in options["progress"].notes) == 2
