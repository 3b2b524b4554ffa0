"""What reports show of a run is what its files say, added up and averaged by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstill.artifacts.record import Curve, DataSource, ExpertCurves, SetRecord, read_metrics
from dstill.errors import DamagedFileError

ROWS: list[dict[str, Any]] = [
    {"iteration": 0, "loss": 4.0, "alpha": 0.1, "start_epoch": 3, "inner_loss_first": 1.0, "skipped": 0, "seconds": 0.5},
    {"iteration": 1, "loss": None, "alpha": 0.2, "start_epoch": 0, "inner_loss_first": 5.0, "skipped": 1, "seconds": 0.25},
    {"iteration": 2, "loss": 1.0, "alpha": 0.3, "start_epoch": 3, "inner_loss_first": 2.0, "skipped": 1, "seconds": 1.0},
]


def test_a_curve_has_a_point_for_every_finite_value_after_so_many_iterations() -> None:
    curve = Curve.of(ROWS, "loss")
    assert curve is not None
    assert (curve.iterations, curve.values) == ((1.0, 3.0), (4.0, 1.0))
    assert [curve.at(x) for x in (0, 1, 2, 3, 9)] == [4.0, 4.0, 2.5, 1.0, 1.0]
    assert Curve.of([*ROWS, {"iteration": 3, "loss": float("nan")}], "loss") == curve
    assert Curve.of(ROWS, "validation_accuracy") is None


@pytest.mark.parametrize(("count", "most", "size"), [(10, 4, 3), (8, 4, 2), (4, 4, 1), (9, 4, 3)])
def test_a_long_curve_is_means_of_neighbours(count: int, most: int, size: int) -> None:
    curve = Curve.of([{"iteration": i, "loss": float(i * i)} for i in range(count)], "loss", most)
    assert curve is not None
    groups = [range(first, min(first + size, count)) for first in range(0, count, size)]
    assert curve.values == pytest.approx([sum(i * i for i in group) / len(group) for group in groups])
    assert curve.iterations == pytest.approx([sum(i + 1 for i in group) / len(group) for group in groups])
    assert len(curve.values) <= most


def test_a_set_tells_its_time_its_skips_and_its_inner_loss_by_start_epoch() -> None:
    record = SetRecord.of(ROWS)
    assert record.seconds is not None
    assert (record.seconds.iterations, record.seconds.values) == ((1.0, 2.0, 3.0), (0.5, 0.75, 1.75))
    assert record.inner_loss == {0: 5.0, 3: 1.5}
    assert list(record.inner_loss) == [0, 3]
    assert (record.iterations, record.skipped) == (3, 1)
    assert record.curves.keys() == {"loss", "alpha", "inner_loss_first"}


def test_a_set_without_steps_has_no_curves() -> None:
    record = SetRecord.of([])
    assert (record.curves, record.seconds, record.iterations, record.skipped) == ({}, None, 0, 0)


def test_curves_of_experts_are_means_over_experts_by_epoch() -> None:
    curves = ExpertCurves.of({"accuracy": [[0.1, 0.4], [0.3, 0.8]], "step_lengths": [[1.0, 2.0], [3.0, 6.0]]})
    assert curves.count == 2
    assert curves.accuracy == pytest.approx([0.2, 0.6])
    assert curves.step_lengths == pytest.approx([2.0, 4.0])
    assert curves.avg_var == pytest.approx(3.0)


def test_metrics_are_the_whole_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"iteration": 3')
    assert read_metrics(path) == ROWS


def test_where_data_lie_is_kept_as_it_was_given_but_does_not_name_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    kept = {
        "/home/ann/a b/*.parquet": "~/a b/*.parquet",
        "/home/ann": "~",
        "/home/anna/x": "/home/anna/x",
        "photos": "photos",
        "digits": "digits",
    }
    for given, stored in kept.items():
        assert DataSource.of({"source": given}).arguments() == {"source": stored}


def test_a_source_comes_back_with_the_arguments_that_were_given(tmp_path: Path) -> None:
    assert DataSource.load(tmp_path) is None
    given = {"source": "mnist", "fit": "pad", "image_size": 28, "classes": ["3", "1"], "train_fraction": 0.5}
    DataSource.of(given).save(tmp_path)
    found = DataSource.load(tmp_path)
    assert found is not None and found.arguments() == {**given, "classes": ("3", "1")}
    (tmp_path / "source.json").write_text('{"source": "x", "code": "import os"}')
    with pytest.raises(DamagedFileError, match=r"source\.json is damaged"):
        DataSource.load(tmp_path)
    for wrong in ({"source": "mnist", "size": 28}, {"source": "mnist", "image_size": "large"}):
        with pytest.raises(ValueError, match="DataSource"):
            DataSource.of(wrong)
