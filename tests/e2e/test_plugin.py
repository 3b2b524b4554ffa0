"""The example package in `examples/plugin`: a method in one file that every command knows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.short import SHORT

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder on the path with what `pip install` would put there: the module, and the entry points of its package."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(PLUGIN / "dstill_kmeans.py", folder)
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = folder / f"dstill_kmeans-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["dstill.methods"]
    (about / "entry_points.txt").write_text("[dstill.methods]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    return folder


def python(installed: Path, folder: Path, *arguments: str) -> str:
    """What Python prints with the package installed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_package_adds_a_method_to_every_command(installed: Path, tmp_path: Path) -> None:
    small = ("digits", "--train-fraction", "0.2", "--recipe", "smoke", "--cache", "cache", "--threads", "1")
    run = ("--method", "centroids", "-o", "r", "--ipc", "2", "--networks", "1", "--set", f"protocol={SHORT}")
    listed, planned, made, compared, reported = printed(
        installed,
        tmp_path,
        ("ls", "methods", "--json"),
        ("plan", *small, "--method", "centroids"),
        ("run", *small, *run),
        ("compare", *small, "--methods", "random,centroids", "--networks", "1", "--protocol", SHORT, "--no-whole"),
        ("report", "r", "-o", "page.html"),
    )
    methods = {row["name"]: row for row in json.loads(listed)}
    assert methods["centroids"]["family"] == "clustering" and "ast" in methods
    assert "centroids on digits" in planned
    assert re.search(r"centroids is \S+ points from random images \(trained at learning rate 0\.\d+\)", " ".join(made.split()))
    assert "centroids" in compared and "failed" not in compared
    assert Path(tmp_path / reported.strip()).exists()
    assert "Movement of the centroids" in (tmp_path / "page.html").read_text(encoding="utf-8"), "the curve that it names"


def printed(installed: Path, folder: Path, *commands: Sequence[str]) -> list[str]:
    """What each command prints, one after another in a process that has the package installed."""
    program = folder / "commands.py"
    program.write_text(COMMANDS)
    return list(json.loads(python(installed, folder, str(program), json.dumps(commands)).splitlines()[-1]))


COMMANDS = """
import contextlib, io, json, sys
from dstill.cli import main as cli

def printed(words):
    sys.argv = ["dstill", *words]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            cli.main()
        except SystemExit as stop:
            assert not stop.code, (words, stop.code)
    return out.getvalue()

if __name__ == "__main__":  # rows of a comparison import this file
    print(json.dumps([printed(words) for words in json.loads(sys.argv[1])]))
"""


def test_the_contract_tests_find_it_and_it_keeps_the_contract(installed: Path, tmp_path: Path) -> None:
    tests = str(TESTS / "methods" / "test_contract.py")
    options = ("-q", "-k", "centroids", "-p", "no:cacheprovider", "-p", "no:xdist", f"--rootdir={TESTS.parent}")
    said = python(installed, tmp_path, "-m", "pytest", tests, *options)
    assert int(said.split(" passed")[0].split()[-1]) >= 8 and "failed" not in said


def test_a_class_needs_no_registration(installed: Path, tmp_path: Path) -> None:
    code = """
import dstill
from dstill_kmeans import KMeans

real = dstill.load_real("digits", train_fraction=0.2)
syn = dstill.distill(real, method=KMeans, recipe="smoke", out="out", machine=dstill.Machine(cache="cache"))
print(syn.method, len(syn.images), dstill.DistilledSet.load("out").recipe.method)
"""
    alone = installed.parent / "alone"
    alone.mkdir()
    shutil.copy(PLUGIN / "dstill_kmeans.py", alone)
    assert python(alone, tmp_path, "-c", code).strip() == "dstill_kmeans:KMeans 10 dstill_kmeans:KMeans"
