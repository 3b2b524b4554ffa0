"""DSA: gradient matching under differentiable siamese augmentation (Zhao and Bilen 2021)."""

from __future__ import annotations

from typing import final

from dstill.methods.gradient_matching import GradientMatching


@final
class Dsa(GradientMatching):
    """Gradient matching with the defaults of its settings."""
