"""DC: gradient matching without augmentation, from noise (Zhao et al. 2021)."""

from __future__ import annotations

from typing import Literal, final

from dstill.methods.gradient_matching import GradientMatching, GradientMatchingConfig


class DcConfig(GradientMatchingConfig):
    """Gradient matching without augmentation, from noise."""

    initialisation: Literal["random", "noise"] = "noise"
    """Standard normal noise in preprocessed units, or real images drawn at random."""
    augment: bool = False
    """Whether real and synthetic images of a class share one draw of the augmentation, as in DSA."""


@final
class Dc(GradientMatching):
    """Gradient matching with DC's defaults."""

    Settings = DcConfig
