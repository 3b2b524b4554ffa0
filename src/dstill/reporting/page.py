"""A page about runs: one HTML file that needs no script, no network and nothing beside it."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor

from dstill.artifacts.distilled import FILE_NAME, DistilledSet
from dstill.artifacts.files import write_text
from dstill.artifacts.pictures import png_of
from dstill.artifacts.record import INITIAL_NAME, RunRecord
from dstill.config import yamls
from dstill.errors import DstillError
from dstill.reporting import figures
from dstill.support.console import duration, size
from dstill.version import __version__

REPORT_NAME = "report.html"
MOST_IMAGES = 200
MOST_CLASSES = 20  # of a confusion matrix
_TEMPLATE = Path(__file__).parent / "page.html.j2"


@dataclass(frozen=True)
class Picture:
    """One distilled image as the page shows it.

    Attributes:
        source: a data URI.
        before: that of the image it started from; empty where it is not known.
        name: name of the class.
        label: the likeliest classes of a soft label with their probabilities; empty for class ids.
    """

    source: str
    before: str
    name: str
    label: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it.

    Attributes:
        name: short and unique.
        record: what it left.
        distilled: its first set.
        pictures: of that set.
        left_out: how many images are not shown.
        settings: the recipe as YAML.
        map: the initialisation map as SVG; empty where there is none.
    """

    name: str
    record: RunRecord
    distilled: DistilledSet
    pictures: tuple[Picture, ...]
    left_out: int
    settings: str
    map: Markup


def report(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Writes a page about one run, or about several side by side.

    Args:
        runs: run folders, or folders of single sets.
        out: the HTML file.

    Raises:
        DstillError: a folder holds no finished run.
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
        figures=_figures(records),
        most_classes=MOST_CLASSES,
        version=__version__,
    )
    target = Path(out)
    write_text(target, text)
    return target


def _names(folders: Sequence[Path]) -> dict[str, Path]:
    """The folders by their last names, as many of them as it takes to tell them apart."""
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
    distilled, record = DistilledSet.load(first), RunRecord.read(folder)
    initial = DistilledSet.load(first / INITIAL_NAME) if (first / INITIAL_NAME).exists() else None
    rows = _rows(distilled)
    return Shown(
        name=name,
        record=record,
        distilled=distilled,
        pictures=_pictures(distilled, initial, rows),
        left_out=len(distilled.images) - len(rows),
        settings=yamls.dump(record.recipe),
        map=_map(name, record),
    )


def _map(name: str, record: RunRecord) -> Markup:
    title = f"Real images, and those chosen to start from, {name}"
    return svg(figures.initialisation(record), title) if record.map else Markup("")


def _rows(distilled: DistilledSet) -> Tensor:
    """The images to show, class by class, as many of each class as there is room for."""
    ids = distilled.class_ids
    order = ids.argsort(stable=True)
    if len(order) <= MOST_IMAGES:
        return order
    each = max(1, MOST_IMAGES // distilled.classes)
    return torch.cat([order[ids[order] == c][:each] for c in range(distilled.classes)])[:MOST_IMAGES]


def _pictures(distilled: DistilledSet, initial: DistilledSet | None, rows: Tensor) -> tuple[Picture, ...]:
    after = _uris(distilled, rows)
    before = _uris(initial, rows) if initial is not None else [""] * len(rows)
    names = [distilled.class_names[c] for c in distilled.class_ids[rows].tolist()]
    labels = [_likeliest(distilled, int(row)) for row in rows]
    return tuple(Picture(*parts) for parts in zip(after, before, names, labels, strict=True))


def _likeliest(distilled: DistilledSet, row: int, most: int = 3) -> tuple[tuple[str, float], ...]:
    if not distilled.labels.is_floating_point():
        return ()
    top = distilled.labels[row].softmax(0).topk(min(most, distilled.classes))
    return tuple((distilled.class_names[c], p) for c, p in zip(top.indices.tolist(), top.values.tolist(), strict=True))


def _uris(distilled: DistilledSet, rows: Tensor) -> list[str]:
    pixels = (distilled.pixels()[rows] * 255).round().byte()
    return ["data:image/png;base64," + base64.b64encode(png_of(one)).decode() for one in pixels]


def _figures(records: Mapping[str, RunRecord]) -> list[tuple[str, Markup]]:
    """Titles and SVGs of whatever the runs have curves of."""
    found: list[tuple[str, Figure]] = []
    for key, title in (
        ("validation_accuracy", "Validation accuracy"),
        ("loss", "Objective"),
        ("alpha", "Learning rate α"),
    ):
        if any(key in one.curves for record in records.values() for one in record.sets):
            found.append((title, figures.curves(records, key)))
    if any(record.experts for record in records.values()):
        found.append(("Experts", figures.expert_curves(records)))
    if any(len(one.inner_loss) > 1 for record in records.values() for one in record.sets):
        found.append(("Inner loss by start epoch", figures.inner_loss(records)))
    return [(title, svg(figure, title)) for title, figure in found]


def svg(figure: Figure, title: str) -> Markup:
    """A figure as inline SVG that takes the colours of the page around it; the title, unique there, is its alternative."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", text, count=1)
    # Text in the reader's colour, whatever the ground; ids of several figures on one page apart.
    text = re.sub(r"fill: ?#000000|stroke: ?#000000", lambda m: m.group().split(":")[0] + ": currentColor", text)
    text = text.replace('<text style="', '<text style="fill: currentColor; ')
    prefix = re.sub(r"\W+", "-", title.lower())
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    label = Markup("{}").format(title)
    # What matplotlib writes is escaped already.
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))  # noqa: S704
