"""No file that is read runs code, and no file that is written reveals the user or the folder."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.caches import with_kernels

import dstill

SOURCES = sorted(Path(dstill.__file__).parent.rglob("*.py"))
# Exceptions: our processes exchange pickles, by pipes, or by files in a folder that they alone may enter; and the user's own
# compiler builds the kernels.
OUR_PROCESSES = ("support/workers.py", "support/mates.py", "support/ranks.py", "api/submitting.py")
COMPILER = "derivatives/build.py"


def called(source: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call of a file: its dotted name, and its keywords as text."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg or "**": ast.unparse(keyword.value) for keyword in node.keywords}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.as_posix().split("/dstill/")[-1])
def test_no_source_runs_what_a_file_says(source: Path) -> None:
    name = source.as_posix()
    for function, keywords in called(source):
        assert function not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), function
        assert "shell" not in keywords, function
        if function in ("pickle.load", "pickle.loads", "marshal.loads"):
            assert name.endswith(OUR_PROCESSES)
        if function.startswith("subprocess."):
            assert name.endswith(COMPILER)
        if function == "torch.load":
            assert keywords.get("weights_only") == "True"
        if function == "np.load":
            assert keywords.get("allow_pickle") == "False"
        if function.startswith("yaml.") and function.endswith("load"):
            assert (function, keywords.get("Loader")) == ("yaml.load", "_Loader")


def test_the_sources_were_found() -> None:
    assert len(SOURCES) > 80
    assert sum(function == "torch.load" for source in SOURCES for function, _ in called(source)) == 1


def test_what_is_written_names_neither_user_nor_folder(tmp_path: Path) -> None:
    home = tmp_path / "home-of-somebody"
    generator = np.random.default_rng(0)
    for folder in (home / "pictures" / split / name for split in ("train", "test") for name in ("a", "b")):
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    environment = {**os.environ, "HOME": str(home), "USER": "somebody", "LOGNAME": "somebody", "SECRET": "somebody"}
    environment |= {"OMP_NUM_THREADS": "1", "DSTILL_CACHE": str(with_kernels(home / "cache"))}
    work = tmp_path / "work"
    work.mkdir()
    quick = ["--set", "net.width=4", "distill.iterations=3"]
    for arguments in (
        ["run", str(home / "pictures"), "--recipe", "smoke", "--networks", "1", "-o", "out", "--threads", "1", *quick],
        ["export", "out/set-0", "hf", "-o", "exported"],
    ):
        subprocess.run([sys.executable, "-m", "dstill", *arguments], cwd=work, env=environment, check=True, capture_output=True)
    written = [path for folder in (work, home / "cache") for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 15
    for path in written:
        if path.suffix != ".so" and not path.name.startswith(".coverage"):  # the compiler's, and coverage's
            content = path.read_bytes()
            assert b"somebody" not in content and str(tmp_path).encode() not in content, path
