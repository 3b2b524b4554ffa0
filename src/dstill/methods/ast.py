"""AST: alignment with smooth and high-quality expert trajectories (Shen, Yang, Lam)."""

from __future__ import annotations

from typing import Any, final

from dstill.config.settings import Form
from dstill.methods.matching_config import Initialisation, MatchingConfig
from dstill.methods.trajectory_matching import TrajectoryMatching


class AstConfig(MatchingConfig):
    """Trajectory matching with the four parts of AST, in the paper's form."""

    initialisation: Initialisation = "representative"
    """Real images nearest to the K-Means centroids of expert features (IV-C1)."""
    balanced_loss: Form = "paper"
    """Balanced inner loss (Eq. 20 and 21)."""
    intermediate_matching: Form = "paper"
    """Matching at intermediate points (Eq. 22)."""
    perturbation: Form = "paper"
    """Perturbation of the student's start (Eq. 23)."""

    @classmethod
    def expert_defaults(cls) -> dict[str, Any]:
        """Smooth experts, which are the defaults of `ExpertConfig`."""
        return {}


@final
class Ast(TrajectoryMatching):
    """Trajectory matching with AST's defaults."""

    Settings = AstConfig
