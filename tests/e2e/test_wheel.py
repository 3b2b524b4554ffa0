"""The wheel holds everything that a run needs, and works without the rest of the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "dstill"


def ran(*command: str | Path, where: Path) -> str:
    """Output of a command that sees neither this checkout nor the user's packages and caches."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "DSTILL", "PIP"))}
    env |= {"DSTILL_CACHE": str(where / "cache"), "PYTHONNOUSERSITE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([*map(str, command)], cwd=where, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with the tools of this environment, so that no network is needed."""
    out = tmp_path_factory.mktemp("dist")
    ran(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, where=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel; the dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("clean")
    ran(sys.executable, "-m", "venv", folder / "venv", where=folder)
    programs = folder / "venv" / "bin"
    ran(programs / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, where=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    here = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (packages / "dependencies.pth").write_text("".join(f"{path}\n" for path in here))
    return programs


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix("dstill/") for name in archive.namelist() if name.startswith("dstill/")}
    there = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert held == {name for name in there if "__pycache__" not in name}
    kinds = {
        "config/recipe_files/": ".yaml",
        "evaluation/protocol_files/": ".yaml",
        "reproductions/": ".yaml",
        "derivatives/": "kernels.cpp",
        "reporting/": ".j2",
        "": "py.typed",
    }
    for start, end in kinds.items():
        assert any(name.startswith(start) and name.endswith(end) for name in held), f"no {start}…{end}"


def test_the_wheel_says_who_made_it_and_where_to_find_more(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert about["Author"] == "The dstill developers"
    assert about["License-Expression"] == "Apache-2.0"
    assert {url.split(",")[0] for url in about.get_all("Project-URL")} >= {"Homepage", "Documentation", "Repository", "Issues"}


def test_the_installed_wheel_distils_the_digits_in_an_empty_folder(clean: Path, tmp_path: Path) -> None:
    where = ran(clean / "python", "-c", "import dstill; print(dstill.__file__)", where=tmp_path).strip()
    assert Path(where).is_relative_to(clean.parent), "not the checkout"
    printed = ran(clean / "dstill", "run", "digits", "--recipe", "smoke", where=tmp_path)
    assert "test accuracy %" in printed and "random real images" in printed
    (run,) = (tmp_path / "runs").iterdir()
    assert {"report.html", "result.json", "set-0"} <= {path.name for path in run.iterdir()}


def test_the_installed_wheel_lists_what_it_ships(clean: Path, tmp_path: Path) -> None:
    for what, one in (("recipes", "digits/ast-ipc1"), ("protocols", "frepo"), ("reproductions", "table8")):
        assert one in ran(clean / "dstill", "ls", what, where=tmp_path)
