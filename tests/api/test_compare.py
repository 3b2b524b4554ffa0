"""Comparisons: every row is a run, a failed row keeps its reason, and nothing is done twice."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.listening import Listener

import dstill
from dstill import Comparison, DstillError
from dstill.api.apart import request, run_apart
from dstill.data.real import RealSet
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Choice

PROTOCOL = "{name: tiny, version: 1, passes: 4, batch_size: 8, momentum: 0.9, weight_decay: 5e-4, lr: 0.05, networks: 2}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture
def compare(tiny_real: RealSet, shared: Path) -> Callable[..., Comparison]:
    (shared / "tiny.yaml").write_text(PROTOCOL)

    def call(out: str, *methods: str, **options: Any) -> Comparison:
        defaults = {"recipe": "smoke", "machine": dstill.Machine(cache=shared / "cache"), "protocol": str(shared / "tiny.yaml")}
        return dstill.compare(tiny_real, methods=methods, out=shared / out, **{**defaults, **options})

    return call


def test_rows_are_runs_and_a_second_call_reuses_them(compare: Callable[..., Comparison], shared: Path) -> None:
    first, notes = Listener(), Listener()
    table = compare("a", "dsa", "dm", progress=first)
    assert [(row.method, row.ipc, row.reason) for row in table.rows] == [("dsa", 1, ""), ("dm", 1, "")]
    assert {"distilling", "evaluation"} <= first.stages, "reports of a row's process are passed on"
    for row in table.rows:
        assert row.result is not None and row.result.cost is not None
        assert (row.result.ipc, row.result.method, row.result.protocol.name) == (row.ipc, row.method, "tiny")
        assert dstill.Result.load(shared / "a" / f"{row.method}-ipc{row.ipc}" / "result.json") == row.result
        assert row.result.cost.seconds > 0
    assert len({str(row.result.random) for row in table.rows if row.result}) == 1
    assert sum("random images: trying" in note for note in first.notes) == 1, "shared, and not measured twice"
    again = compare("a", "dm", "dsa", progress=notes)
    assert sum("reused" in note for note in notes.notes) == 2
    assert notes.stages == set()
    assert again.rows == table.rows[::-1]


def test_a_failed_row_keeps_its_reason_and_the_others_go_on(compare: Callable[..., Comparison], shared: Path) -> None:
    table = compare("b", "random", ipc=(21, 1))
    assert [row.result is None for row in table.rows] == [True, False]
    assert "has 20 training images, fewer than the 21" in table.rows[0].reason
    assert "| random | 21 | – | – | – |" in table.markdown()
    assert Comparison.model_validate_json((shared / "b" / "compare.json").read_text()) == table


def test_other_settings_are_not_reused(compare: Callable[..., Comparison]) -> None:
    notes = Listener()
    row = compare("b", "random", seed=1, progress=notes).rows[0]
    assert row.result is None, "the folder holds a run with another seed"
    assert "other settings" in row.reason
    assert not any("reused" in note for note in notes.notes)


def test_a_changed_protocol_is_measured_anew(compare: Callable[..., Comparison], shared: Path) -> None:
    """Both a new version and a changed file of the same version; also for the random images."""
    file, beside = shared / "mine.yaml", list[str]()
    for version, passes in ((1, 1), (2, 40), (2, 8)):
        file.write_text(PROTOCOL.replace("version: 1, passes: 4", f"version: {version}, passes: {passes}"))
        notes = Listener()
        row = compare("c", "random", protocol=str(file), whole=False, progress=notes).rows[0]
        assert row.result is not None and row.result.protocol.version == version
        beside.append(str(row.result.random))
        assert not any("reused" in note for note in notes.notes)
    assert len(set(beside)) == 3


def test_a_run_that_was_broken_off_does_not_stand_for_the_one_before_it(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workplace.of(dstill.Machine(cache=tmp_path / "cache"), Listener())
    job = Job.resolve(tiny_real, Choice("random", recipe="smoke"), 0, place)

    def go(networks: int = 1) -> dstill.Result:
        task = Task(evaluation=dstill.Evaluation(networks=networks))
        return run_apart(job, tmp_path / "run", task, request(job, {"networks": networks}))

    done = go()
    assert go() == done

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dstill.api.apart.apart", broken)
    for networks in (2, 1):  # the first may already have written its result, so the second cannot trust it
        with pytest.raises(KeyboardInterrupt):
            go(networks)


def test_an_unknown_method_is_refused_before_anything_runs(compare: Callable[..., Comparison], shared: Path) -> None:
    with pytest.raises(DstillError, match="did you mean herding"):
        compare("d", "random", "hearding")
    assert not (shared / "d").exists()


def test_the_table_says_the_same_in_every_form(compare: Callable[..., Comparison], shared: Path) -> None:
    table = compare("a", "dm")
    row = table.rows[0]
    assert row.result is not None and row.result.random is not None and row.result.whole is not None
    (written,) = (r for r in csv.DictReader(io.StringIO((shared / "a" / "compare.csv").read_text())) if r["method"] == "dm")
    accuracy = row.result.accuracy
    assert float(written["accuracy"]) == 100 * accuracy.mean
    assert float(written["over_random"]) == pytest.approx(100 * (accuracy.mean - row.result.random.mean))
    assert float(written["of_whole"]) == pytest.approx(100 * accuracy.mean / row.result.whole.mean)
    assert int(written["stored_bytes"]) == 3 * 3 * 8 * 8 + 3
    line = next(line for line in (shared / "a" / "compare.md").read_text().splitlines() if line.startswith("| dm"))
    assert f"| {100 * accuracy.mean:.1f} ± {100 * accuracy.std:.1f} | 2 |" in line
    assert json.loads((shared / "a" / "compare.json").read_text())["rows"][0]["method"] == "dm"
