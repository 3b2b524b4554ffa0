"""Work spread over processes gives the same results as in one, in order, and passes on reports and errors."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from dstill.errors import DstillError
from dstill.jobs.job import Workplace
from dstill.jobs.options import Machine
from dstill.support import workers
from dstill.support.workers import apart, choose_workers, cores, spread

CPU = torch.device("cpu")


def square(item: torch.Tensor, report: Callable[[int], None]) -> tuple[torch.Tensor, int, int]:
    report(int(item.sum()))
    return item * item, os.getpid(), torch.get_num_threads()


def fails_at_two(item: int, report: Callable[[int], None]) -> int:
    if item == 2:
        raise DstillError("item 2 cannot be done")
    return item


def dies_at_two(item: int, report: Callable[[int], None]) -> int:
    if item == 2:
        os._exit(1)
    return item


def asks(item: int, report: Callable[[int], None]) -> bool:
    return torch.are_deterministic_algorithms_enabled()


def test_determinism_is_asked_for_in_every_process() -> None:
    assert not apart(asks, 0)
    try:
        Workplace.of(Machine(deterministic=True))
        assert torch.are_deterministic_algorithms_enabled()
        assert apart(asks, 0)
    finally:
        torch.use_deterministic_algorithms(False)


def test_processes_return_what_one_returns_in_order_and_report() -> None:
    items = [torch.full((2,), float(i)) for i in range(5)]
    told: list[tuple[int, int]] = []
    results = spread(square, items, 2, lambda item, report: told.append((int(item[0]), report)))
    assert [result[0].tolist() for result in results] == [[i * i, i * i] for i in range(5)]
    assert sorted(told) == [(i, 2 * i) for i in range(5)]
    processes = {result[1] for result in results}
    assert len(processes) == 2
    assert os.getpid() not in processes
    assert {result[2] for result in results} == {max(1, cores() // 2)}


def test_one_worker_is_this_process() -> None:
    assert {result[1] for result in spread(square, [torch.ones(1)] * 3, 1)} == {os.getpid()}


def test_an_error_of_one_item_is_raised_here() -> None:
    with pytest.raises(DstillError, match="item 2 cannot be done"):
        spread(fails_at_two, [1, 2, 3], 2)


def test_a_process_that_dies_is_named() -> None:
    with pytest.raises(DstillError, match="a process died"):
        spread(dies_at_two, [1, 2, 3], 2)


def uses_workers(item: int, report: Callable[[int], None]) -> tuple[int, list[int]]:
    report(item)
    return os.getpid(), [result[1] for result in spread(square, [torch.ones(1)] * 2, 2)]


def test_work_apart_has_a_process_of_its_own_and_workers_in_it() -> None:
    told: list[int] = []
    process, workers = apart(uses_workers, 3, lambda item, report: told.append(report))
    assert told == [3]
    assert len({os.getpid(), process, *workers}) >= 3
    with pytest.raises(DstillError, match="item 2 cannot be done"):
        apart(fails_at_two, 2)
    with pytest.raises(DstillError, match="a process died"):
        apart(dies_at_two, 2)


UNGUARDED = """
import dstill

dstill.compare("digits", methods=["random"], recipe="smoke", networks=1, whole=False, out="out")
"""


def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(UNGUARDED)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert 'put the call under if __name__ == "__main__":' in done.stderr


class Awkward(Exception):
    """An exception that cannot be recreated from its arguments."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def fails_awkwardly(item: int, report: Callable[[int], None]) -> int:
    raise Awkward("this", "that")


def test_an_error_that_cannot_be_sent_arrives_as_its_text() -> None:
    with pytest.raises(RuntimeError, match="Awkward: this and that"):
        apart(fails_awkwardly, 1)


def test_auto_is_one_a_core_for_much_work_alone() -> None:
    assert choose_workers("auto", 100, CPU, 1000.0) == cores()
    assert choose_workers("auto", 100, CPU, 1.0) == 1
    assert choose_workers("auto", 1, CPU, 1000.0) == 1
    assert choose_workers("auto", 100, torch.device("cuda"), 1000.0) == 1
    assert choose_workers(7, 3, CPU, 0.0) == 3
    with pytest.raises(DstillError, match="at least 1"):
        choose_workers(0, 3, CPU, 0.0)


def test_all_processes_start_before_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    started, send = list[int](), workers._send

    def counted(to: Connection, content: bytes) -> None:
        started.append(len(multiprocessing.active_children()))
        send(to, content)

    monkeypatch.setattr(workers, "_send", counted)
    assert spread(fails_at_two, [0, 1], 2) == [0, 1]
    assert started[0] == 2, "a large payload is read by a process only when it has imported torch"
