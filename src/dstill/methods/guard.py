"""The guard of methods that differentiate through training: it skips draws that would ruin the set, and ends hopeless runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dstill.errors import CollapseError
from dstill.methods.base import State
from dstill.methods.drawing import Told

_MIN_SKIPS = 10
_MOST_PASSED_OVER = 100  # segments at the start of a run


@dataclass(frozen=True)
class Guard:
    """Decides which draws count, and whether the step along their mean is taken.

    With one draw in an iteration, the draw and the step are the same.

    Attributes:
        on: whether bad draws and steps are skipped. If not, one that is not finite ends the run.
        max_skip_share: the run ends once more than this share of its draws, and at least 10, have been skipped.
        draws: draws of an iteration.
        skip_above: a draw with a larger loss is passed over, which is no fault, unless none of the first 100 is taken.
        bad: what makes a step bad, for the message that ends a run.
        advice: what to do about it.
    """

    on: bool
    max_skip_share: float
    draws: int = 1
    skip_above: float | None = None
    bad: str = "were not finite or would have made α non-positive"
    advice: str = "lower distill.lr_images or lr_alpha, or use smoother experts"

    def usable(self, state: State, iteration: int, drawn: Sequence[Told], momenta: Sequence[str] = ()) -> list[Told]:
        """The draws that count: those whose loss and gradients are finite, and whose loss is not above `skip_above`.

        If bad draws are skipped and none is left, the entries named in `momenta` are reset, since they would lead there again.

        Raises:
            CollapseError: too many draws were skipped, or all were passed over; or the guard is off and a draw is not finite.
        """
        sound = [one for one in drawn if one.sound]
        limit = math.inf if self.skip_above is None else self.skip_above
        usable = [one for one in sound if one.metrics["loss"] <= limit]
        self._pass_over(state, iteration, len(sound) - len(usable))
        self._skip(state, iteration, len(drawn) - len(sound), () if sound else momenta)
        return usable

    def allows(
        self,
        state: State,
        iteration: int,
        drawn: Sequence[Told],
        where: Sequence[Tensor],
        alpha: Tensor | None = None,
        momenta: Sequence[str] = (),
    ) -> bool:
        """Whether the step along the mean of some draws is taken.

        A step is bad if a number of `where`, to which it leads, or α is not finite, or if α is not positive. If a bad step is
        skipped, so are its draws, and the entries named in `momenta` are reset, since they would lead there again.

        Raises:
            CollapseError: too many draws were skipped; or the guard is off and the step is not finite.
        """
        rate = 1.0 if alpha is None else float(alpha)
        finite = math.isfinite(rate) and _finite(where)
        if finite and (rate > 0 or not self.on):
            return True
        self._skip(state, iteration, len(drawn), momenta)
        return False

    def _skip(self, state: State, iteration: int, count: int, momenta: Sequence[str]) -> None:
        if count == 0:
            return
        if not self.on:
            raise CollapseError(
                f"the run collapsed at iteration {iteration} (α {float(state['alpha']):.3g}): loss, gradient or images are not "
                "finite; the guard is off, and the curves up to here are in metrics.jsonl"
            )
        state["skipped"] = state["skipped"] + count
        for name in momenta:
            state[name] = torch.zeros_like(state[name])
        self._stop_if_hopeless(int(state["skipped"]), (iteration + 1) * self.draws)

    def _pass_over(self, state: State, iteration: int, count: int) -> None:
        if count == 0:
            return
        state["passed_over"] = state["passed_over"] + count
        untaken = int(state["passed_over"] + state["skipped"])
        if untaken == (drawn := (iteration + 1) * self.draws) >= _MOST_PASSED_OVER:
            raise CollapseError(
                f"each of the first {drawn} segments had a loss above distill.skip_above {self.skip_above:g}, or none that is "
                "finite, so that nothing has been learned: raise it, or change distill.alpha_init"
            )

    def _stop_if_hopeless(self, skipped: int, steps: int) -> None:
        if skipped >= _MIN_SKIPS and skipped > self.max_skip_share * steps:
            raise CollapseError(
                f"the run collapsed: {skipped} of {steps} steps {self.bad}, more than the {self.max_skip_share:.0%} allowed: "
                f"{self.advice}"
            )


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(torch.isfinite(one).all()) for one in tensors)
