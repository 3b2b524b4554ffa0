"""TESLA: trajectory matching by an approximate gradient, with labels from the target expert (Cui et al. 2023)."""

from __future__ import annotations

from typing import final

from dstill.config.settings import Count
from dstill.methods.matching_config import MatchingConfig, Mode, SoftLabels
from dstill.methods.trajectory_matching import TrajectoryMatching


class TeslaConfig(MatchingConfig):
    """Trajectory matching with TESLA's gradient and labels."""

    iterations: Count = 10_000
    """Segments matched, each with one update of the images."""
    soft_labels: SoftLabels = "expert"
    """Logits of the target expert, constant in the gradient."""
    gradient: Mode = "tesla"
    """TESLA's approximation, without the Hessian term."""


@final
class Tesla(TrajectoryMatching):
    """Trajectory matching with TESLA's defaults."""

    Settings = TeslaConfig
