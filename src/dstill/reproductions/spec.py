"""The paper's tables and figures as files: which runs, at which scale, and how they are compared. Never imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

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
    "chosen",
    "averaged",
    "best_look",
    "predicted",
    "spread",
    "inflation",
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
    "looks",
]


class Case(Settings):
    """A data set (a name of `dstill ls datasets`) and images per class."""

    data: str
    """Name of the data set."""
    ipc: Count
    """Synthetic images per class."""
    looks: Annotated[int, Field(ge=0)] | None = None
    """How often a run is measured on the validation part; left out: the scale's number."""

    @property
    def name(self) -> str:
        return f"{self.data}-ipc{self.ipc}"

    def __str__(self) -> str:
        return f"{self.data}, IPC {self.ipc}"


class Scale(Settings):
    """The runs of one scale."""

    says: str
    """A description of the scale, for the page."""
    cases: Annotated[list[Case], Field(min_length=1)]
    """Every row is run for each of these."""
    rows: list[str] = Field(default_factory=list)
    """Names of the rows to run, in this order; left out: all."""
    recipe: str | None = None
    """`smoke` for runs of seconds; left out: the published recipe of each method and case."""
    changes: list[str] = Field(default_factory=list)
    """`section.key=value` for every row; settings that a method lacks are ignored."""
    case_changes: dict[str, list[str]] = Field(default_factory=dict)
    """The same for single cases, by name (`cifar100-ipc10`), applied before the rows' own changes."""
    row_changes: dict[str, list[str]] = Field(default_factory=dict)
    """The same for single rows, by name, applied after the row's own changes."""
    sets: Count = 1
    """Distilled sets per row. All rows use the same seeds, so that differences are paired."""
    networks: Count | None = None
    """Fresh networks per set; left out: the protocol's number."""
    nets: list[str] = Field(default_factory=list)
    """Evaluation networks, one column each; the first gives `accuracy`. Left out: the recipe's own."""
    looks: Annotated[int, Field(ge=0)] = 0
    """How often a run is measured on the validation part, unless its case says otherwise."""
    judged_on: Literal["test", "validation"] = "test"
    """`validation`: the validation part takes the place of the test images, for trials that choose settings."""
    kept: Annotated[int, Field(ge=0)] = 0
    """How many sets of a run are kept on its way and looked at, see `dstill.reproductions.looking`. The runs then do not see
    the validation part."""
    look_networks: Count = 1
    """Networks for each look."""
    remark: str = ""
    """What to bear in mind when reading the table."""

    @model_validator(mode="after")
    def _choose_once(self) -> Self:
        if self.kept and self.judged_on == "validation":
            raise ValueError("kept sets are judged on test images as well, so judged_on must be test")
        return self


class Row(Settings):
    """One run for each case."""

    name: str
    """Short and unique."""
    title: str
    """Name in the table."""
    method: str
    """A name of `dstill ls methods`."""
    recipe: str = ""
    """Starts from the recipe `<data>/<recipe>-ipc<k>`; left out: from the method's published recipe."""
    changes: list[str] = Field(default_factory=list)
    """`section.key=value`: the settings that distinguish this row."""
    published: dict[str, dict[str, float]] = Field(default_factory=dict)
    """The paper's figure for each measure or network, by case name (`cifar100-ipc10`)."""


class Reproduction(Settings):
    """One table or figure of the paper, or an experiment that the paper lacks."""

    title: str
    """Title of the page."""
    paper: str = ""
    """Number of the table or figure in the paper; empty for an experiment that the paper lacks."""
    claim: str
    """What the paper shows, for comparison with our figures; or what the experiment asks."""
    measures: list[Measure]
    """Columns of the table."""
    figure: FigureName | None = None
    """Kind of figure to draw, if any."""
    scales: dict[ScaleName, Scale]
    """The runs of each scale. Every table and figure has all scales but `gpu`."""
    rows: Annotated[list[Row], Field(min_length=1)]
    """Rows in the order of the table; differences are relative to the first."""

    @property
    def heading(self) -> str:
        """The number in the paper, if there is one, and the title."""
        return f"{self.paper}: {self.title}" if self.paper else self.title

    def rows_at(self, scale: ScaleName) -> list[Row]:
        """The rows of a scale."""
        by_name = {row.name: row for row in self.rows}
        return [by_name[name] for name in self.scales[scale].rows] or self.rows


def reproduction_names() -> list[str]:
    """`table1` … `fig11`, then the experiments that the paper lacks."""
    names = [path.stem for path in _FOLDER.glob("*.yaml")]
    kinds = {"table": 0, "fig": 1}
    return sorted(names, key=lambda name: (kinds.get(name.rstrip("0123456789"), 2), len(name), name))


def load_reproduction(what: str) -> Reproduction:
    """A shipped reproduction by name.

    Raises:
        DstillError: unknown name.
    """
    path = _FOLDER / f"{what}.yaml"
    if not path.exists():
        raise DstillError(f"unknown reproduction {what!r}; {suggest(what, reproduction_names())}")
    return yamls.validate(Reproduction, yamls.read_mapping(path), f"reproduction {what}")
