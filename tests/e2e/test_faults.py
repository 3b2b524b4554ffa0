"""Whatever happens to a process, finished work is kept, and the same command ends with the same bits."""

from __future__ import annotations

import functools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.caches import with_kernels
from tests.short import SHORT

import dstill
from dstill import DistilledSet, DstillError
from dstill.cli import main as cli
from dstill.cli.main import machine_fault
from dstill.config.registry import METHODS
from dstill.data.real import RealSet
from dstill.support.stopping import between_steps

CHANGES = ("net.width=4", "experts.count=2")
# Kills are expensive, since a process takes three seconds to start. The rest is for `-m slow`.
QUICK = ("dm",)


def command(method: str, out: Path, *, workers: int = 1) -> list[str]:
    changes = [change for change in CHANGES if METHODS[method].needs_experts or not change.startswith("experts")]
    long = [] if METHODS[method].family == "selection" else ["distill.iterations=40"]
    options = ["--recipe", "smoke", "--networks", "1", "--threads", "1", "--checkpoint-every", "3"]
    changes = [f"protocol={SHORT}", *changes, *long]
    return ["run", "digits", "--method", method, *options, "--workers", str(workers), "-o", str(out), "--set", *changes]


def start(arguments: list[str], cache: Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "DSTILL_CACHE": str(with_kernels(cache)), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", "dstill", *arguments], env=environment, text=True, **pipes, **options)


def assert_same(one: Path, other: Path) -> None:
    a, b = (DistilledSet.load(folder / "set-0") for folder in (one, other))
    assert a.images.equal(b.images) and a.labels.equal(b.labels) and a.alpha == b.alpha
    first, second = (dstill.Result.load(folder / "result.json") for folder in (one, other))
    assert first.accuracy == second.accuracy and first.random == second.random


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(METHODS)]
)
def test_a_run_killed_again_and_again_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    """Kills at random moments: while starting, training experts, distilling, writing, evaluating."""
    begun = time.monotonic()
    whole = start(command(method, tmp_path / "whole"), tmp_path / "cache-a")
    assert whole.wait() == 0
    length, moments = time.monotonic() - begun, random.Random(method)
    for _ in range(2 if method in QUICK else 5):
        process = start(command(method, tmp_path / "out"), tmp_path / "cache-b")
        try:
            process.wait(moments.uniform(0.3, 1.0) * length)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    last = start(command(method, tmp_path / "out"), tmp_path / "cache-b")
    assert last.wait() == 0, last.communicate()[1]
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_sigterm_stores_the_state_and_the_same_command_goes_on(tmp_path: Path) -> None:
    long = "distill.iterations=150"  # takes a second or two, so that it still runs when the signal comes after two
    whole, parts = ([*command("mtt", tmp_path / name), long] for name in ("whole", "out"))
    assert start(whole, tmp_path / "cache").wait() == 0
    process = start([word if word != "3" else "0" for word in parts], tmp_path / "cache")
    metrics = tmp_path / "out" / "set-0" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    code, (_, told) = process.wait(), process.communicate()
    assert code == 143
    assert "terminated; what was stored is kept, and the same command resumes" in told
    assert (tmp_path / "out" / "set-0" / "checkpoint.safetensors").exists(), "stored although no checkpoint was due"
    assert start(parts, tmp_path / "cache").wait() == 0
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_ctrl_c_reaches_a_row_once_and_stores_its_state(tmp_path: Path) -> None:
    changes = [
        f"protocol={SHORT}",
        "net.width=4",
        "distill.iterations=10000",
    ]  # still running when the signal comes, however busy the machine
    options = ["--recipe", "smoke", "--networks", "1", "--threads", "1", "--checkpoint-every", "0"]
    words = ["compare", "digits", "--methods", "mtt", *options, "-o", str(tmp_path / "out"), "--set", *changes]
    process = start(words, tmp_path / "cache", start_new_session=True)
    folder = tmp_path / "out" / "mtt-ipc1" / "set-0"
    metrics = folder / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the command and all its child processes
    _, told = process.communicate()
    assert process.returncode == 130
    assert "interrupted; what was stored is kept, and the same command resumes" in told
    assert "Traceback" not in told
    assert (folder / "checkpoint.safetensors").exists(), "stored although no checkpoint was due"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Restores Python's own handler of Ctrl-C, which test runners may have replaced."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_signal_between_steps_waits_and_a_second_one_does_not() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), between_steps() as asked:
        assert not asked()
        signal.raise_signal(signal.SIGINT)
        done.append(asked())
    assert done == [True]
    with pytest.raises(KeyboardInterrupt), between_steps():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one is answered at once")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with between_steps() as asked:
            signal.raise_signal(signal.SIGINT)
            assert not asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_too_large_for_the_disk_is_said_and_the_run_continues_elsewhere(tmp_path: Path) -> None:
    limit = 4_000  # bytes: too little for an expert
    process = start(
        command("mtt", tmp_path / "out"),
        tmp_path / "cache",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert process.wait() == 3
    assert "the same command resumes" in process.communicate()[1]
    assert not list((tmp_path / "cache").glob("experts/*/expert-*")), "nothing half-written has the name of an expert"
    assert start(command("mtt", tmp_path / "out"), tmp_path / "cache").wait() == 0


@pytest.mark.slow
def test_too_few_files_to_open_are_said_and_the_run_continues_with_more(tmp_path: Path) -> None:
    few = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (10, 10))
    process = start(command("mtt", tmp_path / "out", workers=2), tmp_path / "cache", preexec_fn=few)
    assert process.wait() == 3
    assert "too many files are open" in process.communicate()[1]
    assert start(command("mtt", tmp_path / "out"), tmp_path / "cache").wait() == 0


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_a_disk_that_is_full_at_any_point_is_said_and_the_run_continues_with_a_larger_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=True)
    try:
        codes = []
        for size in (16, 32, 48, 64, 96, 128, 192, 256, 512, 8192):
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(disk)], check=True)
            process = start(command("mtt", disk / "out"), disk / "cache")
            _, told = process.communicate()
            codes.append(process.returncode)
            assert process.returncode in (0, 3), told
            assert process.returncode == 0 or "the disk is full" in told
        assert codes[0] == 3 and codes[-1] == 0
        assert start(command("mtt", tmp_path / "whole"), tmp_path / "cache").wait() == 0
        assert_same(disk / "out", tmp_path / "whole")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_read_only_folder_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", "/data/out")

    monkeypatch.setattr("dstill.api.run.run", refuse)
    monkeypatch.setattr(sys, "argv", ["dstill", "run", "digits", "-o", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 3
    assert "the file system is read-only (/data/out)" in capsys.readouterr().err


def test_a_pipe_that_is_closed_ends_quietly(tmp_path: Path) -> None:
    process = start(["ls", "recipes"], tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr is not None and process.stderr.read() == ""


def test_faults_of_the_machine_are_told_from_mistakes_of_the_program() -> None:
    assert machine_fault(OSError(28, "No space left on device")) == "the disk is full"
    assert machine_fault(OSError(24, "x", "a.bin")) == "too many files are open (a.bin)"
    assert str(machine_fault(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))).startswith(
        "out of memory"
    )
    assert machine_fault(RuntimeError("shape mismatch")) is None
    assert machine_fault(OSError(2, "No such file")) is None


def test_a_damaged_expert_is_set_aside_and_trained_again(tiny_real: RealSet, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"recipe": "smoke", "method": "mtt", "changes": ["net.width=4"]}
    settings["machine"] = dstill.Machine(cache=tmp_path)
    experts = dstill.train_experts(tiny_real, **settings)
    path, content = experts.paths[1], experts.paths[1].read_bytes()
    for damage in (content[:-5], b"", bytes([*content[:-9], content[-9] ^ 4, *content[-8:]])):
        path.write_bytes(damage)
        told: list[str] = []
        again = dstill.train_experts(tiny_real, progress=_Told(told), **settings)
        assert path.read_bytes() == content, "the same expert to the bit"
        assert any("set aside" in text for text in told)
        assert path.with_name(path.name + ".damaged").read_bytes() == damage
        assert len(again) == len(experts)


class _Told:
    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def note(self, text: str) -> None:
        self.texts.append(text)

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        pass


def test_check_names_the_damaged_file(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dstill.distill(tiny_real, method="random", recipe="smoke", out=tmp_path / "a")
    dstill.distill(tiny_real, method="random", recipe="smoke", out=tmp_path / "b")
    monkeypatch.setattr(sys, "argv", ["dstill", "check", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert capsys.readouterr().out.count(": whole") == 2
    path = tmp_path / "b" / "distilled.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1][:10] for line in said] == ["whole", "is damaged"]
    with pytest.raises(DstillError, match="no file of dstill"):
        from dstill.cli.check import check

        (tmp_path / "empty").mkdir()
        check([tmp_path / "empty"])
