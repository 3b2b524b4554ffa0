"""A network from the user's own module, on the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dstill import DistilledSet

FAST = ["--recipe", "smoke", "--threads", "1"]


def dstill(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DSTILL_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
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
    dstill("run", "digits", *FAST, "--net", "mine:Small", "--networks", "1", "-o", "out", cwd=tmp_path)
    assert DistilledSet.load(tmp_path / "out" / "set-0").net.name == "mine:Small"


def test_running_statistics_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    done = dstill("run", "digits", *FAST, "--net", "mine:Normed", cwd=tmp_path, code=2)
    assert "running statistics" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_a_file_does_not_decide_what_is_imported(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN + "\nopen('imported', 'a').close()\n")
    for _ in range(2):  # naming it for a run is consent
        dstill(
            "run", "digits", *FAST, "--method", "random", "--net", "mine:Small", "--networks", "1", "-o", "out", cwd=tmp_path
        )
    (tmp_path / "imported").unlink()
    options = ["out/set-0", "digits", "--networks", "1", "--threads", "1"]
    for command in ("evaluate", "judge"):
        done = dstill(command, *options, cwd=tmp_path, code=2)
        assert "--nets mine:Small" in done.stderr
        assert not (tmp_path / "imported").exists()
    dstill("evaluate", *options, "--nets", "mine:Small", cwd=tmp_path)
