"""The guard of trajectory matching: it skips steps that would ruin the synthetic set, and ends hopeless runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dstill.errors import CollapseError
from dstill.methods.base import State

_MIN_SKIPS = 10


@dataclass(frozen=True)
class Guard:
    """Decides whether a step is taken.

    Attributes:
        on: whether bad steps are skipped. If not, a non-finite step ends the run.
        max_skip_share: the run ends once more than this share of its steps, and at least 10, have been skipped.
    """

    on: bool
    max_skip_share: float

    def allows(
        self,
        state: State,
        iteration: int,
        loss: float,
        images: Tensor,
        alpha: Tensor,
        momenta: Sequence[str],
    ) -> bool:
        """Whether the step to these images (or along this gradient) and this α is taken.

        A step is bad if the loss, the images or α are not finite, or if α is not positive. A skipped step is counted in
        `state["skipped"]`, and the entries named in `momenta` are reset, since they would lead to the same step again.

        Raises:
            CollapseError: too many steps were skipped; or the guard is off and the step is not finite.
        """
        finite = math.isfinite(loss) and bool(torch.isfinite(images).all()) and math.isfinite(float(alpha))
        if not self.on and not finite:
            raise CollapseError(
                f"the run collapsed at iteration {iteration} (loss {loss:.3g}, α {float(state['alpha']):.3g}); "
                "the guard is off, and the curves up to here are in metrics.jsonl"
            )
        if not self.on or (finite and float(alpha) > 0):
            return True
        state["skipped"] = state["skipped"] + 1
        for name in momenta:
            state[name] = torch.zeros_like(state[name])
        self._stop_if_hopeless(int(state["skipped"]), iteration + 1)
        return False

    def _stop_if_hopeless(self, skipped: int, steps: int) -> None:
        if skipped >= _MIN_SKIPS and skipped > self.max_skip_share * steps:
            raise CollapseError(
                f"the run collapsed: {skipped} of {steps} steps were not finite or would have made α non-positive, "
                f"more than the {self.max_skip_share:.0%} allowed: lower distill.lr_images or lr_alpha, or use "
                "smoother experts"
            )
