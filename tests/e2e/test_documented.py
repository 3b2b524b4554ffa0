"""Every command of the README and of the how-to pages runs, at smoke size, on the digits."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.short import SHORT

import dstill
from dstill.cli import main as cli
from dstill.nets.networks import build
from dstill.unrolling.student import Student

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "reproducing.md", *sorted((ROOT / "docs" / "howto").glob("*.md"))]
REAL = {"cifar10", "path/to/folder", "path/to/photos", "data/cifar10-*.parquet"}

pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")


def documented(page: Path) -> list[list[str]]:
    """Tokens after `dstill` of each command in the page's `sh` and `console` blocks."""
    found = []
    for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            tokens = shlex.split(line.removeprefix("$ "), comments=True)
            if tokens[:1] == ["dstill"] and tokens[1] != "push":  # needs a hub: tests/artifacts/test_hub.py
                found.append(tokens[1:])
    return found


def small(tokens: list[str]) -> list[str]:
    """The same command on the digits, at smoke size."""
    command, *rest = ["digits" if token in REAL else token for token in tokens]
    joined = " ".join(rest)
    joined = re.sub(r"--nets \S+|--networks \S+|--protocol \S+|--recipe \S+|--source \S+", "", joined)
    joined = joined.replace("--scale cpu", "--scale smoke --only base").replace("--budget 60", "--budget 0.02")
    joined = joined.replace("--executor slurm", "--executor local").replace("gpus_per_node=1", "gpus_per_node=0")
    joined = re.sub(r"distill.iterations=\d+", "distill.iterations=3", joined)
    extra = {
        "run": "--recipe smoke --networks 1",
        "compare": f"--recipe smoke --networks 1 --protocol {SHORT} --no-whole",
        "distill": "--recipe smoke",
        "train-experts": "--recipe smoke",
        "tune": "--recipe smoke",
        "evaluate": f"--protocol {SHORT} --networks 1",
        "judge": f"--protocol {SHORT} --networks 1 --no-whole",
        "leaderboard": f"--protocol {SHORT} --networks 1",
        "reproduce": "" if "--only" in joined else "--only base",  # tests/e2e/test_reproduce.py runs every row
    }
    plain, _, changes = joined.partition("--set")  # --set takes everything after it, so further options come first
    elsewhere = "-o changed" + re.sub(r"\W+", "-", changes) if changes and "-o" not in plain else ""
    changes += f" protocol={SHORT}" if command == "run" else ""
    changed = f"--set {changes}" if changes else ""
    return [command, *shlex.split(f"{plain} {extra.get(command, '')} {elsewhere} {changed}")]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs and foreign files that the pages mention."""
    folder = tmp_path_factory.mktemp("documented")
    real = dstill.load_real("digits")
    for method in ("ast", "mtt", "frepo"):
        out = folder / "runs" / f"digits-{method}-ipc1-seed0"
        dstill.run(
            real,
            method=method,
            recipe="smoke",
            changes={"protocol": SHORT},
            out=out,
            evaluation=dstill.Evaluation(networks=1),
            machine=dstill.Machine(cache=folder / "cache"),
        )
    one = dstill.DistilledSet.load(folder / "runs" / "digits-mtt-ipc1-seed0" / "set-0")
    one.export("pt", folder)
    experts = dstill.train_experts(real, method="mtt", recipe="smoke", machine=dstill.Machine(cache=folder / "cache"))
    student = Student(build(one.net, 1, 10, (8, 8), torch.Generator()))
    buffer = [[[p.clone() for p in student.split(row)] for row in experts.rows(k, 0, experts.epochs + 1)] for k in range(2)]
    (folder / "buffers").mkdir()
    torch.save(buffer, folder / "buffers" / "replay_buffer_0.pt")
    return folder


COMMANDS = [(page.stem, tokens) for page in PAGES for tokens in documented(page)]


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) == 52
    assert {"run", "judge", "export", "import", "plan", "report", "reproduce", "compare"} <= {c[0] for _, c in COMMANDS}


@pytest.mark.usefixtures("in_this_process", "no_calibration")
@pytest.mark.parametrize("page", [page.stem for page in PAGES])
def test_the_commands_of_a_page_run_one_after_another(page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("DSTILL_CACHE", str(workplace / "cache"))
    for where, tokens in COMMANDS:
        if where != page or ("--executor" in tokens and find_spec("submitit") is None):
            continue
        monkeypatch.setattr(sys, "argv", ["dstill", *small(tokens)])
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, f"{small(tokens)} of {page} ended with {stop.code}"


def test_the_python_of_the_readme_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("DSTILL_CACHE", str(workplace / "cache"))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("ipc=1", 'recipe="smoke"').replace("range(1000)", "range(100)")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert 0.3 < float(names["accuracy"]) <= 1
    assert (workplace / "out" / "distilled.safetensors").exists()
