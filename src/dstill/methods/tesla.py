"""TESLA: trajectory matching by an approximate gradient, with labels from the target expert (Cui et al. 2023)."""

from __future__ import annotations

from typing import final

from dstill.config.settings import Count
from dstill.methods.trajectory_matching import MatchingConfig, Mode, SoftLabels, TrajectoryMatching


class TeslaConfig(MatchingConfig):
    """Trajectory matching by TESLA's gradient, with its labels."""

    iterations: Count = 10_000
    """Segments matched, one update of the images each."""
    soft_labels: SoftLabels = "expert"
    """Logits of the target expert, held constant."""
    gradient: Mode = "tesla"
    """Without the Hessian term."""


@final
class Tesla(TrajectoryMatching):
    """Trajectory matching with TESLA's defaults."""

    Settings = TeslaConfig
