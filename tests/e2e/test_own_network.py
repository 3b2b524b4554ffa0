"""A network from the user's own module, on the command line."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.caches import with_kernels
from tests.short import SHORT

from dstill import DistilledSet
from dstill.cli import main as cli

FAST = ["--recipe", "smoke", "--threads", "1", "--set", f"protocol={SHORT}"]


def dstill(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "DSTILL_CACHE": str(with_kernels(cwd / "cache")),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(cwd),
    }
    command = [sys.executable, "-m", "dstill", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


OWN = """
from torch import nn
class Small(nn.Module):
    def __init__(self, channels, classes, size):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * size[0] * size[1], 16), nn.Tanh(), nn.Linear(16, classes))
    def forward(self, x):
        return self.body(x)
class Normed(Small):
    def __init__(self, channels, classes, size):
        super().__init__(channels, classes, size)
        self.body.insert(2, nn.BatchNorm1d(16))
"""


def test_a_network_of_the_users_own_serves_every_stage(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    dstill("run", "digits", "--net", "mine:Small", "--networks", "1", "-o", "out", *FAST, cwd=tmp_path)
    assert DistilledSet.load(tmp_path / "out" / "set-0").net.name == "mine:Small"


def test_running_statistics_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    done = dstill("run", "digits", "--net", "mine:Normed", *FAST, cwd=tmp_path, code=2)
    assert "running statistics" in done.stderr
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["native"]


def test_a_file_does_not_decide_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(OWN + "\nopen('imported', 'a').close()\n")
    named = ["run", "digits", "--method", "random", "--net", "mine:Small", "--networks", "1", "-o", "out", *FAST]
    for _ in range(2):  # naming it for a run is consent
        dstill(*named, cwd=tmp_path)
    (tmp_path / "imported").unlink()

    def here(*words: str) -> int:
        """How a command ends in this process, which has not imported the module."""
        options = ["out/set-0", "digits", "--protocol", SHORT, "--networks", "1", "--threads", "1"]
        monkeypatch.setattr(sys, "argv", ["dstill", *words, *options])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    for command in ("evaluate", "judge"):
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            assert here(command) == 2
        assert "--nets mine:Small" in told.getvalue()
        assert not (tmp_path / "imported").exists()
    try:
        assert here("evaluate", "--no-random", "--nets", "mine:Small") == 0
        assert (tmp_path / "imported").exists()
    finally:
        sys.modules.pop("mine", None)
