"""torchrun changes how fast a command is, not what it does: the same sets, whatever happens to its processes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.caches import with_kernels
from tests.short import SHORT

import dstill
from dstill import DistilledSet

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
DSTILL = (sys.executable, "-m", "dstill")
SMOKE = ("digits", "--method", "dm", "--recipe", "smoke", "--networks", "1", "--threads", "1", "--workers", "1")


def run_into(out: Path, iterations: int, *, draws: int = 2) -> list[str]:
    changes = ["--set", f"protocol={SHORT}", "net.width=4", f"distill.draws={draws}", f"distill.iterations={iterations}"]
    return ["run", *SMOKE, "--checkpoint-every", "3", "-o", str(out), *changes]


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Ends what a failed test has left running; torchrun then ends its own processes."""
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.terminate()
            process.communicate()


def start(words: Sequence[str], cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "DSTILL_CACHE": str(with_kernels(cache)), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    STARTED.append(subprocess.Popen(words, env=environment, text=True, **pipes))  # type: ignore[call-overload]
    return STARTED[-1]


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """How a command ends; it does not hang."""
    try:
        out, err = process.communicate(timeout=1800)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def torchrun(*options: str, cache: Path, command: Sequence[str]) -> subprocess.Popen[str]:
    return start([*TORCHRUN, "--standalone", "--nproc-per-node=2", *options, "-m", "dstill", *command], cache)


def alone(command: Sequence[str], cache: Path) -> tuple[int, str, str]:
    return finished(start([*DSTILL, *command], cache))


def assert_same(one: Path, other: Path) -> None:
    a, b = (DistilledSet.load(folder / "set-0") for folder in (one, other))
    assert a.images.equal(b.images) and a.labels.equal(b.labels)
    first, second = (dstill.Result.load(folder / "result.json") for folder in (one, other))
    assert first.accuracy == second.accuracy and first.random == second.random


def steps(out: Path) -> int:
    metrics = out / "set-0" / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not reached():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def ranks(process: subprocess.Popen[str]) -> dict[int, int]:
    """The living processes of torchrun, by their rank."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                found |= {int(line[5:]): int(child) for line in lines if line.startswith(b"RANK=")}
    return found


def test_two_processes_make_the_set_of_one_and_only_the_first_one_speaks(tmp_path: Path) -> None:
    code, printed, said = alone(run_into(tmp_path / "one", 5), tmp_path / "cache-a")
    assert code == 0, said
    code, also_printed, also_said = finished(torchrun(cache=tmp_path / "cache-b", command=run_into(tmp_path / "two", 5)))
    assert code == 0, also_said
    name = "set-0/distilled.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert_same(tmp_path / "one", tmp_path / "two")
    assert printed.count("\n") == also_printed.count("\n") > 0
    assert said.count("distilling on") == also_said.count("distilling on") == 1
    assert list((tmp_path / "cache-b" / "ranks").iterdir()) == []


@pytest.mark.slow
def test_what_needs_no_work_ends_and_so_does_a_mistake(tmp_path: Path) -> None:
    code, printed, said = finished(torchrun(cache=tmp_path, command=["ls", "methods"]))
    assert code == 0 and [line.split()[0] for line in printed.splitlines() if line].count("rat-bptt") == 1, said
    code, printed, said = finished(torchrun(cache=tmp_path, command=["run", "digits", "--method", "dmm"]))
    assert code != 0 and printed == ""
    assert said.count("dstill: unknown method 'dmm'") == 1, said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_killed_in_the_middle_changes_no_bit(rank: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = torchrun("--max-restarts=3", cache=tmp_path / "cache", command=run_into(out, 100))
    wait_until(lambda: steps(out) >= 5, process)
    os.kill(ranks(process)[rank], signal.SIGKILL)
    code, _, said = finished(process)
    assert code == 0 and (out / "result.json").exists(), said
    assert said.count("distilling on") == 2, "it was started again"
    assert list((tmp_path / "cache" / "ranks").iterdir()) == [], "what the killed leader left is removed"
    assert alone(run_into(tmp_path / "whole", 100), tmp_path / "cache")[0] == 0
    assert_same(out, tmp_path / "whole")


KILLS = int(os.environ.get("DSTILL_TEST_KILLS", "50"))


@pytest.mark.slow
def test_a_run_survives_fifty_kills(tmp_path: Path) -> None:
    """Of any process, while it starts or at any step."""
    out, moments, iterations = tmp_path / "out", random.Random(0), 40 * KILLS
    command = run_into(out, iterations)
    process = torchrun(f"--max-restarts={2 * KILLS}", cache=tmp_path / "cache", command=command)
    for _ in range(KILLS):
        wait_until(lambda: len(ranks(process)) == 2, process)
        if moments.random() < 0.3:
            time.sleep(moments.uniform(0.0, 3.0))
        else:
            goal = steps(out) + moments.randrange(1, 5)
            wait_until(lambda goal=goal: steps(out) >= goal, process)  # type: ignore[misc]
        wait_until(lambda: len(ranks(process)) > 0, process)
        victim = moments.choice(sorted(ranks(process).values()))
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda victim=victim: victim not in ranks(process).values(), process)  # type: ignore[misc]
    code, _, said = finished(process)
    assert code == 0, said
    assert alone(run_into(tmp_path / "whole", iterations), tmp_path / "cache")[0] == 0
    assert_same(out, tmp_path / "whole")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """Two network namespaces on one bridge, and their addresses. To this test they are two machines."""
    tag = f"{os.getpid() % 100000:x}"
    bridge, places = f"dsb{tag}", {f"dstill-{tag}-{n}": f"10.213.7.{n}" for n in (1, 2)}
    try:
        try:
            ip("link", "add", bridge, "type", "bridge")
            ip("link", "set", bridge, "up")
            for n, (place, address) in enumerate(places.items(), 1):
                ip("netns", "add", place)
                ip("link", "add", f"dso{tag}{n}", "type", "veth", "peer", "name", "eth0", "netns", place)
                ip("link", "set", f"dso{tag}{n}", "master", bridge, "up")
                ip("-n", place, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", place, "link", "set", "eth0", "up")
                ip("-n", place, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine makes no network namespaces: {error}")
        yield places
    finally:
        for place in places:
            subprocess.run(["ip", "netns", "del", place], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)


@pytest.mark.slow
def test_a_machine_that_is_cut_off_and_comes_back_changes_no_bit(machines: dict[str, str], tmp_path: Path) -> None:
    (first, leads), (second, _) = machines.items()
    out, iterations = tmp_path / "out", 300
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={leads}:29400", "--rdzv-id=dstill", "--max-restarts=20"]

    def joined(place: str) -> subprocess.Popen[str]:
        words = [*TORCHRUN, "--nnodes=1:2", "--nproc-per-node=1", *meeting, f"--local-addr={machines[place]}"]
        words += [f"--rdzv-conf=is_host={int(place == first)}"]  # torchrun goes by the name of the machine, which both share
        return start(["ip", "netns", "exec", place, *words, "-m", "dstill", *run_into(out, iterations)], tmp_path / "cache")

    one, two = joined(first), joined(second)
    wait_until(lambda: steps(out) >= 20, one)
    assert ranks(one).keys() | ranks(two).keys() == {0, 1}, "both take part"
    ip("-n", second, "link", "set", "eth0", "down")
    time.sleep(10)
    ip("-n", second, "link", "set", "eth0", "up")
    code, _, said = finished(one)
    assert code == 0, said
    two.terminate()
    finished(two)
    assert alone(run_into(tmp_path / "whole", iterations), tmp_path / "cache")[0] == 0
    assert_same(out, tmp_path / "whole")
