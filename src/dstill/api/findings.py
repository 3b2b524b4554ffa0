"""What the numbers of a run, a comparison or a judgement say, in sentences.

A difference counts if it is at least twice its standard error. Test images say which finished row is ahead, and whether random
images do as well; they advise nothing. Advice about settings rests on the validation part.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dstill.artifacts.record import Curve
from dstill.artifacts.result import Result, Score
from dstill.support.console import duration

if TYPE_CHECKING:
    from dstill.api.compare import Row
    from dstill.api.judge import Judged

_CLEAR = 2.0  # standard errors
_FEWEST_LOOKS = 6  # at the validation part, to tell a trend


def difference(one: Score, other: Score) -> tuple[float, float]:
    """How many points one score is above another, and the standard error of that over networks; infinite for single ones.

    Example:
        >>> points, error = difference(Score.of([[0.5, 0.6]]), Score.of([[0.4, 0.5]]))
        >>> round(points, 1), round(error, 1)
        (10.0, 7.1)
    """
    if min(one.n, other.n) < 2:
        return 100 * (one.mean - other.mean), math.inf
    return 100 * (one.mean - other.mean), 100 * math.hypot(one.std / math.sqrt(one.n), other.std / math.sqrt(other.n))


def of_run(result: Result, validation: Curve | None) -> list[str]:
    """What a run says: whether it was worth it, and whether more iterations would help.

    Args:
        result: its result.
        validation: its accuracy on the validation part over the iterations, if it was measured.
    """
    found = []
    if result.random is not None:
        points, error = difference(result.accuracy, result.random)
        if points < (_CLEAR * error if math.isfinite(error) else 0):  # one network alone has no spread
            found.append(f"no better than random real images ({points:+.1f} points), which would do as well")
    if validation is not None and len(validation.values) >= _FEWEST_LOOKS:
        found.append(_trend(validation, unseen=result.measured_on == "validation"))
    return found


def _trend(validation: Curve, *, unseen: bool) -> str:
    """Whether the accuracy still rises: the mean of the last third of the looks against that of the third before.

    Args:
        validation: the accuracy over the iterations.
        unseen: whether the run has not trained on the validation part. An ordinary run distils from all training images.
    """
    third = len(validation.values) // 3
    last, before = validation.values[-third:], validation.values[-2 * third : -third]
    gain = 100 * (statistics.fmean(last) - statistics.fmean(before))
    error = 100 * math.hypot(*(statistics.stdev(some) / math.sqrt(third) for some in (last, before))) if third > 1 else math.inf
    where = "" if unseen else ", on images that the run has also trained on"
    said = f"over the last third of the run, the validation accuracy changed by {gain:+.1f} points{where}"
    if gain >= _CLEAR * error:
        return f"{said}: more iterations {'would' if unseen else 'may'} help"
    if gain <= -_CLEAR * error:
        return f"{said}: fewer iterations would do"
    return f"{said}, which is within its noise: more iterations would not help much"


def of_judgement(rows: Sequence[Judged]) -> list[str]:
    """Which way of training on a set is better on the validation part, for each network."""
    found = []
    for net in dict.fromkeys(row.net for row in rows):
        first, *others = [row for row in rows if row.net == net]
        for other in others:
            changed = [what for what in ("labels", "augmentation") if getattr(first, what) != getattr(other, what)]
            if len(changed) != 1 or first.validation is None or other.validation is None:
                continue
            points, error = difference(other.validation, first.validation)
            if points >= _CLEAR * error:
                (what,) = changed
                better = f"{what} {getattr(other, what)} is better than {getattr(first, what)}"
                found.append(f"{net}: {better} by {points:.1f} ± {error:.1f} points on the validation part")
    return found


def of_comparison(rows: Sequence[Row]) -> list[str]:
    """Which row is ahead at equal bytes, and which at equal time, for each family and IPC."""
    found = []
    finished = [row for row in rows if row.result is not None]
    groups = dict.fromkeys((row.result.family, row.ipc) for row in finished if row.result is not None)
    for family, ipc in groups:
        group = [(row.method, row.result) for row in finished if row.result and (row.result.family, row.ipc) == (family, ipc)]
        if len(group) > 1:
            group.sort(key=lambda one: -one[1].accuracy.mean)
            found += [_at_equal_bytes(group, family, ipc), *_at_equal_time(group)]
    return found


def _at_equal_bytes(group: Sequence[tuple[str, Result]], family: str, ipc: int) -> str:
    (winner, best), (second, next_best) = group[:2]
    points, error = difference(best.accuracy, next_best.accuracy)
    where = f"IPC {ipc}, family {family} ({best.stored_bytes / 1024:.1f} KiB): {winner} is ahead with {best.accuracy}"
    if points >= _CLEAR * error:
        return f"{where}, {points:.1f} ± {error:.1f} points above {second}"
    level = [method for method, one in group[1:] if (gap := difference(best.accuracy, one.accuracy))[0] < _CLEAR * gap[1]]
    return f"{where}, not distinguishable from {', '.join(level)}"


def _at_equal_time(group: Sequence[tuple[str, Result]]) -> list[str]:
    """The methods that no quicker one reaches, from the quickest to the best."""
    timed = sorted((one.cost.seconds, method, one) for method, one in group if one.cost is not None)
    leaders: list[tuple[float, str, Result]] = []
    for seconds, method, one in timed:
        if not leaders or one.accuracy.mean > leaders[-1][2].accuracy.mean:
            leaders.append((seconds, method, one))
    if len(leaders) < 2:
        return []
    steps = [f"{method} from {duration(seconds)} ({100 * one.accuracy.mean:.1f})" for seconds, method, one in leaders]
    return [f"at equal time of distilling: {', '.join(steps)}"]
