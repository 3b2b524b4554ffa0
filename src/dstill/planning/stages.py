"""What a run takes, stage by stage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from dstill.support.progress import Expectation


class Stage(BaseModel):
    """What one stage of a run takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seconds: float
    peak_bytes: float
    """Growth of memory during the stage."""
    disk_bytes: float
    """Size of the files that remain."""
    note: str = ""
    told: str = ""
    """Name of the stage where its progress is told, see `Reporter`; left out: `name`."""
    times: int = 1
    """How often it is gone through: once for each set."""
    makes: str = ""
    """Names the product of the stage if other runs can reuse it."""

    @property
    def expectation(self) -> Expectation:
        """The stage as those who show progress need it."""
        return Expectation(self.told or self.name, self.seconds, self.times)


class Plan(BaseModel):
    """The stages of a run, in order, and warnings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    stages: tuple[Stage, ...]
    warnings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def disk_bytes(self) -> float:
        return sum(stage.disk_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> float:
        return max((stage.peak_bytes for stage in self.stages), default=0.0)
