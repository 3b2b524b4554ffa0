"""The guard of methods that differentiate through training: it skips steps that would ruin the set, and ends hopeless runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dstill.errors import CollapseError
from dstill.methods.base import State

_MIN_SKIPS = 10
_MOST_PASSED_OVER = 100  # segments at the start of a run


@dataclass(frozen=True)
class Guard:
    """Decides whether a step is taken.

    Attributes:
        on: whether bad steps are skipped. If not, a non-finite step ends the run.
        max_skip_share: the run ends once more than this share of its steps, and at least 10, have been skipped.
        skip_above: a step with a larger loss is passed over, which is no fault, unless none of the first 100 is taken.
        bad: what makes a step bad, for the message that ends a run.
        advice: what to do about it.
    """

    on: bool
    max_skip_share: float
    skip_above: float | None = None
    bad: str = "were not finite or would have made α non-positive"
    advice: str = "lower distill.lr_images or lr_alpha, or use smoother experts"

    def allows(
        self,
        state: State,
        iteration: int,
        loss: float,
        where: Sequence[Tensor],
        alpha: Tensor | None = None,
        momenta: Sequence[str] = (),
    ) -> bool:
        """Whether a step is taken.

        A step is bad if the loss, a number of `where` (to where it leads, or the gradients along which) or α is not finite, or
        if α is not positive. A skipped step is counted in `state["skipped"]`, and the entries named in `momenta` are reset,
        since they would lead to the same step again.

        Raises:
            CollapseError: too many steps were skipped, or all were passed over; or the guard is off and the step is not finite.
        """
        if self.skip_above is not None and self.skip_above < loss < math.inf:
            self._pass_over(state, iteration)
            return False
        rate = 1.0 if alpha is None else float(alpha)
        finite = math.isfinite(loss) and math.isfinite(rate) and all(bool(torch.isfinite(one).all()) for one in where)
        if not self.on and not finite:
            raise CollapseError(
                f"the run collapsed at iteration {iteration} (loss {loss:.3g}, α {float(state['alpha']):.3g}); "
                "the guard is off, and the curves up to here are in metrics.jsonl"
            )
        if not self.on or (finite and rate > 0):
            return True
        state["skipped"] = state["skipped"] + 1
        for name in momenta:
            state[name] = torch.zeros_like(state[name])
        self._stop_if_hopeless(int(state["skipped"]), iteration + 1)
        return False

    def _pass_over(self, state: State, iteration: int) -> None:
        state["passed_over"] = state["passed_over"] + 1
        if int(state["passed_over"]) == iteration + 1 >= _MOST_PASSED_OVER:
            raise CollapseError(
                f"each of the first {iteration + 1} segments had a loss above distill.skip_above {self.skip_above:g}, so that "
                "nothing has been learned: raise it, or change distill.alpha_init"
            )

    def _stop_if_hopeless(self, skipped: int, steps: int) -> None:
        if skipped >= _MIN_SKIPS and skipped > self.max_skip_share * steps:
            raise CollapseError(
                f"the run collapsed: {skipped} of {steps} steps {self.bad}, more than the {self.max_skip_share:.0%} allowed: "
                f"{self.advice}"
            )
