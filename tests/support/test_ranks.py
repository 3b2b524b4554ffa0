"""The processes of torchrun: they find each other, take items or draws when the leader calls, and end with it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from test_crew import at_once, other
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dstill.errors import DstillError
from dstill.support import ranks
from dstill.support.crew import Group, Parcel
from dstill.support.ranks import Rank, Team, leading, serve
from dstill.support.workers import choose_workers, most_workers, spread

HOST = "127.0.0.1"
Report = Callable[[Any], None]
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE")


def environment(number: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    return dict(zip(VARIABLES, (str(number), str(size), HOST, str(port), str(number), "True"), strict=True))


def member(number: int, size: int, port: int, blind: bool = False) -> None:
    """A process that serves; a blind one does not see the folder that the others share."""
    os.environ.update(environment(number, size, port))
    if blind:
        ranks._wait_for = lambda path: False
    serve(Rank(number, size, 0))


def started(size: int, port: int, blind: bool = False) -> list[Any]:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=member, args=(n, size, port, blind), daemon=True) for n in range(1, size)]
    for process in processes:
        process.start()
    return processes


def ended(processes: list[Any]) -> list[int]:
    """How they end, if they end."""
    for process in processes:
        process.join(30)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def team(cache: Path) -> Iterator[Team]:
    """This process leads two others through the tests of this file. They end with the last one."""
    store = TCPStore(HOST, 0, None, True, wait_for_workers=False)
    processes = started(3, store.port)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(0, 3, store.port).items():
            patch.setenv(name, value)
        rank = Rank.of_environment()
        assert rank == Rank(0, 3, 0)
        with leading(rank) as found:
            found.meet_in(cache)
            yield found
    assert ended(processes) == [0, 0]
    assert list((cache / "ranks").iterdir()) == [], "nothing is left in the cache"


def test_a_process_knows_whether_torchrun_started_it_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert Rank.of_environment() is None
    for name, value in {**environment(3, 4, 1), "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert Rank.of_environment() == Rank(3, 4, 1)
    monkeypatch.delenv("LOCAL_RANK")
    assert Rank.of_environment() == Rank(3, 4, 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Rank.of_environment() is None, "alone"
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("MASTER_PORT")
    assert Rank.of_environment() is None, "another program's variables"


def test_processes_of_an_earlier_attempt_are_not_mistaken_for_living_ones() -> None:
    store = TCPStore(HOST, 0, None, True, wait_for_workers=False)
    for number in (1, 2):
        store.set(f"hello {number}", f"dead {number}")
    for attempt in ("first", "second"):  # the second finds what the first has left
        waiting, late = threading.Event(), threading.Event()

        def comes_late(late: threading.Event = late) -> str:
            late.wait()
            return ranks._welcomed(other(store), 2)

        def welcome(attempt: str = attempt, waiting: threading.Event = waiting) -> None:
            waiting.set()
            ranks._welcome_all(other(store), attempt, 3)

        def comes(waiting: threading.Event = waiting, late: threading.Event = late) -> str:
            waiting.wait()
            token = ranks._welcomed(other(store), 1)
            assert not store.check([f"{token} here 2"]), "a dead one confirms nothing"
            late.set()
            return token

        assert at_once(welcome, comes, comes_late) == [None, attempt, attempt]


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "PATIENCE", 0.2)
    store = TCPStore(HOST, 0, None, True, wait_for_workers=False)
    store.set("token here 2", "yes")
    with pytest.raises(DstillError, match=r"of 4 processes, numbers \[1, 3\] have not come within 0\.2 s"):
        ranks._welcome_all(store, "token", 4)


def test_a_process_that_does_not_see_the_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore(HOST, 0, None, True, wait_for_workers=False)
    processes = started(2, store.port, blind=True)
    for name, value in environment(0, 2, store.port).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(DstillError, match=r"process 1 on \S+ does not see \S+: pass --cache with a folder"),
        leading(Rank(0, 2, 0)) as found,
    ):
        found.meet_in(tmp_path)
    assert ended(processes) == [0]


def test_who_does_not_answer_is_named() -> None:
    store = TCPStore(HOST, 0, None, True, wait_for_workers=False)
    with pytest.raises(DstillError, match=r"process 1 has not answered for 0\.1 s: see its own output"):
        Team(store, 2)._answer("seen", "process 1", patience=0.1)


def wait_until(reached: Callable[[], bool]) -> None:
    for _ in range(3000):
        if reached():
            return
        time.sleep(0.01)
    raise AssertionError("never reached")


def works(item: int, report: Report, meeting: Path) -> tuple[int, int, int, bool]:
    """Until each process has an item, nobody goes on."""
    (meeting / str(os.getpid())).touch()
    wait_until(lambda: len(list(meeting.iterdir())) == 3)
    report(("begins", item))
    report(("ends", item))
    return item * item, os.getpid(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def test_every_item_is_done_once_and_results_are_in_order(team: Team, tmp_path: Path) -> None:
    told: list[tuple[int, Any]] = []
    torch.set_num_threads(2)
    try:
        results = spread(functools.partial(works, meeting=tmp_path), list(range(10, 20)), team, lambda *one: told.append(one))
    finally:
        torch.set_num_threads(1)
    assert [one[0] for one in results] == [item * item for item in range(10, 20)]
    assert len({one[1] for one in results}) == 3 and os.getpid() in {one[1] for one in results}
    assert {one[2:] for one in results} == {(2, False)}, "all have as many threads as the leader"
    assert sorted(told) == sorted((item, (what, item)) for item in range(10, 20) for what in ("begins", "ends"))
    for item in range(10, 20):
        assert [what for of, (what, _) in told if of == item] == ["begins", "ends"]


def fails_elsewhere(item: int, report: Report, leader: int, done: Path) -> None:
    (done / str(item)).touch()
    if os.getpid() != leader:
        raise DstillError(f"item {item} cannot be done")
    while True:  # a long piece of work, which the error of another process ends
        report(None)
        time.sleep(0.01)


def test_an_error_of_another_process_ends_the_work_of_all(team: Team, tmp_path: Path) -> None:
    with pytest.raises(DstillError, match=r"item \d+ cannot be done"):
        spread(functools.partial(fails_elsewhere, leader=os.getpid(), done=tmp_path), list(range(50)), team)
    assert len(list(tmp_path.iterdir())) <= 3, "nobody takes another item"


def fails_here(item: int, report: Report, leader: int, done: Path) -> None:
    if os.getpid() == leader:
        wait_until(lambda: len(list(done.iterdir())) == 2)
        (done / "failed").touch()
        raise LookupError("it was the leader")
    (done / str(item)).touch()
    wait_until((done / "failed").exists)
    time.sleep(0.1)  # until the leader has said so


def test_an_error_of_the_leader_ends_the_work_of_all(team: Team, tmp_path: Path) -> None:
    with pytest.raises(LookupError, match="it was the leader"):
        spread(functools.partial(fails_here, leader=os.getpid(), done=tmp_path), list(range(50)), team)
    (tmp_path / "meeting").mkdir()
    spread(functools.partial(works, meeting=tmp_path / "meeting"), [0, 1, 2, 3], team)  # all have come back
    assert len(list(tmp_path.iterdir())) == 4, "two items, `failed` and `meeting`"


def unpicklable(item: int, report: Report, leader: int, meeting: Path) -> Any:
    works(item, report, meeting)
    return item if os.getpid() == leader else lambda: None


def test_a_result_that_cannot_travel_is_an_error(team: Team, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        spread(functools.partial(unpicklable, leader=os.getpid(), meeting=tmp_path), [0, 1, 2], team)


def follows(content: str, group: Group) -> None:
    about = {"content": content, "deterministic": torch.are_deterministic_algorithms_enabled(), "size": group.size}
    group.gathered({group.number: Parcel(about, {})})
    while group.called():
        if len(group.gathered({group.number: Parcel({}, {})})) == 3:
            raise DstillError("the images have run away")


def test_draws_are_shared_again_and_again_whatever_becomes_of_a_run(team: Team, tmp_path: Path) -> None:
    for content in ("one", "two"):
        with team.together(follows, content) as group:
            found = group.gathered({})
            assert {k: one.values["content"] for k, one in found.items()} == {1: content, 2: content}
            group.call()
            assert list(group.gathered({})) == [1, 2]
    with pytest.raises(LookupError), team.together(follows, "the leader fails in the middle") as group:
        group.gathered({})
        group.call()
        raise LookupError
    with (
        pytest.raises(DstillError, match=r"\(process [12]: DstillError: the images have run away\)"),
        team.together(follows, "all fail, and this one waits for the others") as group,
    ):
        group.gathered({})
        group.call()
        group.gathered({0: Parcel({}, {})})
        group.gathered({0: Parcel({}, {})})
    torch.use_deterministic_algorithms(True)
    try:
        with team.together(follows, "three") as group:
            assert {one.values["deterministic"] for one in group.gathered({}).values()} == {True}
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_team_is_spared_little_work(team: Team) -> None:
    cpu = torch.device("cpu")
    assert choose_workers(team, 10, cpu, 1000.0) is team
    assert choose_workers(team, 10, cpu, 1.0) == choose_workers(team, 1, cpu, 1000.0) == 1
    assert most_workers(team, cpu) == most_workers(team, torch.device("cuda")) == 3


def test_what_a_killed_leader_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.pkl").touch()
        (tmp_path / f"{name}.lock").touch()
    with FileLock(tmp_path / "alive.lock"):
        ranks._remove_leftovers(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["alive", "alive.lock"]


def test_a_folder_that_comes_late_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threading.Timer(0.1, (tmp_path / "late").mkdir).start()
    assert ranks._wait_for(tmp_path / "late")
    monkeypatch.setattr(ranks, "_SETTLING", 0.1)
    assert not ranks._wait_for(tmp_path / "never")
