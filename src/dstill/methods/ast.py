"""AST: alignment with smooth and high-quality expert trajectories (Shen, Yang, Lam)."""

from __future__ import annotations

from typing import Any, final

from dstill.config.settings import Form
from dstill.methods.trajectory_matching import Initialisation, MatchingConfig, TrajectoryMatching


class AstConfig(MatchingConfig):
    """Trajectory matching with the four parts of AST, in the paper's form."""

    initialisation: Initialisation = "representative"
    """Nearest to K-Means centroids of expert features (IV-C1)."""
    balanced_loss: Form = "paper"
    """ν of Eq. 20."""
    intermediate_matching: Form = "paper"
    """Eq. 22."""
    perturbation: Form = "paper"
    """Eq. 23."""

    @classmethod
    def expert_defaults(cls) -> dict[str, Any]:
        """Smooth, as `ExpertConfig` has them."""
        return {}


@final
class Ast(TrajectoryMatching):
    """Trajectory matching with AST's defaults."""

    Settings = AstConfig
