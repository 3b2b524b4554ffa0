"""The examples run as they are documented, at smoke size."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from scipy.stats import spearmanr

import dstill
from dstill.cli.options import Data

FOLDER = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_example_is_run_here() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == ["architecture_search", "continual_learning"]


def test_networks_are_ranked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))
    whole = "{name: whole, version: 1, passes: 1, batch_size: 64, momentum: 0.9, weight_decay: 0.0, lr: 0.05, networks: 1}"
    (tmp_path / "whole.yaml").write_text(whole)
    monkeypatch.setattr("dstill.evaluation.baselines.load_protocol", lambda _: dstill_protocol(tmp_path / "whole.yaml"))
    dstill.distill(dstill.load_real("digits"), method="dm", recipe="smoke", out=tmp_path / "set")
    correlation = example("architecture_search").main(
        "digits", str(tmp_path / "set"), widths=[4, 8], depths=[1], networks=1, protocol="quick"
    )
    text = capsys.readouterr().out
    rows = [[float(share) for share in re.findall(r"([\d.]+)%", line)] for line in text.splitlines() if "whole " in line]
    assert len(rows) == 4 + 1
    assert correlation == pytest.approx(spearmanr(*zip(*rows[:4], strict=True)).statistic)
    assert f"distilled {correlation:.2f}" in text


def dstill_protocol(path: Path) -> object:
    from dstill.evaluation.protocols import load_protocol

    return load_protocol(str(path))


def test_memories_grow_class_by_class_on_the_data_that_the_options_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))
    options = {"method": "dm", "ipc": 2, "steps": 2, "networks": 1, "protocol": "quick", "recipe": "smoke"}
    found = example("continual_learning").main("digits", data=Data(classes="3,1,4,7,8,0"), **options)
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()] == ["3", "6"] * 2
    assert err.startswith("digits has 6 classes: 3, 1, 4, 7, 8, 0; ")
    assert set(found) == {"dm", "random"}
    for accuracies in found.values():
        assert len(accuracies) == 2 and all(0.2 < accuracy <= 1 for accuracy in accuracies)
