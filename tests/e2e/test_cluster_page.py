"""The Slurm scripts of the page on clusters: their syntax, their options, and their commands, at smoke size."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "cluster.md"
SCRIPTS = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)
COUNT = r"\d+"
# What sbatch takes, by its manual. The value of an option is checked against the pattern.
OPTIONS = {
    "--array": r"\d+-\d+(%\d+)?",
    "--cpus-per-task": COUNT,
    "--gpus-per-node": COUNT,
    "--job-name": r"\w+",
    "--mem": r"\d+[KMGT]?",
    "--nodes": COUNT,
    "--ntasks-per-node": COUNT,
    "--output": r"(%[xjAa]|[\w.-])+",
    "--partition": r"\w+",
    "--time": r"(\d+-)?\d{2}:\d{2}:\d{2}",
}
# Stand-ins for what only a cluster has.
SLURM = f"""
srun() {{ "$@"; }}
scontrol() {{ [ "$1 $2" = "show hostnames" ] && echo "$3"; }}
torchrun() {{ {shlex.quote(sys.executable)} -m torch.distributed.run "$@"; }}
dstill() {{ {shlex.quote(sys.executable)} -m dstill "$@"; }}
"""


def directives(script: str) -> dict[str, str]:
    """The options of a script, as sbatch reads them: from the lines before the first command."""
    head = script[: script.index("set -e")]
    lines = [line for line in head.splitlines() if line.startswith("#SBATCH ")]
    assert len(lines) == script.count("#SBATCH"), "sbatch ignores what follows a command"
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    for option in OPTIONS:
        parser.add_argument(option, dest=option)
    known, unknown = parser.parse_known_args([token for line in lines for token in shlex.split(line)[1:]])
    assert unknown == []
    return {option: value for option, value in vars(known).items() if value is not None}


def small(script: str, port: int) -> str:
    """The script at smoke size: the digits, and two processes on a free port."""
    for old, new in (
        ("--nproc-per-node=4", "--nproc-per-node=2"),
        (":29500", f":{port}"),
        ("experts.count=10", "experts.count=2"),
    ):
        script = script.replace(old, new)
    script = script.replace("distill.draws=8", "distill.draws=2").replace("-o runs/", "--networks 1 -o runs/")
    return script.replace("cifar10", "digits").replace("--method mtt --ipc 1", "--method mtt --ipc 1 --recipe smoke")


def job(script: str, folder: Path, **slurm: str) -> str:
    """What a job of the script says, with the variables that Slurm sets."""
    environment = {**os.environ, "HOME": str(folder), "OMP_NUM_THREADS": "1", **slurm}
    done = subprocess.run(
        ["bash", "-c", SLURM + script], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_page_has_a_script_for_the_experts_and_one_that_distils() -> None:
    assert [directives(script)["--job-name"] for script in SCRIPTS] == ["experts", "distil"]
    text = PAGE.read_text(encoding="utf-8")
    assert "sbatch --parsable experts.sh" in text and "sbatch --dependency=afterok:$experts distil.sh" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=["experts", "distil"])
def test_a_script_is_bash_with_options_that_sbatch_knows(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for option, value in directives(script).items():
        assert re.fullmatch(OPTIONS[option], value), f"{option}={value}"


def test_the_array_has_one_task_for_each_expert_and_the_processes_are_as_many_as_the_cards() -> None:
    experts, distil = SCRIPTS
    (count,) = re.findall(r"experts\.count=(\d+)", experts)
    assert directives(experts)["--array"] == f"0-{int(count) - 1}" and f"experts.count={count} " in distil
    cards = directives(distil)["--gpus-per-node"]
    assert f"--nproc-per-node={cards} " in distil and directives(distil)["--ntasks-per-node"] == "1"
    processes = int(cards) * int(directives(distil)["--nodes"])
    assert f"distill.draws={processes}" in distil


@pytest.mark.slow
def test_the_jobs_of_the_scripts_run_one_after_the_other(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    experts, distil = (small(script, port) for script in SCRIPTS)
    for task in ("0", "1"):
        job(experts, tmp_path, SLURM_ARRAY_TASK_ID=task)
        assert len(list((tmp_path / "dstill-cache").glob("experts/*/expert-*.safetensors"))) == int(task) + 1
    before = {path: path.stat().st_mtime for path in (tmp_path / "dstill-cache").glob("experts/*/*")}
    job(distil, tmp_path, SLURM_JOB_NODELIST="localhost", SLURM_NNODES="1", SLURM_JOB_ID="7")
    assert (tmp_path / "runs" / "mtt-draws8" / "result.json").exists()
    assert {path: path.stat().st_mtime for path in (tmp_path / "dstill-cache").glob("experts/*/*")} == before
    assert "draws: 2" in (tmp_path / "runs" / "mtt-draws8" / "set-0" / "recipe.yaml").read_text()
