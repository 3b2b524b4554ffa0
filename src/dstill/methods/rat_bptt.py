"""RaT-BPTT: back-propagation through a window of training that is placed at random (Feng et al. 2024)."""

from __future__ import annotations

from typing import Literal, final

from dstill.config.settings import Count, Positive
from dstill.methods.bptt import Bptt, BpttConfig


class RatBpttConfig(BpttConfig):
    """Back-propagation through training with RaT-BPTT's window, optimiser and start."""

    total_steps: Count = 200
    """T, the longest training of the student, in steps."""
    window: Count | None = 60
    """W, the steps of a training that are differentiated."""
    window_start: Literal["random", "last"] = "random"
    """Where the window begins: uniformly drawn from 0 … T - W each time, or at T - W."""
    optimiser: Literal["sgd", "adam", "adamw"] = "adam"
    """The student's optimiser."""
    alpha_init: Positive = 1e-3
    """α, the student's learning rate."""
    learn_alpha: Literal["off", "one", "each"] = "off"
    """Whether α is fixed, learned, or learned for each step by itself."""
    batch_real: Count = 5000
    """Real images of the outer loss, of all classes."""
    lr_images: Positive = 1e-3
    """Step size of Adam on the images, in preprocessed units."""
    clip: Positive | None = 2.0
    """The norm of the images' gradient is limited to this multiple of its running mean."""
    initialisation: Literal["random", "noise", "unit-noise"] = "unit-noise"
    """Real images drawn at random; standard normal noise in preprocessed units; or such noise, each image of norm 1."""


@final
class RatBptt(Bptt):
    """Back-propagation through training with RaT-BPTT's defaults."""

    Settings = RatBpttConfig
