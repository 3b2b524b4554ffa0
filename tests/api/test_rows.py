"""Rows give the same table whoever runs them: this process, the processes of torchrun, or jobs."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.listening import Listener

import dstill
from dstill import Comparison, DstillError, Executor, Machine
from dstill.api import submitting
from dstill.api.rows import Hands, _in_job, _seeing
from dstill.api.submitting import Jobs, Piece
from dstill.artifacts import files, whitening
from dstill.artifacts.files import write_text
from dstill.config.settings import NetConfig, TrainingConfig
from dstill.data import preprocess as preprocessing
from dstill.data.real import RealSet
from dstill.experts.trained import NetworkTask, trained_network
from dstill.jobs.job import Workplace

HERE = Machine(device="cpu")
PROTOCOL = "{name: tiny, version: 1, passes: 2, batch_size: 8, momentum: 0.9, weight_decay: 5e-4, lr: 0.05, networks: 1}"


class Mates:
    """Stands for the processes of torchrun: whatever passes between them is pickled, and the last row ends first."""

    size = 2

    def spread(self, function: Callable[..., Any], items: Sequence[Any], tell: Callable[[Any, Any], None]) -> list[Any]:
        function = pickle.loads(pickle.dumps(function))
        for item in reversed(items):
            function(item, lambda told, item=item: tell(item, pickle.loads(pickle.dumps(told))))
        return []

    def together(self, follow: Any, content: Any) -> AbstractContextManager[Any]:
        raise AssertionError("a row shares no draws")


class Submitted:
    """A job of the stand-in for submitit below, done at the second look."""

    def __init__(self, number: int, piece: Piece, index: int, folder: Path) -> None:
        self.job_id, self.state, self.piece, self.index, self.looks, self.cancelled = (
            f"7_{number}",
            "OUT_OF_MEMORY",
            piece,
            index,
            0,
            False,
        )
        files = {name: folder / f"{number}_{name}" for name in ("submitted_pickle", "result_pickle", "stderr")}
        self.paths = SimpleNamespace(**files)
        self.paths.submitted_pickle.write_text("")

    def done(self) -> bool:
        self.looks += 1
        return self.looks > 1

    def result(self) -> Any:
        if self.index == 1:
            raise RuntimeError("Job 7_1 has not produced any output\nmore")
        return pickle.loads(pickle.dumps(self.piece))(self.index)

    def cancel(self, check: bool = True) -> None:
        self.cancelled = True


class Cluster:
    """Stands for submitit's executor."""

    def __init__(self, folder: Path, cluster: str) -> None:
        self.folder, self.cluster, self.jobs, self.waves = folder, cluster, list[Submitted](), list[list[int]]()
        Cluster.last = self

    last: Cluster

    def update_parameters(self, **options: Any) -> None:
        self.options = options

    def map_array(self, piece: Piece, indices: Sequence[int]) -> list[Submitted]:
        self.waves.append(list(indices))
        new = [Submitted(len(self.jobs) + k, piece, index, self.folder) for k, index in enumerate(indices)]
        self.jobs += new
        return new


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=Cluster))  # type: ignore[arg-type]
    monkeypatch.setattr(submitting, "_POLL", 0.0)


def doubled(row: int, place: Workplace) -> tuple[int, Any, Path, int, bool]:
    place.reporter.note(f"row {row}")
    place.reporter.progress("working", row, 9)
    if row == 2:
        raise DstillError("two is too much")
    return 2 * row, place.workers, place.cache, torch.get_num_threads(), place.fresh


def given(
    hands: Hands, rows: dict[str, int], folders: Sequence[Path] = (), work: Callable[..., Any] = doubled
) -> dict[str, Any]:
    found = dict[str, Any]()
    hands.give(work, rows, lambda title, outcome: found.update({title: outcome}), folders)
    return found


def test_without_help_rows_run_here_one_after_another_and_an_error_is_an_outcome() -> None:
    listener = Listener()
    place = Workplace.of(replace(HERE, workers=3), listener)
    hands = Hands.of(None, HERE, place, Path("unused"))
    found = given(hands, {"a": 1, "b": 2, "c": 3})
    assert not hands.away and list(found) == ["a", "b", "c"]
    assert found["a"] == (2, 3, place.cache, torch.get_num_threads(), False) and found["c"][0] == 6
    assert str(found["b"]) == "two is too much"
    assert listener.notes == ["row 1", "row 2", "row 3"] and ("working", 3, 9) in listener.told


def test_processes_of_torchrun_get_rows_a_place_of_their_own_and_tell_what_they_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    listener, threads = Listener(), torch.get_num_threads()
    machine = Machine(device="cpu", cache="cache", threads=threads + 1, workers=Mates())
    try:
        hands = Hands.of(None, machine, Workplace.of(machine, listener), tmp_path)
        torch.set_num_threads(threads)  # as in a process that has not resolved the machine
        found = given(hands, {"a": 1, "b": 2, "c": 3})
    finally:
        torch.set_num_threads(threads)
    assert hands.away and list(found) == ["c", "b", "a"]
    assert found["a"] == (2, 1, tmp_path / "cache", threads + 1, False)
    assert isinstance(found["b"], DstillError) and str(found["b"]) == "two is too much"
    assert listener.notes == ["c: row 3", "b: row 2", "a: row 1"]
    assert listener.told == [("rows", 0, 3), ("rows", 1, 3), ("rows", 2, 3), ("rows", 3, 3)]


def test_a_row_that_does_not_see_a_shared_folder_says_so(tmp_path: Path) -> None:
    machine = replace(HERE, workers=Mates())
    hands = Hands.of(None, machine, Workplace.of(machine, Listener()), tmp_path)
    found = given(hands, {"a": 1}, [tmp_path, tmp_path / "elsewhere"])
    assert "does not see" in str(found["a"]) and str(tmp_path / "elsewhere") in str(found["a"])
    assert _seeing([tmp_path], doubled, 4, Workplace.of(HERE, Listener()))[0] == 8


@pytest.mark.usefixtures("cluster")
def test_rows_become_jobs_and_one_that_dies_is_a_row_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listener = Listener()
    place = Workplace.of(HERE, listener)
    hands = Hands.of(Executor("slurm", {"timeout_min": 7, "slurm_partition": "gpu"}), HERE, place, tmp_path)
    found = given(hands, {"a": 1, "b": 5, "c": 3, "d": 2})
    job, jobs = Cluster.last, tmp_path / "jobs"
    assert (job.cluster, job.folder) == ("slurm", jobs)
    assert job.options == {"name": "dstill", "timeout_min": 7, "slurm_partition": "gpu"}
    assert job.waves == [[0, 1, 2, 3]], "one array"
    assert found["a"] == (2, 1, place.cache, torch.get_num_threads(), True) and found["c"][0] == 6
    assert str(found["b"]) == f"job 7_1 has ended without a result (out_of_memory): see {jobs / '1_stderr'}"
    assert str(found["d"]) == "two is too much"
    assert listener.notes == [f"submitted: 7_0, 7_1, 7_2, 7_3; logs in {jobs}"]
    assert listener.told[-1] == ("rows", 4, 4)
    assert "row 3" in capsys.readouterr().out, "the log of a job shows what it notes"
    assert list(jobs.iterdir()) == [], "nothing but logs stays"


@pytest.mark.usefixtures("cluster")
def test_jobs_of_this_machine_are_as_many_at_a_time_as_workers_and_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstill.support.workers.cores", lambda: 8)
    machine = replace(HERE, workers=2)
    hands = Hands.of("local", machine, Workplace.of(machine, Listener()), tmp_path)
    assert hands.machine.threads == 4 and Cluster.last.options["timeout_min"] > 60 * 24
    hands = replace(hands, machine=replace(hands.machine, threads=torch.get_num_threads()))
    assert [outcome[0] for title, outcome in given(hands, {"a": 1, "b": 1, "c": 3, "d": 4}).items() if title != "b"] == [
        2,
        6,
        8,
    ]
    assert Cluster.last.waves == [[0, 1], [2, 3]]
    machine = replace(HERE, workers=2, threads=torch.get_num_threads())
    assert Hands.of("local", machine, Workplace.of(machine, Listener()), tmp_path).machine.threads == torch.get_num_threads()


@pytest.mark.usefixtures("cluster")
def test_an_interruption_cancels_the_jobs_that_are_under_way(tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    jobs = Jobs("slurm", tmp_path, {"timeout_min": 1})
    tmp_path.joinpath("log").write_text("")
    with pytest.raises(KeyboardInterrupt):
        jobs.run(str, [1, 2, 3], stop)
    assert [job.cancelled for job in Cluster.last.jobs] == [False, True, True], "the first had ended"
    assert not list(tmp_path.glob("rows-*.pkl"))


def test_what_cannot_be_submitted_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Workplace.of(HERE, Listener())
    with pytest.raises(DstillError, match="unknown executor 'pbs': take one of slurm, local"):
        Hands.of("pbs", HERE, place, tmp_path)
    with pytest.raises(DstillError, match="say how many minutes a row may take"):
        Hands.of("slurm", HERE, place, tmp_path)
    with pytest.raises(DstillError, match="torchrun hands out the rows already: leave out the executor local"):
        Hands.of("local", HERE, replace(place, workers=Mates()), tmp_path)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(DstillError, match=r"submitit is not installed: pip install 'dstill\[slurm\]'"):
        Hands.of("local", HERE, place, tmp_path)


def test_a_run_in_a_job_needs_no_process_of_its_own(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("dstill.api.apart.apart", refused)
    monkeypatch.setattr(
        Hands, "give", lambda hands, work, rows, ended, _: [ended(t, _in_job(work, HERE, rows[t])) for t in rows]
    )
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    options: dict[str, Any] = {
        "recipe": "smoke",
        "protocol": str(tmp_path / "tiny.yaml"),
        "whole": False,
        "out": tmp_path / "out",
    }
    row = dstill.compare(tiny_real, methods=["random"], machine=replace(HERE, cache=tmp_path / "cache"), **options).rows[0]
    assert row.result is not None and (tmp_path / "out" / "random-ipc1" / "request.json").exists()


def same(one: Comparison, other: Comparison) -> bool:
    """Whether two tables agree in all but time and memory."""

    def plain(table: Comparison) -> Any:
        found = json.loads(table.model_dump_json())
        for row in found["rows"]:
            if row["result"]:
                for key in ("cost", "seconds", "stages"):
                    assert row["result"].pop(key)
        return found

    return bool(plain(one) == plain(other))


@pytest.mark.usefixtures("in_this_process")
def test_a_comparison_under_torchrun_is_the_same_and_is_stored_as_rows_end(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    stored: list[int] = []

    def watch(path: Path, text: str) -> None:
        write_text(path, text)
        if path.name == "compare.json":
            stored.append(len(json.loads(text)["rows"]))

    monkeypatch.setattr("dstill.api.compare.write_text", watch)

    def table(out: str, listener: Listener, **machine: Any) -> Comparison:
        options: dict[str, Any] = {"recipe": "smoke", "protocol": str(tmp_path / "tiny.yaml"), "whole": False, "ipc": (1, 21)}
        place = Machine(device="cpu", cache=tmp_path / f"cache-{out}", **machine)
        return dstill.compare(
            tiny_real, methods=["dm", "random"], out=tmp_path / out, machine=place, progress=listener, **options
        )

    listener = Listener()
    alone, shared = table("alone", Listener()), table("shared", listener, workers=Mates())
    assert [(row.method, row.ipc) for row in shared.rows] == [("dm", 1), ("random", 1), ("dm", 21), ("random", 21)]
    assert same(alone, shared) and "fewer than the 21" in shared.rows[3].reason
    assert stored == [1, 2, 3, 4] * 2
    assert Comparison.model_validate_json((tmp_path / "shared" / "compare.json").read_text()) == shared
    assert listener.have("random failed: ") and listener.have("dm-ipc1: run folder")
    again = Listener()
    assert same(table("shared", again, workers=Mates()), shared)
    assert [note for note in again.notes if "reused" in note] and not again.have("run folder: ")


@pytest.mark.usefixtures("in_this_process")
def test_a_budget_of_a_row_begins_where_the_row_does(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[float] = []

    def seen(job: Any, folder: Path, task: Any, asked: Any) -> Any:
        left.append(task.budget.left)
        monkeypatch.setattr("time.perf_counter", lambda: 1e6 * len(left))  # another machine has another clock
        raise DstillError("enough")

    monkeypatch.setattr("dstill.api.compare.run_apart", seen)
    machine = Machine(device="cpu", cache=tmp_path / "cache", workers=Mates())
    options: dict[str, Any] = {"methods": ["dm", "random"], "minutes": 4, "recipe": "smoke", "progress": False}
    dstill.compare(tiny_real, out=tmp_path / "out", machine=machine, **options)
    assert all(100 < seconds <= 120 for seconds in left) and len(left) == 2


@pytest.mark.usefixtures("in_this_process")
def test_a_reproduction_under_torchrun_writes_the_same_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def page(name: str, **machine: Any) -> str:
        place = Machine(device="cpu", cache=tmp_path / "cache", **machine)
        rows = ["random", "dm"]
        folder = dstill.reproduce("table3", only=rows, out=name, runs=f"{name}-runs", machine=place, progress=False)
        assert not folder.is_absolute() and (folder / "random-digits-ipc1.json").exists()
        entry = json.loads((folder / "random-digits-ipc1.json").read_text())
        assert entry["record"]["result"] is not None and entry["picture"]
        return (folder / "page.md").read_text()

    alone, shared = page("alone"), page("shared", workers=Mates())
    assert re.findall(r"^\| .*", alone, re.M) == re.findall(r"^\| .*", shared, re.M)
    assert re.search(r"^\| Random \| \d", alone, re.M)


def test_a_row_of_a_reproduction_whose_job_dies_keeps_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Hands, "give", lambda _, work, rows, ended, folders: [ended(title, DstillError("job 7")) for title in rows]
    )
    where: dict[str, Any] = {
        "out": tmp_path / "results",
        "runs": tmp_path / "runs",
        "machine": Machine(cache=tmp_path / "cache"),
    }
    folder = dstill.reproduce("table3", only=["random"], progress=False, **where)
    assert json.loads((folder / "random-digits-ipc1.json").read_text())["record"]["reason"] == "job 7"
    assert "job 7" in (folder / "page.md").read_text()


def test_a_process_that_is_started_works_on_the_card_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    from dstill.support import workers

    assert workers._card() is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    passed: list[Any] = []

    class Process:
        def __init__(self, target: Any, args: Any, daemon: bool) -> None:
            passed.append((target, args[-1]))
            args[0].close()

        start = terminate = join = lambda *_: None

    context = SimpleNamespace(Pipe=workers.multiprocessing.Pipe, Process=Process)
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: context)
    with pytest.raises(DstillError, match="a process died"):
        workers.apart(doubled, 0)
    assert passed == [(workers._serve, 3)]
    cards: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", cards.append)
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(workers, "raise_on_sigterm", lambda: None)
    monkeypatch.setattr(workers, "_work_on", lambda _: None)
    for card in (3, None):
        workers._serve(None, torch.get_num_threads(), False, card)  # type: ignore[arg-type]
    assert cards == [3]


def test_submitit_runs_rows_as_real_jobs(tmp_path: Path, tiny_real: RealSet) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    listener = Listener()
    machine = Machine(device="cpu", cache=tmp_path / "cache", workers=2, threads=1)
    options: dict[str, Any] = {
        "recipe": "smoke",
        "protocol": str(tmp_path / "tiny.yaml"),
        "whole": False,
        "out": tmp_path / "out",
    }
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    table = dstill.compare(
        tiny_real, methods=["random"], ipc=(1, 21), machine=machine, executor="local", progress=listener, **options
    )
    assert table.rows[0].result is not None and "fewer than the 21" in table.rows[1].reason
    logs = [path.read_text() for path in (tmp_path / "out" / "jobs").glob("*.out")]
    assert len(logs) == 2 and any("run folder" in log for log in logs) and listener.have("submitted: ")
    assert not list((tmp_path / "out" / "jobs").glob("*.pkl"))
    again = Listener()
    dstill.compare(tiny_real, methods=["random"], machine=machine, progress=again, **options)
    assert again.have("is finished: reused")


def test_a_job_that_is_ended_is_queued_again_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps((abs, [-1, -2])))
    piece = Piece(tmp_path / "rows.pkl")
    again = piece.checkpoint(1)
    assert (again.function, again.args) == (piece, (1,)) and again.result() == 2


def test_options_that_submitit_does_not_know_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="submitit is not installed")
    with pytest.raises(DstillError, match=r"submitit refuses the options of the executor: .*timeout_min"):
        Jobs("local", tmp_path, {"timeout_min": "soon"})
    with pytest.raises(DstillError, match=r"submitit refuses the options of the executor: .*speed"):
        Jobs("local", tmp_path, {"slurm_speed": 1})
    with pytest.raises(DstillError, match="srun is not found here"):
        Jobs("slurm", tmp_path, {"timeout_min": 1})


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "dstill", "compare", "digits"]


@pytest.mark.slow
def test_torchrun_shares_the_rows_of_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    options = "--methods mtt,tesla,random --ipc 1 --recipe smoke --protocol tiny.yaml --no-whole --threads 1 --cache cache"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def table(command: list[str], out: str) -> Comparison:
        subprocess.run([*command, *options.split(), "-o", out], cwd=tmp_path, env=environment, check=True, timeout=600)
        return Comparison.model_validate_json((tmp_path / out / "compare.json").read_text())

    shared = table(TORCHRUN, "shared")
    assert [row.method for row in shared.rows if row.result] == ["mtt", "tesla", "random"]
    assert same(shared, table([sys.executable, *TORCHRUN[4:]], "alone"))
    assert not list((tmp_path / "cache" / "ranks").iterdir())


def test_what_another_row_has_made_meanwhile_is_not_made_again(tiny_real: RealSet, tmp_path: Path) -> None:
    """Both random images and trained networks; the other row is a thread that holds the lock."""
    from dstill.api.evaluate import _cached
    from dstill.artifacts.result import Score

    path, score, made = tmp_path / "random" / "x.json", Score.of([[0.5, 0.7]]), list[str]()

    def measure() -> Score:
        made.append("measured")
        return score

    with files.alone(path):
        waiting = threading.Thread(target=lambda: made.append(str(_cached(path, measure))))
        waiting.start()
        waiting.join(0.2)
        assert made == []
        write_text(path, score.model_dump_json())
    waiting.join()
    assert made == [str(score)]
    assert _cached(tmp_path / "random" / "y.json", measure) == score and made[-1] == "measured"

    net = NetConfig(width=4, depth=1)
    preprocess = preprocessing.fit("standardise", tiny_real.train.images)
    task = NetworkTask(tiny_real, preprocess, net, TrainingConfig(epochs=1), 0)
    device, epochs = torch.device("cpu"), list[int]()
    first = trained_network(task, tmp_path / "first", device)
    name = f"{task.fingerprint()}.safetensors"
    with files.alone(tmp_path / "second" / name):
        observe: Any = lambda report: epochs.append(report.epochs_done)  # noqa: E731
        waiting = threading.Thread(target=trained_network, args=(task, tmp_path / "second", device, observe))
        waiting.start()
        waiting.join(0.2)
        shutil.copy(tmp_path / "first" / name, tmp_path / "second" / name)
    waiting.join()
    assert epochs == [] and [path.name for path in (tmp_path / "second").iterdir()] == [name]
    assert torch.equal(trained_network(task, tmp_path / "second", device).weights, first.weights)

    zca = whitening.fitted("zca", tiny_real, tmp_path / "first")
    name = f"preprocess/{whitening.file_name(tiny_real.fingerprint)}"
    notes = Listener()
    with files.alone(tmp_path / "second" / name):
        waiting = threading.Thread(target=whitening.fitted, args=("zca", tiny_real, tmp_path / "second", notes))
        waiting.start()
        waiting.join(0.2)
        shutil.copy(tmp_path / "first" / name, tmp_path / "second" / name)
    waiting.join()
    assert not notes.stages, "no whitening is fitted twice"
    pixels = tiny_real.test.images.float() / 255
    assert torch.equal(whitening.fitted("zca", tiny_real, tmp_path / "second").forward(pixels), zca.forward(pixels))
