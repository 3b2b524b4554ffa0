"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dstill import DistilledSet, load_recipe
from dstill.cli import app
from dstill.methods import METHODS

ROOT = Path(__file__).parents[2]
FAST = ["--recipe", "smoke", "--threads", "1"]


def dstill(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "DSTILL_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    command = [sys.executable, "-m", "dstill.cli", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    dstill("run", "digits", *FAST, "--sets", "2", "-o", "out", cwd=folder)
    return folder


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], *(["ls", k, "--json"] for k in ("methods", "recipes"))])
def test_help_and_lists_do_not_import_torch(arguments: list[str]) -> None:
    code = f"import sys; sys.argv = ['dstill', *{arguments!r}]\nfrom dstill.cli import main\ntry:\n main()\n"
    code += "except SystemExit:\n pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("kind", ["methods", "networks", "datasets", "recipes", "protocols"])
def test_every_list_is_json_of_named_objects(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    app(["ls", kind, "--json"], result_action="return_value")
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["name"] for row in rows)


def test_a_run_leaves_what_other_tools_rely_on(finished: Path) -> None:
    result = json.loads((finished / "out" / "result.json").read_text())
    assert (result["method"], result["ipc"]) == ("ast", 1)
    assert set(result["protocol"]) == {"name", "version"}
    for row in ("accuracy", "random"):
        assert 0 <= result[row]["mean"] <= 1
        assert {"mean", "std", "n"} <= set(result[row])
    assert isinstance(result["seconds"], float)
    for k in range(2):
        names = {path.name for path in (finished / "out" / f"set-{k}").iterdir()}
        assert {"distilled.safetensors", "distilled.png", "metrics.jsonl", "curves.png", "recipe.yaml"} <= names
        assert "checkpoint.safetensors" not in names
    assert DistilledSet.load(finished / "out" / "set-1").accuracy is not None


def test_the_table_is_printed_and_progress_is_plain_lines_when_not_on_a_terminal(tmp_path: Path) -> None:
    done = dstill("run", "digits", *FAST, "--networks", "1", "-o", "out", cwd=tmp_path)
    assert "random real images" in done.stdout
    assert "distilling 5/5" in done.stderr
    assert "\r" not in done.stderr + done.stdout
    quiet = dstill("run", "digits", *FAST, "--networks", "1", "-o", "out", "--quiet", cwd=tmp_path)
    assert quiet.stderr == ""
    assert "random real images" in quiet.stdout


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs(method: str, tmp_path: Path) -> None:
    dstill(
        "distill", "digits", *FAST, "--method", method, "--set", "distill.iterations=2", "-o", "out", cwd=tmp_path
    ) if METHODS[method].needs_experts else dstill("distill", "digits", *FAST, "--method", method, "-o", "out", cwd=tmp_path)
    assert DistilledSet.load(tmp_path / "out").method == method


def test_show_and_evaluate_take_what_run_wrote(finished: Path) -> None:
    assert "ast on digits" in dstill("show", "out", "--png", "x.png", cwd=finished).stdout
    assert (finished / "x.png").stat().st_size > 0
    experts = next((finished / "cache" / "experts").iterdir())
    assert "Avg_Var" in dstill("show", str(experts), cwd=finished).stdout
    done = dstill("evaluate", "out/set-0", "digits", "--no-random", "--networks", "1", "-o", "again", cwd=finished)
    assert "test accuracy" in done.stdout
    assert (finished / "again" / "result.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "digots"], "did you mean digits"),
        (["run", "digits", "--method", "atm"], "unknown method"),
        (["run", "digits", "--recipe", "cifar10/ast-ipc2"], "unknown recipe"),
        (["run", "digits", "--net", "convnot"], "did you mean convnet"),
        (["run", "digits", "--classes", "1,eleven"], "has no class 'eleven'"),
        (["run", "digits", "--ipc", "500"], "fewer than the 500 images per class"),
        (["run", "digits", "--device", "tpu"], "unknown device"),
        (["run", "digits", "--set", "distill.iteration=3"], "did you mean iterations"),
        (["evaluate", "nowhere", "digits"], "does not exist"),
        (["show", "nowhere"], "does not exist"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence_and_code_2(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = dstill(*arguments, cwd=tmp_path, code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dstill: ")
    assert sentence in last
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in dstill("run", "digots", "--debug", cwd=tmp_path, code=1).stderr


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


def test_tune_writes_a_recipe_that_run_takes(tmp_path: Path) -> None:
    arguments = ["tune", "digits", *FAST, "--budget", "0.01", "-o", "best.yaml"]
    dstill(*arguments, cwd=tmp_path)
    assert "validation part" in load_recipe(str(tmp_path / "best.yaml")).note


def test_every_command_of_the_readme_parses() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    commands = [line.split("  #")[0] for block in blocks for line in block.splitlines() if line.startswith("dstill ")]
    assert len(commands) >= 8
    for command in commands:
        app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
