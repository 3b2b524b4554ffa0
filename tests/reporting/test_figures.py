"""Figures show what was measured, and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dstill.artifacts.record import Curve, SetRecord
from dstill.reporting.figures import COLOURS, bars, looks, run_curves, save


def test_a_bar_of_a_single_value_has_no_spread() -> None:
    (axes,) = bars({"two": (50.0, 4.0), "one": (60.0, None)}, "accuracy %").axes
    assert [bar.get_width() for bar in axes.patches] == [50.0, 60.0]
    two, one = axes.collections[0].get_segments()
    assert two[:, 0].tolist() == [46.0, 54.0]
    assert len(one) == 0
    assert axes.get_xlim()[0] == 46.0 - 0.15 * 60.0


def test_looks_are_drawn_for_every_set_and_named_once() -> None:
    curves = [Curve(iterations=(1, 2), values=(0.1 * k, 0.2 * k)) for k in range(1, 4)]
    figure = looks({"one": curves[:2], "two": curves[2:]})
    (axes,) = figure.axes
    assert [line.get_ydata().tolist() for line in axes.lines] == [list(curve.values) for curve in curves]
    first, again, other = (line.get_color() for line in axes.lines)
    assert first == again != other
    assert axes.lines[0].get_linewidth() > axes.lines[1].get_linewidth()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]


def test_names_hide_no_curve_however_many_there_are() -> None:
    curve = Curve(iterations=(1, 2), values=(0.1, 0.2))
    heights = []
    for count in (1, 2, 12):
        figure = looks({f"a rather long name of run {i}": [curve] for i in range(count)})
        figure.draw_without_rendering()
        (axes,) = figure.axes
        heights.append(axes.get_window_extent().height)
        assert len(figure.legends) == (count > 1), "one run needs no name"
        assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for legend in figure.legends)
    assert heights == pytest.approx([heights[0]] * 3, rel=0.1), "the axes keep their height"


@pytest.mark.parametrize("panels", [1, 2, 5])
@pytest.mark.parametrize("scale", [-1e-7, 1e-3, -1.0, 999_999.0])
def test_labels_lie_inside_the_figure_and_beside_each_other(panels: int, scale: float) -> None:
    names = [f"curve {k}" for k in range(panels)]
    rows = [{"iteration": i, "seconds": 0.1} | dict.fromkeys(names, i * scale / 30) for i in range(30)]
    figure = run_curves(SetRecord.of(rows, names), "a title")
    assert figure is not None
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert all(not one.overlaps(other) for one, other in itertools.pairwise(boxes))
    assert all(figure.bbox.containsx(x) and figure.bbox.containsy(y) for box in boxes for x, y in box.corners())
    (title,) = figure.texts
    assert not any(title.get_window_extent().overlaps(box) for box in boxes)


def test_a_figure_is_stored_small_and_keeps_its_colours(tmp_path: Path) -> None:
    values = (("one", 0.1), ("two", 0.2), ("three", 0.3))
    figure = looks({name: [Curve(iterations=(1, 2), values=(value, value))] for name, value in values})
    save(figure, tmp_path / "figure.png")
    figure.savefig(tmp_path / "all.png", dpi=110)
    assert 3 * (tmp_path / "figure.png").stat().st_size < (tmp_path / "all.png").stat().st_size
    with Image.open(tmp_path / "figure.png") as image, Image.open(tmp_path / "all.png") as every:
        assert image.size == every.size
        stored = np.asarray(image.convert("RGB"), dtype=int)
    for colour in COLOURS[:3]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(stored - wanted).sum(axis=2).min() <= 6, f"no line of colour {colour}"


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
