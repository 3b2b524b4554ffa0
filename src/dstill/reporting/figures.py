"""The paper's figures as matplotlib objects, for any number of runs side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw

from dstill.artifacts.files import atomic
from dstill.artifacts.record import Curve, RunRecord, SetRecord

Records = Mapping[str, RunRecord]

LABELS = {
    "loss": "objective",
    "alpha": "student learning rate α",
    "validation_accuracy": "validation accuracy",
    "inner_loss_first": "student's first loss",
}
# Readers who cannot tell red from green can distinguish them, on a light and on a dark background.
COLOURS = ("#2f6fde", "#e07b00", "#12936a", "#c23b80", "#7a5cd6", "#8a8a8a", "#b8860b", "#0f8fa8")


def curves(records: Records, key: str, against: Literal["iterations", "seconds"] = "iterations") -> Figure:
    """A column of the metrics over iterations or seconds, for several runs (Figs. 6 to 8).

    Args:
        records: the runs by name. The first set of a run gets a thick line, its other sets get thin ones.
        key: the column.
        against: what the x-axis shows.
    """
    figure, (axes,) = _figure(1)
    for colour, (name, record) in zip(_colours(records), records.items(), strict=True):
        for k, one in enumerate(record.sets):
            curve = one.curves.get(key)
            if curve is None:
                continue
            x: Sequence[float] = curve.iterations
            if against == "seconds":
                assert one.seconds is not None
                x = [one.seconds.at(iteration) for iteration in curve.iterations]
            _set_line(axes, k, name, x, curve.values, colour, "o" if len(x) <= 20 else None)
    axes.set_xlabel("iteration" if against == "iterations" else "seconds of distillation")
    axes.set_ylabel(LABELS.get(key, key))
    _legend(axes, len(records))
    return figure


def run_curves(record: SetRecord, title: str) -> Figure | None:
    """The curves of one set over its iterations; None if it has none.

    Args:
        record: the set.
        title: the title of the figure.
    """
    shown = {key: curve for key, curve in record.curves.items() if key != "inner_loss_first"}
    if not shown:
        return None
    figure, panels = _figure(len(shown))
    _arrange(figure, above=0.45)
    figure.suptitle(_plain(title))
    for axes, (key, curve) in zip(panels, shown.items(), strict=True):
        axes.plot(curve.iterations, curve.values, color=COLOURS[0], marker="o" if len(curve.values) <= 20 else None)
        axes.set_xlabel("iteration")
        axes.set_ylabel(LABELS.get(key, key))
    return figure


def expert_curves(records: Records) -> Figure:
    """|θ_t - θ_{t+1}|² and accuracy over the experts' epochs (Fig. 9)."""
    figure, panels = _figure(2)
    for colour, (name, record) in zip(_colours(records), records.items(), strict=True):
        if record.experts is None:
            continue
        for axes, values in zip(panels, (record.experts.step_lengths, record.experts.accuracy), strict=True):
            axes.plot(range(1, len(values) + 1), values, color=colour, label=_plain(name))
    for axes, label in zip(panels, ("squared step |θ$_t$ - θ$_{t+1}$|²", "expert accuracy"), strict=True):
        axes.set_xlabel("expert epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
    panels[0].set_yscale("log")
    _legend(panels[1], len(records))
    return figure


def inner_loss(records: Records) -> Figure:
    """The student's loss at the start of a segment over the start epoch, for the first set of each run (Fig. 3)."""
    figure, (axes,) = _figure(1)
    for colour, (name, record) in zip(_colours(records), records.items(), strict=True):
        if record.sets and record.sets[0].inner_loss:
            points = record.sets[0].inner_loss
            axes.plot(list(points), list(points.values()), color=colour, marker="o", markersize=3, label=_plain(name))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("start epoch of the segment")
    axes.set_ylabel("inner loss, weighted")
    _legend(axes, len(records))
    return figure


def initialisation(record: RunRecord) -> Figure:
    """The real images of a few classes on their first two principal components; stars mark the chosen ones (Fig. 10)."""
    figure, panels = _figure(max(1, len(record.map)))
    _arrange(figure, above=0.35)
    for axes, one in zip(panels, record.map, strict=False):
        for key, style in (("points", {"s": 5, "alpha": 0.4}), ("chosen", {"s": 60, "marker": "*"})):
            x, y = zip(*one[key], strict=True)
            axes.scatter(x, y, color=COLOURS[0 if key == "points" else 1], label=key, **style)
        axes.set_title(_plain(one["name"]))
        axes.set_xlabel("first component")
    panels[0].set_ylabel("second component")
    return figure


def looks(runs: Mapping[str, Sequence[Curve]]) -> Figure:
    """Looks at the test images over iterations.

    Args:
        runs: the curves of each run's sets, in percent, by its name. The first set of a run gets a thick line, its other sets
            get thin ones.
    """
    figure, (axes,) = _figure(1)
    for colour, (name, curves) in zip(_colours(runs), runs.items(), strict=True):
        for k, curve in enumerate(curves):
            _set_line(axes, k, name, curve.iterations, curve.values, colour)
    axes.set_xlabel("iteration")
    axes.set_ylabel("look at the test images, accuracy %")
    _legend(axes, len(runs))
    return figure


def bars(values: Mapping[str, tuple[float, float | None]], label: str) -> Figure:
    """A bar chart of means with their standard deviations (Fig. 11).

    Args:
        values: mean and standard deviation by name; None for a single value, which has no spread.
        label: what the x-axis shows.
    """
    figure, (axes,) = _figure(1, height=0.9 + 0.32 * max(len(values), 1))
    figure.set_layout_engine("constrained")  # names can have any length
    means = [mean for mean, _ in values.values()]
    spreads = [math.nan if spread is None else spread for _, spread in values.values()]
    axes.barh([_plain(name) for name in values], means, xerr=spreads, color=COLOURS[0], height=0.6, capsize=3)
    axes.invert_yaxis()
    low = min((mean - (spread or 0.0) for mean, spread in values.values()), default=0.0)
    axes.set_xlim(left=max(0.0, low - 0.15 * max(means, default=1.0)))
    axes.set_xlabel(label)
    return figure


def sheet(pictures: Mapping[str, Path], path: Path) -> None:
    """Writes pictures below one another, each below its name, as one PNG file (Figs. 4 and 5).

    Args:
        pictures: the files of the pictures by name.
        path: the file to write, atomically.
    """
    images = {name: Image.open(picture).convert("RGB") for name, picture in pictures.items()}
    width = max(image.width for image in images.values())
    canvas = Image.new("RGB", (width, sum(image.height + 18 for image in images.values())), "white")
    draw, top = ImageDraw.Draw(canvas), 0
    for name, image in images.items():
        draw.text((3, top + 3), name, fill="black")
        canvas.paste(image, (0, top + 18))
        top += image.height + 18
    with atomic(path) as temporary:
        canvas.save(temporary, format="PNG")


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file of few colours, a quarter as large as one of all colours, atomically."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    with Image.open(drawn) as image, atomic(path) as temporary:
        few = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        few.save(temporary, format="PNG", optimize=True)


def _plain(text: str) -> str:
    """A name that matplotlib shows as it is: not as a formula, and not left out of the legend for a leading underscore."""
    return text.replace("$", r"\$").lstrip("_")


def _figure(panels: int, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * panels if panels > 1 else 5.6, height))
    axes = [figure.add_subplot(1, panels, position + 1) for position in range(panels)]
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    _arrange(figure)
    return figure, axes


def _arrange(figure: Figure, above: float = 0.25) -> None:
    """Gives the axes all room but that for their labels, and some inches above them.

    A layout engine would draw every figure twice to find this room, and a report takes most of its time for figures.
    """
    (width, height), panels = figure.get_size_inches(), len(figure.axes)
    left, right, below = 0.9, 0.15, 0.5
    panel = (width - left * panels - right) / panels
    figure.subplots_adjust(left / width, below / height, 1 - right / width, 1 - above / height, wspace=left / panel)


def _set_line(
    axes: Axes, k: int, name: str, x: Sequence[float], values: Sequence[float], colour: str, marker: str | None = None
) -> None:
    """The curve of set k of a run: thick and with the run's name for the first set, thin for the others."""
    width, label = (0.8, None) if k else (1.8, _plain(name))
    axes.plot(x, values, color=colour, linewidth=width, marker=marker, markersize=3, label=label)


def _colours(runs: Sized) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _legend(axes: Axes, runs: int) -> None:
    """Names the runs above the axes, where no curve is hidden, a line each. The figure grows, the axes do not shrink."""
    handles, names = axes.get_legend_handles_labels()
    if runs > 1 and handles:
        figure = axes.get_figure(root=True)
        assert figure is not None
        room = 0.19 * len(handles)
        figure.set_figheight(figure.get_figheight() + room)
        _arrange(figure, above=0.25 + room)
        figure.legend(handles, names, loc="upper left", frameon=False, fontsize=8)
