"""A page about runs: one HTML file without scripts that needs no network and no other file."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from dstill.artifacts import set_file
from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.artifacts.files import write_text
from dstill.artifacts.pictures import REAL_NAME
from dstill.artifacts.record import INITIAL_NAME, DataSource, RunRecord
from dstill.artifacts.whitening import MissingWhitening
from dstill.config import yamls
from dstill.config.registry import curve_titles, known, method_info
from dstill.errors import DstillError
from dstill.reporting import figures, snippet
from dstill.reporting.confusion import Confusion
from dstill.reporting.images import ClassImages, Frame, by_class, frames
from dstill.support.console import duration, size
from dstill.version import __version__

REPORT_NAME = "report.html"
_TEMPLATE = Path(__file__).parent / "page.html.j2"


@dataclass(frozen=True)
class Shown:
    """One run on the page.

    Attributes:
        name: a short, unique name.
        record: the record of the run.
        distilled: its first set.
        made: what its method does with images: `distilled`, or `chosen` for a selection.
        classes: the images of this set, class by class.
        left_out: number of images that are not shown.
        missing: why no image can be shown; empty if they can.
        frames: its images after some iterations; empty if no pictures were kept.
        python: code that trains on the set.
        command: the command that evaluates it; empty if it is not known where the real data are.
        confusion: which classes are taken for which; None without a result.
        settings: the recipe as YAML.
        map: the initialisation map as SVG; empty if there is none.
    """

    name: str
    record: RunRecord
    distilled: DistilledSet
    made: str
    classes: list[ClassImages]
    left_out: int
    missing: str
    frames: list[Frame]
    python: str
    command: str
    confusion: Confusion | None
    settings: str
    map: Markup


def report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes an HTML page about one run, or about several runs side by side.

    Args:
        runs: folders of runs, or of single sets.
        out: the HTML file to write.

    Returns:
        The HTML file.

    Raises:
        DstillError: a folder holds no finished run, or no folder is given.

    Example:
        >>> report([], "page.html")
        Traceback (most recent call last):
        ...
        dstill.errors.DstillError: there is no run to report on: pass the folder of at least one
    """
    if not runs:
        raise DstillError("there is no run to report on: pass the folder of at least one")
    names = _names([Path(run) for run in runs])
    shown = [_shown(name, folder) for name, folder in names.items()]
    records = {one.name: one.record for one in shown}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"duration": duration, "size": size, "percent": lambda share: f"{100 * share:.1f}"}
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=_title(shown),
        shown=shown,
        families=len({one.distilled.family for one in shown}),
        figures=_figures(records),
        version=__version__,
    )
    target = Path(out)
    write_text(target, text)
    return target


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by name: the last parts of their paths, as many as it takes to tell the folders apart."""
    parts = {folder: folder.resolve().parts for folder in folders}
    for length in range(1, max(len(part) for part in parts.values()) + 1):
        names = {"/".join(part[-length:]): folder for folder, part in parts.items()}
        if len(names) == len(parts):
            break
    return names


def _title(shown: Sequence[Shown]) -> str:
    first = shown[0].distilled
    if len(shown) == 1:
        return f"{first.data} in {len(first.images)} images"
    sources = list(dict.fromkeys(one.distilled.data for one in shown))
    return f"{len(shown)} runs on {', '.join(sources)}"


def _shown(name: str, folder: Path) -> Shown:
    first = folder / "set-0" if (folder / "set-0").is_dir() else folder
    if not (first / FILE_NAME).exists():
        raise DstillError(f"{folder} holds no finished run: there is no {first / FILE_NAME}")
    distilled, record = set_file.read(first), RunRecord.read(folder)
    initial = set_file.read(first / INITIAL_NAME) if (first / INITIAL_NAME).exists() else None
    missing = distilled.preprocess if isinstance(distilled.preprocess, MissingWhitening) else None
    classes = by_class(distilled, initial, first / REAL_NAME) if missing is None else []
    source = DataSource.load(first) or snippet.source_by_name(distilled)
    chosen = known(distilled.method) and method_info(distilled.method).family == "selection"
    return Shown(
        name=name,
        record=record,
        distilled=distilled,
        made="chosen" if chosen else "distilled",
        classes=classes,
        left_out=len(distilled.images) * distilled.parts**2 - sum(len(one.pictures) for one in classes),
        missing=str(missing or ""),
        frames=frames(first, initial) if missing is None else [],
        python=snippet.python(distilled, first, source),
        command=snippet.command(first, source) if source else "",
        confusion=Confusion.of(record.result.confusion, distilled.class_names) if record.result else None,
        settings=yamls.dump(record.recipe),
        map=_map(name, record),
    )


def _map(name: str, record: RunRecord) -> Markup:
    title = f"Real images and those chosen for the initialisation, {name}"
    return svg(figures.initialisation(record), title) if record.map else Markup("")


def _figures(records: Mapping[str, RunRecord]) -> list[tuple[str, Markup]]:
    """The titles and SVGs of all figures for which a run has curves."""
    found: list[tuple[str, Figure]] = []
    titles = {"validation_accuracy": "Validation accuracy"}
    for record in records.values():
        titles |= curve_titles(str(record.recipe.get("method", "")))
    for key, title in titles.items():
        if any(key in one.curves for record in records.values() for one in record.sets):
            found.append((title, figures.curves(records, key)))
    if any(record.experts for record in records.values()):
        found.append(("Experts", figures.expert_curves(records)))
    if any(len(one.inner_loss) > 1 for record in records.values() for one in record.sets):
        found.append(("Inner loss by start epoch", figures.inner_loss(records)))
    return [(title, svg(figure, title)) for title, figure in found]


def svg(figure: Figure, title: str) -> Markup:
    """A figure as inline SVG in the colours of the page around it.

    Args:
        figure: the figure.
        title: the alternative text; it must be unique on the page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", text, count=1)
    # Text gets the colour of the page's text, and ids get a prefix, so that several figures on one page do not share ids.
    text = re.sub(r"fill: ?#000000|stroke: ?#000000", lambda m: m.group().split(":")[0] + ": currentColor", text)
    text = text.replace('<text style="', '<text style="fill: currentColor; ')
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    label = Markup("{}").format(title)
    # Matplotlib has escaped its text already.
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))  # noqa: S704
