"""FTD: trajectory matching with flat experts (Du et al. 2023)."""

from __future__ import annotations

from typing import Annotated, Any, final

from pydantic import Field

from dstill.methods.matching_config import MatchingConfig
from dstill.methods.trajectory_matching import TrajectoryMatching


class FtdConfig(MatchingConfig):
    """Trajectory matching with flat experts; the result is a moving average of the images."""

    image_ema: Annotated[float, Field(gt=0, lt=1)] | None = 0.9995
    """Decay of the moving average of the images."""

    @classmethod
    def expert_defaults(cls) -> dict[str, Any]:
        """Plain SGD with GSAM."""
        return {**super().expert_defaults(), "gsam": {}}


@final
class Ftd(TrajectoryMatching):
    """Trajectory matching with FTD's defaults."""

    Settings = FtdConfig
