"""Puts one fault after another into a copy of the package, and runs the tests that should see it.

    python tests/mutants/run.py [--only PATTERN] [--results FILE] [--control]

The faults are in `mutants.toml`. Results are written as they come: a run that was cut off goes on where it stopped, and what
has not changed since, neither the faulty file nor the tests, is not run again. That the tests pass without a fault is what the
suite says; `--control` asks those of the table alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "dstill"
TABLE = Path(__file__).with_name("mutants.toml")
RESULTS = ROOT / "runs" / "mutants.jsonl"
LONGEST_SECONDS = 300
# How pytest ends: no test failed, one did; the rest are faults of the table.
_VERDICTS = {0: "survived", 1: "caught"}


@dataclass(frozen=True)
class Mutant:
    """One fault: in `file` of the package, `find` becomes `replace`, and one of `tests` fails.

    An `equivalent` one changes nothing that a test could see, for the reason given; it is not run.
    """

    area: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...] = ()
    equivalent: str = ""

    @property
    def title(self) -> str:
        return f"{self.area} {self.file}: {self.find} -> {self.replace}"

    def applied(self) -> str:
        """The text of the faulty file."""
        text = (PACKAGE / self.file).read_text(encoding="utf-8")
        if text.count(self.find) != 1:
            raise ValueError(f"{self.file} has {text.count(self.find)} times {self.find!r}, not once")
        return text.replace(self.find, self.replace)

    def key(self) -> str:
        """Names the fault, the file and the tests as they are now."""
        tests = sorted({ROOT / "tests" / test.partition("::")[0] for test in self.tests})
        parts = [self.title, self.applied(), *self.tests, *(path.read_text(encoding="utf-8") for path in tests)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def load() -> list[Mutant]:
    """All faults, in the order of the table."""
    areas = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return [
        Mutant(area, one["file"], one["find"], one["replace"], tuple(one.get("tests", ())), one.get("equivalent", ""))
        for area, mutants in areas.items()
        for one in mutants
    ]


def pytest_ends(tests: Iterable[str], source: Path) -> tuple[int | None, str]:
    """How pytest ends on these tests of the package in `source`, and what it says; None where it does not in good time."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no end after {LONGEST_SECONDS} s"
    return ended.returncode, ended.stdout + ended.stderr


def verdict(mutant: Mutant) -> str:
    """`caught`, `survived`, or what is wrong with the entry."""
    if mutant.equivalent:
        return "equivalent"
    with tempfile.TemporaryDirectory(prefix="dstill-mutant-") as scratch:
        copy = Path(scratch) / "dstill"
        shutil.copytree(PACKAGE, copy)
        faulty = copy / mutant.file
        faulty.write_text(mutant.applied(), encoding="utf-8")
        for compiled in (faulty.parent / "__pycache__").glob(f"{faulty.stem}.*"):  # of the same size and second, perhaps
            compiled.unlink()
        ended, _ = pytest_ends(mutant.tests, Path(scratch))
    return "caught" if ended is None else _VERDICTS.get(ended, f"pytest ended with {ended}")


def run(mutants: list[Mutant], results: Path) -> dict[Mutant, str]:
    """The verdict on each; those that are known already are read from `results`, the others are added to it."""
    results.parent.mkdir(parents=True, exist_ok=True)
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    whole = (line for line in lines if line.endswith("}"))
    known: dict[str, str] = {row["key"]: row["verdict"] for row in map(json.loads, whole)}
    found: dict[Mutant, str] = {}
    for number, mutant in enumerate(mutants, 1):
        key = mutant.key()
        found[mutant] = known.get(key) or verdict(mutant)
        if key not in known:
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "verdict": found[mutant], "mutant": mutant.title}) + "\n")
        print(f"{number}/{len(mutants)} {found[mutant]}: {mutant.title}", file=sys.stderr, flush=True)
    return found


def as_markdown(found: dict[Mutant, str]) -> str:
    """How many of each area were caught, and every one that was not."""
    lines = ["| area | mutants | caught | equivalent | not caught |", "|---|---|---|---|---|"]
    for area in dict.fromkeys(mutant.area for mutant in found):
        verdicts = [how for mutant, how in found.items() if mutant.area == area]
        caught, same = verdicts.count("caught"), verdicts.count("equivalent")
        lines.append(f"| {area} | {len(verdicts)} | {caught} | {same} | {len(verdicts) - caught - same} |")
    lines += ["", *(f"- {how}: `{mutant.title}`" for mutant, how in found.items() if how not in ("caught", "equivalent"))]
    return "\n".join(lines)


def _pass_unchanged(tests: list[str]) -> bool:
    """Whether the tests pass on the package as it is: if they do not, what they say of a fault means nothing."""
    for file in dict.fromkeys(test.partition("::")[0] for test in tests):
        ended, said = pytest_ends([test for test in tests if test.partition("::")[0] == file], PACKAGE.parent)
        if ended != 0:
            print(f"{said}\n{file} does not pass on the package as it is", file=sys.stderr)
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression of area, file and texts")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="where results are kept")
    parser.add_argument("--control", action="store_true", help="run the tests on the package as it is instead")
    options = parser.parse_args()
    chosen = [mutant for mutant in load() if re.search(options.only, mutant.title)]
    tests = list(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
    if options.control:
        return 0 if _pass_unchanged(tests) else 1
    found = run(chosen, options.results)
    print(as_markdown(found))
    return 0 if {*found.values()} <= {"caught", "equivalent"} else 1


if __name__ == "__main__":
    sys.exit(main())
