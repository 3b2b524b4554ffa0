"""Scripts beside the package import only what the package has, so that a move or a new name cannot break them in silence."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py"), *ROOT.glob("tests/mutants/*.py")])


def missing(script: Path) -> list[str]:
    """Names of the package that a script imports and that do not exist."""
    found = []
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "dstill":
            try:
                home = importlib.import_module(node.module)
            except ModuleNotFoundError as error:
                if error.name == "triton":  # optional
                    continue
                raise
            for alias in node.names:
                if not hasattr(home, alias.name):
                    try:
                        importlib.import_module(f"{node.module}.{alias.name}")
                    except ModuleNotFoundError:
                        found.append(f"{node.module}.{alias.name}")
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_a_script_imports_only_what_exists(script: Path) -> None:
    assert missing(script) == []


def test_a_missing_name_would_be_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from dstill.jobs.job import Job, resolve_recipe\nfrom dstill.methods import bptt, nothing\n", encoding="utf-8"
    )
    assert missing(script) == ["dstill.jobs.job.resolve_recipe", "dstill.methods.nothing"]
