"""The paper's tables and figures as files: which runs, at which scale, and how they are put side by side. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dstill.config import yamls
from dstill.config.settings import Count, Settings
from dstill.errors import DstillError, suggest

_FOLDER = Path(__file__).parent

ScaleName = Literal["smoke", "cpu", "gpu", "paper"]
Measure = Literal[
    "accuracy",
    "difference",
    "expert_accuracy",
    "avg_var",
    "accumulated_error",
    "alpha",
    "collapsed",
    "reached",
    "seconds",
    "peak",
]
FigureName = Literal[
    "loss",
    "alpha",
    "validation_accuracy",
    "experts",
    "inner_loss",
    "initialisation",
    "bars",
    "images",
]


class Case(Settings):
    """A data set, a name of `dstill ls datasets`, and images per class."""

    data: str
    """Name of the data set."""
    ipc: Count
    """Synthetic images per class."""

    @property
    def name(self) -> str:
        return f"{self.data}-ipc{self.ipc}"

    def __str__(self) -> str:
        return f"{self.data}, IPC {self.ipc}"


class Scale(Settings):
    """What is run at one scale."""

    says: str
    """The scale in words, for the page."""
    cases: Annotated[list[Case], Field(min_length=1)]
    """Every row is run for each of these."""
    rows: list[str] = Field(default_factory=list)
    """Names of the rows to run, in this order; left out: all."""
    recipe: str | None = None
    """`smoke` for runs of seconds; left out: the recipe of each method and case."""
    changes: list[str] = Field(default_factory=list)
    """`section.key=value` for every row; sections that a method lacks are passed over."""
    row_changes: dict[str, list[str]] = Field(default_factory=dict)
    """The same for single rows, applied after those of the row itself."""
    sets: Count = 1
    """Distilled sets a row; all rows see the same seeds, so that differences are paired."""
    networks: Count | None = None
    """Networks a set; left out: the protocol's."""
    nets: list[str] = Field(default_factory=list)
    """Evaluation networks, with a column each; the first gives `accuracy`. Left out: the recipe's own."""
    looks: Annotated[int, Field(ge=0)] = 0
    """How often a run is measured on the validation part."""
    remark: str = ""
    """What the comparison with the paper must bear in mind."""


class Row(Settings):
    """One run for each case."""

    name: str
    """Short and unique."""
    title: str
    """What the table calls it."""
    method: str
    """A name of `dstill ls methods`."""
    recipe: str = ""
    """The row starts from the recipe `<data>/<recipe>-ipc<k>`; left out: from the method's published one."""
    changes: list[str] = Field(default_factory=list)
    """`section.key=value` that make it this row."""
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    """By case name (`cifar100-ipc10`): what the paper has for each measure, or for a network."""


class Reproduction(Settings):
    """One table or figure of the paper."""

    title: str
    """What it shows."""
    paper: str
    """Where in the paper."""
    claim: str
    """What the paper shows there, for the reader of the page to hold ours against."""
    measures: list[Measure]
    """Columns of the table."""
    figure: FigureName | None = None
    """What is drawn, if anything."""
    scales: dict[ScaleName, Scale]
    """What is run at each scale; all but `gpu` are there for every table and figure."""
    rows: Annotated[list[Row], Field(min_length=1)]
    """In the order of the table; differences are taken from the first."""

    def rows_at(self, scale: ScaleName) -> list[Row]:
        """The rows that a scale runs."""
        by_name = {row.name: row for row in self.rows}
        return [by_name[name] for name in self.scales[scale].rows] or self.rows


def reproduction_names() -> list[str]:
    """`table1` … `fig11`."""
    return sorted((path.stem for path in _FOLDER.glob("*.yaml")), key=lambda name: (name[0] == "f", len(name), name))


def load_reproduction(what: str) -> Reproduction:
    """A shipped reproduction by name.

    Raises:
        DstillError: unknown name.
    """
    path = _FOLDER / f"{what}.yaml"
    if not path.exists():
        raise DstillError(f"unknown reproduction {what!r}; {suggest(what, reproduction_names())}")
    return yamls.validate(Reproduction, yamls.read_mapping(path), f"reproduction {what}")
