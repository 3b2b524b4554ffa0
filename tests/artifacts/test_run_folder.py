"""A run folder keeps finished work and drops unfinished work."""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from dstill.artifacts.run_folder import RunFolder
from dstill.distillation.loop import _Due
from dstill.errors import DstillError

IDENTITY = {"recipe": {"distill": {"iterations": 5, "lr_images": 100.0}, "method": "ast"}, "seed": 0}


def claimed(path: Path, identity: Mapping[str, Any] = IDENTITY) -> RunFolder:
    """The folder after a first process has used it."""
    folder = RunFolder(path, identity)
    with folder.locked():
        return folder


def folder_with_rows(path: Path, count: int) -> RunFolder:
    folder = claimed(path)
    for iteration in range(count):
        folder.log({"iteration": iteration, "loss": iteration / 3})
    return folder


def test_metrics_are_read_back_exactly_by_another_process(tmp_path: Path) -> None:
    folder_with_rows(tmp_path, 4)
    assert RunFolder(tmp_path, IDENTITY).metrics() == [{"iteration": i, "loss": i / 3} for i in range(4)]


def test_a_folder_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "new" / "folder", IDENTITY).metrics() == []


def test_a_half_written_last_line_is_dropped(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path, 3)
    with folder.metrics_path.open("a") as file:
        file.write('{"iteration": 3, "lo')
    assert [row["iteration"] for row in folder.metrics()] == [0, 1, 2]


def test_metrics_continue_cleanly_after_a_half_written_line(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path, 3)
    folder.checkpoint(2, {"x": torch.zeros(2)})
    with folder.metrics_path.open("a") as file:
        file.write('{"iteration": 3, "lo')
    folder.restore()
    folder.log({"iteration": 2, "loss": 9.0})
    assert [(row["iteration"], row["loss"]) for row in folder.metrics()] == [(0, 0.0), (1, 1 / 3), (2, 9.0)]


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    state = {
        "images": torch.randn(3, 2, 4, 4),
        "alpha": torch.tensor(0.012345678),
        "skipped": torch.tensor(7),
        "half": torch.randn(5).bfloat16(),
    }
    folder_with_rows(tmp_path, 5).checkpoint(5, state)
    restored = RunFolder(tmp_path, IDENTITY).restore()
    assert restored is not None
    assert restored[0] == 5
    assert restored[1].keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(restored[1][name], tensor)
        assert restored[1][name].dtype == tensor.dtype


def test_restoring_drops_the_metrics_logged_after_the_checkpoint(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path, 5)
    folder.checkpoint(3, {"x": torch.zeros(2)})
    folder.restore()
    assert [row["iteration"] for row in folder.metrics()] == [0, 1, 2]


def test_without_a_checkpoint_a_run_starts_over_with_empty_metrics(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path, 5)
    assert folder.restore() is None
    assert folder.metrics() == []


def test_the_latest_checkpoint_counts(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path, 5)
    folder.checkpoint(2, {"x": torch.tensor([2.0])})
    folder.checkpoint(4, {"x": torch.tensor([4.0])})
    restored = folder.restore()
    assert restored is not None
    assert (restored[0], float(restored[1]["x"])) == (4, 4.0)


def test_a_finished_run_keeps_its_metrics_and_no_checkpoint(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path, 2)
    for iteration in (1, 2):
        folder.checkpoint(iteration, {"x": torch.zeros(2)})
    folder.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "settings.json"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    notes: list[str] = []
    folder_with_rows(tmp_path, 6)
    folder = RunFolder(tmp_path, IDENTITY, notes.append)
    for iteration in (2, 4, 5):
        folder.checkpoint(iteration, {"x": torch.full((200,), float(iteration))})
    flip(folder.checkpoint_path)
    restored = folder.restore()
    assert restored is not None and restored[0] == 4 and restored[1]["x"].eq(4).all()
    assert len(folder.metrics()) == 4
    assert len(notes) == 1 and "checkpoint.safetensors is damaged" in notes[0]


def test_the_checkpoint_that_a_run_fell_back_to_outlives_a_failed_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with_rows(tmp_path, 6)
    for iteration in (2, 4):
        folder.checkpoint(iteration, {"x": torch.full((200,), float(iteration))})
    flip(folder.checkpoint_path)
    assert folder.restore() is not None

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
        patched.setattr("dstill.artifacts.run_folder.files.save", full)
        folder.checkpoint(3, {"x": torch.full((200,), 3.0)})
    restored = folder.restore()
    assert restored is not None and restored[0] == 2 and restored[1]["x"].eq(2).all()


def test_where_no_checkpoint_is_whole_the_files_are_named(tmp_path: Path) -> None:
    folder = folder_with_rows(tmp_path, 2)
    for iteration in (1, 2):
        folder.checkpoint(iteration, {"x": torch.zeros(200)})
    flip(folder.checkpoint_path)
    folder.earlier_path.write_bytes(b"")
    with pytest.raises(DstillError, match=r"checkpoint\.safetensors and checkpoint-before\.safetensors in .* are damaged"):
        folder.restore()


def _write_for_ever(path: Path) -> None:
    folder = RunFolder(path, {})
    with folder.locked():
        found = folder.restore()
        begin = found[0] if found else 0
        for iteration in range(begin, 10**9):
            folder.log({"iteration": iteration})
            folder.checkpoint(iteration + 1, {"x": torch.full((50_000,), float(iteration + 1))})


def _written(path: Path) -> int:
    """When the last checkpoint was written; 0 if there is none, or while it is replaced."""
    try:
        return (path / "checkpoint.safetensors").stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def test_a_writer_killed_at_any_moment_leaves_a_whole_state(tmp_path: Path) -> None:
    """Twenty kills of a process that only logs and writes checkpoints."""
    reached, moments = 0, random.Random(0)
    for _ in range(20):
        writer = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(tmp_path,))
        writer.start()
        begun = _written(tmp_path)
        while _written(tmp_path) in (0, begun):
            time.sleep(0.001)  # until it has written a checkpoint, however busy the machine is
        writer.join(moments.uniform(0, 0.05))
        writer.kill()
        writer.join()
        folder = RunFolder(tmp_path, {})
        with folder.locked():
            found = folder.restore()
        assert found is not None
        iteration, state = found
        assert iteration >= reached
        assert state["x"].equal(torch.full((50_000,), float(iteration)))
        assert [row["iteration"] for row in folder.metrics()] == list(range(iteration))
        assert not list(tmp_path.glob(".*.part"))
        reached = iteration
    assert reached >= 20


def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, IDENTITY)
    code = f"""
import pathlib, time
from dstill.artifacts.run_folder import RunFolder
with RunFolder(pathlib.Path({str(tmp_path)!r}), {IDENTITY!r}).locked():
    print("held", flush=True)
    time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(DstillError, match="another process works in"), folder.locked():
        pass
    other.kill()
    other.wait()
    with folder.locked():
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.json"]


def test_other_settings_are_refused_and_the_difference_is_named(tmp_path: Path) -> None:
    folder_with_rows(tmp_path, 2)
    other = {"recipe": {"distill": {"iterations": 6, "lr_images": 100.0}, "method": "ast"}, "seed": 1}
    with pytest.raises(DstillError) as caught:
        claimed(tmp_path, other)
    assert "recipe.distill.iterations: 5 there, 6 now" in str(caught.value)
    assert "seed: 0 there, 1 now" in str(caught.value)
    assert "lr_images" not in str(caught.value)
    assert len(RunFolder(tmp_path, IDENTITY).metrics()) == 2


def test_a_setting_that_one_side_lacks_is_a_difference(tmp_path: Path) -> None:
    claimed(tmp_path)
    with pytest.raises(DstillError, match="experts: None there, abc now"):
        claimed(tmp_path, {**IDENTITY, "experts": "abc"})


def test_of_two_runs_that_found_the_folder_empty_the_first_to_work_there_owns_it(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path, IDENTITY), RunFolder(tmp_path, {**IDENTITY, "seed": 1})
    with first.locked():
        first.checkpoint(1, {"x": torch.zeros(2)})
    with pytest.raises(DstillError, match="seed: 0 there, 1 now"), second.locked():
        pass
    assert json.loads((tmp_path / "settings.json").read_text()) == IDENTITY


def test_settings_are_compared_as_json_so_that_tuples_equal_lists(tmp_path: Path) -> None:
    claimed(tmp_path, {"names": ("a", "b")})
    assert claimed(tmp_path, {"names": ["a", "b"]}).identity == {"names": ["a", "b"]}
    assert json.loads((tmp_path / "settings.json").read_text()) == {"names": ["a", "b"]}


def test_a_settings_file_of_another_program_is_refused_by_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("theme = dark\n")
    with pytest.raises(DstillError, match="was not written by dstill"):
        claimed(tmp_path)
    assert (tmp_path / "settings.json").read_text() == "theme = dark\n"


def test_a_folder_that_cannot_be_made_is_refused_by_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DstillError, match="cannot be made"):
        RunFolder(tmp_path / "file" / "run", IDENTITY)


def test_the_state_is_stored_by_iterations_by_the_minute_and_never_too_dearly(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dstill.distillation.loop.time.perf_counter", lambda: now[0])
    due = _Due(10)
    assert [due(done) for done in (9, 10, 11, 20)] == [False, True, False, True]
    now[0] = 61.0
    assert due(11), "slow iterations"
    due.stored(4.0)  # seconds, so that the next one is due 80 seconds later
    now[0] = 61.0 + 79.0
    assert not due(20)
    now[0] = 61.0 + 81.0
    assert due(21)
    never = _Due(0)
    now[0] = 1e6
    assert not never(10)
