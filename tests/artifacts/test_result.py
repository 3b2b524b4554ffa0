"""Scores are plain statistics, and result.json has the names that others read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstill.api.compare import Comparison, Row
from dstill.api.judge import Judged
from dstill.artifacts.result import Claim, ProtocolId, Result, Score
from dstill.cli.summary import print_result
from dstill.errors import DstillError

share = st.floats(0, 1, allow_nan=False)


def result() -> Result:
    score = Score.of([[0.5, 0.7]], lr=0.02)
    return Result(
        method="ast",
        data="tiny",
        data_fingerprint="0123",
        ipc=1,
        sets=1,
        protocol=ProtocolId(name="ast", version=1),
        measured_on="test",
        accuracy=score,
        random=Score.of([[0.3], [0.4]]),
        whole=None,
        nets={"convnet": score},
        alpha=0.02,
        stored_bytes=100,
        seconds=3.5,
        stages={"evaluate": 3.5},
        dstill="0",
    )


@given(st.integers(1, 5).flatmap(lambda k: st.lists(st.lists(share, min_size=k, max_size=k), min_size=1, max_size=4)))
def test_a_score_is_numpys_statistics_over_sets_and_networks(by_set: list[list[float]]) -> None:
    score, array = Score.of(by_set), np.array(by_set)
    assert score.mean == pytest.approx(array.mean(), abs=1e-12)
    assert score.std == pytest.approx(array.std(ddof=1) if array.size > 1 else 0.0, abs=1e-12)
    assert score.n == array.size
    assert score.values == tuple(array.ravel())
    if len(by_set) > 1:
        assert score.between_sets == pytest.approx(array.mean(1).std(ddof=1), abs=1e-12)


def test_a_single_set_has_no_spread_between_sets() -> None:
    assert Score.of([[0.2, 0.4]]).between_sets is None


def test_a_score_reads_as_people_write_it() -> None:
    assert str(Score.of([[0.5, 0.7]])) == "60.0 ± 14.1 % (n = 2)"


def test_a_single_accuracy_has_no_spread_anywhere() -> None:
    score = Score.of([[0.5]])
    one = result().model_copy(update={"accuracy": score, "nets": {"convnet": score}, "random": None, "whole": None})
    assert str(score) == "50.0 % (n = 1)"
    assert str(Claim.of(one)) == "50.0 % (n = 1, protocol ast v1), fresh convnet networks on real test images"
    assert "<td>ast</td><td>50.0</td><td>1</td>" in one._repr_html_()
    row = Row(method="ast", ipc=1, result=one)
    assert row.cells()["std"] is None
    cells = Comparison(data="d", protocol="ast", rows=(row,)).texts()[1]
    assert cells[3:5] == ["50.0", "1"]
    assert Judged(net="convnet", labels="hard", augmentation="none", result=one).texts()[3:5] == ["50.0", "1"]


def test_the_summary_on_a_terminal_shows_no_spread_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    two, one = Score.of([[0.5, 0.7]], lr=0.01), Score.of([[0.9]])
    print_result(result().model_copy(update={"nets": {"convnet": two}, "random": two, "whole": one}))
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert ["ast", "60.0", "14.1", "2"] in shown and ["whole training set", "90.0", "–", "1"] in shown


def test_result_json_has_the_fixed_names(tmp_path: Path) -> None:
    result().save(tmp_path / "result.json")
    read = json.loads((tmp_path / "result.json").read_text())
    assert (read["method"], read["ipc"], read["measured_on"]) == ("ast", 1, "test")
    assert read["protocol"] == {"name": "ast", "version": 1}
    assert read["accuracy"]["mean"] == pytest.approx(0.6)
    assert read["accuracy"]["std"] == pytest.approx(0.1 * np.sqrt(2))
    assert read["accuracy"]["n"] == 2
    assert read["random"]["n"] == 2
    assert isinstance(read["seconds"], float)


def test_a_result_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    assert Result.load(result().save(tmp_path / "r.json")) == result()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"method": "ast"}', '{"no": 1}'])
def test_a_file_that_is_no_result_is_refused_by_its_name(text: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(DstillError, match=r"result\.json is not a result of dstill"):
        Result.load(path)


def test_a_missing_result_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(DstillError, match=r"gone\.json is not a result of dstill"):
        Result.load(tmp_path / "gone.json")


def test_results_of_single_sets_are_pooled_into_that_of_all() -> None:
    first = result().model_copy(update={"confusion": ((3, 1), (0, 4)), "stages": {"evaluate": 3.0, "distill": 1.0}})
    score = Score.of([[0.1, 0.2]], lr=0.05)
    changes = {"accuracy": score, "nets": {"convnet": score}, "confusion": ((1, 3), (2, 2)), "seconds": 4.0}
    both = Result.pooled([first, first.model_copy(update={**changes, "stages": {"evaluate": 4.0}})])
    assert both.sets == 2
    assert both.accuracy == both.nets["convnet"] == Score.of([[0.5, 0.7], [0.1, 0.2]])
    assert both.accuracy.between_sets == pytest.approx(0.45 / np.sqrt(2))
    assert both.accuracy.lr is None  # they were trained with two
    assert both.confusion == ((4, 4), (2, 6))
    assert (both.seconds, both.stages) == (7.5, {"evaluate": 7.0, "distill": 1.0})
    assert (both.random, both.alpha) == (first.random, first.alpha)
    assert Result.pooled([first]) == first
    assert Result.pooled([first, first.model_copy(update={"confusion": ()})]).confusion == (), "not that of one alone"
