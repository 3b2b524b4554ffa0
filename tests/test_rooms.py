"""The package consists of rooms whose imports run downwards. These tests check every import of the package."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import dstill

PACKAGE = Path(dstill.__file__).parent
# From the bottom up. A room imports only from itself and from rooms of lower floors, not from others on its own floor.
FLOORS = (
    ("errors", "version"),
    ("support",),
    ("data",),
    ("config",),
    ("nets", "artifacts"),
    ("derivatives", "reporting"),
    ("training",),
    ("unrolling",),
    ("experts",),
    ("methods",),
    ("evaluation",),
    ("distillation",),
    ("jobs",),
    ("planning",),
    ("api",),
    ("reproductions",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted names and files of all modules but the package's own two files, which belong to no room."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent != PACKAGE or path.stem not in ("__init__", "__main__"):
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"), path


def imported(path: Path) -> set[str]:
    """Rooms that a file imports from, at any place in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module == "dstill":
                found |= {alias.name for alias in node.names}
            elif node.module is not None and node.module.startswith("dstill."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dstill.")}
    return found


def test_every_module_is_in_a_room_of_the_house() -> None:
    assert {name.split(".")[0] for name, _ in modules()} == FLOOR.keys()


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_run_downwards(name: str, path: Path) -> None:
    room = name.split(".")[0]
    upwards = {other for other in imported(path) - {room} if FLOOR[other] >= FLOOR[room]}
    assert not upwards, f"{name} imports {', '.join(sorted(upwards))}, which is not below {room}"


def test_an_import_that_runs_upwards_would_be_found(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from dstill.cli.app import app\n    import dstill.api.run\n", encoding="utf-8")
    assert imported(wrong) == {"cli", "api"}


def test_no_public_name_is_that_of_a_room() -> None:
    """`dstill.x` would be the function or the room, whichever was imported last."""
    assert not set(dstill.__all__) & FLOOR.keys()


def test_every_room_says_in_a_few_lines_what_lives_in_it() -> None:
    for room in itertools.chain.from_iterable(FLOORS):
        if (PACKAGE / room).is_dir():
            tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
            said = ast.get_docstring(tree) or ""
            assert 2 <= len(said.splitlines()) <= 5 and len(tree.body) == 1, f"{room}/__init__.py holds more, or says nothing"
