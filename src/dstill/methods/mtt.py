"""MTT: trajectory matching with plain SGD experts (Cazenavette et al. 2022)."""

from __future__ import annotations

from typing import final

from dstill.methods.trajectory_matching import TrajectoryMatching


@final
class Mtt(TrajectoryMatching):
    """Trajectory matching with the defaults of its settings."""
