"""Processes that are started for a run share its draws, have their part of the cores, and never outlive it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dstill.errors import DstillError
from dstill.support import mates
from dstill.support.crew import ALONE, Group, Parcel
from dstill.support.devices import ask_for_determinism
from dstill.support.mates import together


def tells(content: Any, group: Group) -> None:
    """Says what this process is like, once for every call."""
    about = {
        "process": os.getpid(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "ignores": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "content": content,
    }
    group.gathered({group.number: Parcel(about, {})})
    while group.called():
        group.gathered({group.number: Parcel(about, {})})


def fails(content: Any, group: Group) -> None:
    raise KeyError(content)


class Exits:
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return os._exit, (3,)


def ended(process: int) -> bool:
    """Whether a process is gone, or waits to be buried by its parent. Waits a while for it."""
    for _ in range(600):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_mates_have_their_share_of_the_cores_and_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mates, "threads_each", lambda size: 4 - size)
    torch.set_num_threads(3)
    try:
        ask_for_determinism()
        with together(tells, "the content", 2, 2) as group:
            assert torch.get_num_threads() == 2
            (about,) = (parcel.values for parcel in group.gathered({}).values())
            for _ in range(2):
                group.call()
                assert group.gathered({})[1].values == about
        assert torch.get_num_threads() == 3
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)
    process = about.pop("process")
    assert about == {"threads": 2, "deterministic": True, "ignores": True, "content": "the content"}
    assert process != os.getpid() and not Path(f"/proc/{process}").exists()


def test_mates_end_with_a_block_that_raises_even_those_that_wait_for_a_draw() -> None:
    threads, seen = torch.get_num_threads(), list[int]()
    with pytest.raises(LookupError, match="enough"), together(tells, None, 3, 3) as group:
        seen += [parcel.values["process"] for parcel in group.gathered({}).values()]
        group.call()
        raise LookupError("enough")
    assert len(set(seen)) == 2 and not any(Path(f"/proc/{process}").exists() for process in seen)
    assert torch.get_num_threads() == threads


def test_a_mate_that_fails_is_heard() -> None:
    with pytest.raises(DstillError, match=r"\(process 1: KeyError: 'x'\)"), together(fails, "x", 2, "auto") as group:
        group.gathered({})


def test_a_mate_that_dies_while_it_starts_is_missed() -> None:
    threads = torch.get_num_threads()
    with (
        pytest.raises(DstillError, match="a process died while it started, perhaps for lack of memory: try fewer --workers"),
        together(tells, Exits(), 2, 2),
    ):
        raise AssertionError("not reached")
    assert torch.get_num_threads() == threads


def test_one_process_is_this_one() -> None:
    with together(tells, None, 1, 8) as group:
        assert group is ALONE


class Team:
    size = 5

    @contextlib.contextmanager
    def together(self, follow: Any, content: Any) -> Any:
        yield follow, content


def test_a_team_takes_part_as_a_whole() -> None:
    with together(tells, "c", 2, Team()) as group:  # type: ignore[arg-type]
        assert group == (tells, "c")


LEADS = """
import time
from test_mates import tells
from dstill.support.mates import together

if __name__ == "__main__":
    with together(tells, None, 2, 2) as group:
        print(group.gathered({})[1].values["process"], flush=True)
        group.call()  # the mate then waits for a draw
        time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_mates_end_with_their_leader_however_it_ends(number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "leads.py"
    script.write_text(LEADS)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    leader = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert leader.stdout is not None
    mate = int(leader.stdout.readline())
    if number == signal.SIGINT:  # Ctrl-C reaches all processes of the terminal
        os.killpg(leader.pid, number)
    else:
        leader.send_signal(number)
    assert ended(mate)
    said = leader.communicate(timeout=60)[1]
    assert leader.returncode == -number
    assert said.count("Traceback") == (1 if number == signal.SIGINT else 0), "only the leader says that it was interrupted"
