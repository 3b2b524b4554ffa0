"""Figures show what was measured, and nothing else."""

from __future__ import annotations

from dstill.artifacts.record import Curve, SetRecord
from dstill.reporting.figures import bars, looks, run_curves


def test_a_bar_of_a_single_value_has_no_spread() -> None:
    (axes,) = bars({"two": (50.0, 4.0), "one": (60.0, None)}, "accuracy %").axes
    assert [bar.get_width() for bar in axes.patches] == [50.0, 60.0]
    two, one = axes.collections[0].get_segments()
    assert two[:, 0].tolist() == [46.0, 54.0]
    assert len(one) == 0
    assert axes.get_xlim()[0] == 46.0 - 0.15 * 60.0


def test_looks_are_drawn_for_every_set_and_named_once() -> None:
    curves = [Curve(iterations=(1, 2), values=(0.1 * k, 0.2 * k)) for k in range(1, 4)]
    (axes,) = looks({"one": curves[:2], "two": curves[2:]}).axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [list(curve.values) for curve in curves]
    first, again, other = (line.get_color() for line in axes.lines)
    assert first == again != other
    assert axes.lines[0].get_linewidth() > axes.lines[1].get_linewidth()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "two"]


def test_curves_have_a_panel_for_each_thing_that_was_measured() -> None:
    rows = [{"iteration": i, "loss": 1.0 / (i + 1), "alpha": 0.01, "seconds": 0.1} for i in range(30)]
    two = run_curves(SetRecord.of(rows), "$t$")
    assert two is not None and [axes.get_ylabel() for axes in two.axes] == ["objective", "student learning rate α"]
    rows[9]["validation_accuracy"] = 0.5
    three = run_curves(SetRecord.of(rows), "t")
    assert three is not None
    objective, _, validation = three.axes
    assert objective.lines[0].get_xdata()[[0, -1]].tolist() == [1, 30]
    assert objective.lines[0].get_ydata()[1] == 0.5
    assert validation.lines[0].get_xydata().tolist() == [[10, 0.5]]
    assert run_curves(SetRecord.of([{"iteration": 0, "something else": 1.0, "seconds": 0.1}]), "t") is None
