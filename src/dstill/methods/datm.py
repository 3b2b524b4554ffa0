"""DATM: trajectory matching with learned labels and start epochs that grow (Guo et al. 2024)."""

from __future__ import annotations

from typing import final

from dstill.config.settings import Count, Positive
from dstill.methods.ftd import FtdConfig
from dstill.methods.matching_config import Initialisation, SoftLabels, StartEpochs
from dstill.methods.trajectory_matching import TrajectoryMatching


class DatmConfig(FtdConfig):
    """FTD with DATM's labels, start epochs and initial images; the moving average is that of images and labels."""

    iterations: Count = 10_000
    """Segments matched, each with one update of images and labels."""
    student_steps: Count = 80
    """N, student steps per segment."""
    start_epochs: StartEpochs = "growing"
    """Start epochs are drawn below T+ all the time, or below a limit that grows to T+."""
    initialisation: Initialisation = "classified"
    """Real images that an expert classifies correctly; or another kind of trajectory matching."""
    soft_labels: SoftLabels = "learned"
    """Logits that start as the mean of the experts' and are learned."""
    skip_above: Positive | None = 1.0
    """A segment whose matching loss is larger changes nothing; left out: no limit."""


@final
class Datm(TrajectoryMatching):
    """Trajectory matching with DATM's defaults."""

    Settings = DatmConfig
