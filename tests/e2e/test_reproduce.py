"""Every table and figure, run at smoke scale on the digits: pages, pictures, and nothing done twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import dstill
from dstill.reproductions.page import Entry
from dstill.reproductions.spec import load_reproduction, reproduction_names


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        pass


def places(folder: Path) -> dict[str, Any]:
    cache = dstill.Machine(cache=folder / "cache")
    return {"out": folder / "results", "runs": folder / "runs", "machine": cache}


# Every kind of figure and every measure, in half of the time of all.
QUICK = ("table4", "table6", "table7", "fig3", "fig4", "fig6", "fig7", "fig8", "fig10", "fig11", "peeking")


def test_the_quick_ones_have_every_figure_and_measure() -> None:
    quick, every = ([load_reproduction(what) for what in names] for names in (QUICK, reproduction_names()))
    assert {one.figure for one in quick} == {one.figure for one in every}
    assert {one for each in quick for one in each.measures} == {one for each in every for one in each.measures}


@pytest.mark.usefixtures("in_this_process", "short_protocols", "no_calibration")
@pytest.mark.parametrize("names", [QUICK, pytest.param(reproduction_names(), marks=pytest.mark.slow)], ids=["quick", "all"])
def test_reproductions_run_at_smoke_scale(names: Sequence[str], tmp_path: Path) -> None:
    where: dict[str, Any] = {
        "out": tmp_path / "results",
        "runs": tmp_path / "runs",
        "machine": dstill.Machine(cache=tmp_path / "cache"),
    }
    for what in names:
        reproduction = load_reproduction(what)
        folder = dstill.reproduce(what, **where)
        page = (folder / "page.md").read_text()
        for row in reproduction.rows_at("smoke"):
            entry = Entry.model_validate_json((folder / f"{row.name}-digits-ipc1.json").read_text())
            assert entry.record.result is not None, (what, row.name, entry.record.reason)
            assert entry.record.result.confusion == (), "it would fill the results folder"
            drawn = reproduction.figure == "initialisation" and entry.record.recipe["distill"]["initialisation"] != "random"
            assert bool(entry.record.map) == drawn
            assert f"| {row.title} |" in page
            assert (folder / entry.picture).is_file()
        assert "pending" not in page
        figures = sorted(folder.glob("figure-*.png"))
        assert bool(figures) == (reproduction.figure is not None), what
        for figure in figures:
            assert f"({figure.name})" in page
            with Image.open(figure) as image:
                assert min(image.size) > 50
    distilled = {path.parent.name for path in where["runs"].glob("*/set-0/distilled.safetensors")}
    rows = sum(len(load_reproduction(what).rows_at("smoke")) for what in names)
    assert len(distilled) < rows, "tables that ask for the same run share it"

    notes = Notes()
    dstill.reproduce("fig4", progress=notes, **where)
    assert notes.notes[-1] == "fig4, smoke: about 0 s for 0 of 3 run(s)", "what is finished is not run again"
    assert not [note for note in notes.notes if note.startswith("run folder")]


def test_what_was_asked_for_otherwise_is_run_again(tmp_path: Path) -> None:
    where: dict[str, Any] = {
        "out": tmp_path / "results",
        "runs": tmp_path / "runs",
        "machine": dstill.Machine(cache=tmp_path / "cache"),
        "only": ["random"],
    }
    folder = dstill.reproduce("table3", **where)
    path = folder / "random-digits-ipc1.json"
    stored = json.loads(path.read_text())
    stored["request"]["seed"] = 5
    path.write_text(json.dumps(stored))
    notes = Notes()
    dstill.reproduce("table3", progress=notes, **where)
    assert [note for note in notes.notes if "about" in note and "for 1 of 1 run(s)" in note]

    (made,) = where["runs"].glob("*/environment.json")
    assert json.loads(made.read_text()) == Entry.load(path).environment
    made.write_text(json.dumps({**json.loads(made.read_text()), "processor": "that of another machine"}))
    path.unlink()
    dstill.reproduce("table3", progress=notes, **where)
    assert any("is finished: reused" in note for note in notes.notes)
    assert Entry.load(path).environment["processor"] == "that of another machine", "the run was copied from there"
    page = (folder / "page.md").read_text()
    assert page.count("pending") == len(load_reproduction("table3").rows) - 1


@pytest.mark.usefixtures("in_this_process", "short_protocols", "no_calibration")
def test_a_row_that_fails_keeps_its_reason_and_is_tried_again(tmp_path: Path) -> None:
    where: dict[str, Any] = {
        "out": tmp_path / "results",
        "runs": tmp_path / "runs",
        "machine": dstill.Machine(cache=tmp_path / "cache"),
        "only": ["random", "dm"],
    }
    folder = dstill.reproduce("table3", **where)
    (run,) = where["runs"].glob("*-random-*")
    for path in (run, *folder.glob("*.json")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.write_text("a file where the run would have its folder")
    dstill.reproduce("table3", **where)
    failed, other = (Entry.load(folder / f"{row}-digits-ipc1.json") for row in ("random", "dm"))
    assert failed.record.result is None and str(run) in failed.record.reason
    assert other.record.result is not None, "the others continue"
    assert f"- `random`: {failed.record.reason}" in (folder / "page.md").read_text()
    run.unlink()
    dstill.reproduce("table3", **where)
    assert Entry.load(folder / "random-digits-ipc1.json").record.result is not None


@pytest.mark.usefixtures("in_this_process", "short_protocols", "no_calibration")
def test_a_look_that_fails_leaves_the_run_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, notes = places(tmp_path) | {"only": ["dm"]}, Notes()
    with monkeypatch.context() as broken:
        broken.setattr("dstill.reproductions.run.look", lambda *_: 1 / 0)
        folder = dstill.reproduce("peeking", progress=notes, **where)
    entry = Entry.load(folder / "dm-digits-ipc1.json")
    assert entry.record.result is not None and entry.looks is None
    run = next(where["runs"].glob("*-dm-*")) / "set-0" / "distilled.safetensors"
    made = run.stat().st_mtime_ns
    monkeypatch.setattr("dstill.reproductions.run.look", lambda *_: None)
    dstill.reproduce("peeking", progress=notes, **where)
    assert sum("for 1 of 1 run(s)" in note for note in notes.notes) == 2
    assert run.stat().st_mtime_ns == made, "it is not distilled again"


@pytest.mark.usefixtures("in_this_process", "short_protocols", "no_calibration")
def test_a_later_call_adds_sets_to_those_that_are_there_also_on_another_machine(tmp_path: Path) -> None:
    where = places(tmp_path) | {"only": ["ast"]}
    del where["runs"]
    notes = Notes()
    for sets in (1, 2):
        runs = tmp_path / f"runs-{sets}"  # what another machine lacks
        folder = dstill.reproduce("fig11", sets=sets, runs=runs, progress=notes, **where)
    first, second = (Entry.load(folder / f"ast-digits-ipc1{ending}.json") for ending in ("", "-set1"))
    assert [first.set, second.set] == [0, 1]
    assert first.record.result is not None and second.record.result is not None
    assert first.record.result.accuracy != second.record.result.accuracy
    assert first.record.experts == second.record.experts, "sets share their experts"
    assert len(list((tmp_path / "runs-2").glob("*/set-*"))) == 1, "the first set is not made again"
    assert [note for note in notes.notes if "run(s)" in note][1].endswith("for 1 of 2 run(s)")
    pooled = f"(n = {first.record.result.accuracy.n + second.record.result.accuracy.n};"
    assert pooled in (folder / "page.md").read_text()

    dstill.reproduce("fig11", sets=1, seed=7, runs=tmp_path / "runs-2", **where)
    assert pooled not in (folder / "page.md").read_text(), "a set of another seed is no second set of these"
