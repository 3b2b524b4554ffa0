"""The table of faults fits the package as it is. Whether each is seen is asked by the slow test alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mutants.run import ROOT, load, run

MUTANTS = load()


def test_there_are_enough_faults_and_some_of_every_area() -> None:
    assert len(MUTANTS) >= 80
    assert {"science", "baselines", "data", "evaluation", "artifacts"} <= {mutant.area for mutant in MUTANTS}


def test_every_fault_can_be_applied_and_none_is_there_twice() -> None:
    counts = Counter((mutant.file, mutant.applied()) for mutant in MUTANTS)  # `applied` refuses a text that is not there once
    assert [file for (file, _), count in counts.items() if count > 1] == []
    assert [mutant.title for mutant in MUTANTS if mutant.find == mutant.replace] == []


def test_every_fault_names_tests_that_exist_or_says_why_none_can_see_it() -> None:
    for mutant in MUTANTS:
        assert bool(mutant.tests) != bool(mutant.equivalent), mutant.title
        for test in mutant.tests:
            path, _, name = test.partition("::")
            text = (ROOT / "tests" / path).read_text(encoding="utf-8")
            assert not name or f"def {name}(" in text, test


@pytest.mark.slow
def test_every_fault_is_seen(tmp_path: Path) -> None:
    found = run(MUTANTS, tmp_path / "mutants.jsonl")
    assert [mutant.title for mutant, how in found.items() if how not in ("caught", "equivalent")] == []
