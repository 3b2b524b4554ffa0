"""What a command says before its work begins: what it is about to do, and roughly how long that takes."""

from __future__ import annotations

from dstill.jobs.job import Job, Task
from dstill.planning.clock import QUICK, Clock
from dstill.planning.plan import Plan, plan_job
from dstill.support.progress import Silent, expect

_WORTH_NAMING = 0.01  # share of the whole time


def announce(job: Job, task: Task) -> None:
    """Says how long a run will take, stage by stage, and tells those who show progress what to expect.

    Times come from a calibration of a few seconds. Nothing is measured if nobody is told.
    """
    if type(job.place.reporter) is Silent:
        return
    plan = plan_job(job, task, Clock(job.shape, job.place.device, QUICK))
    expect(job.place.reporter, plan.expectations)
    job.place.reporter.note(sentence(plan))


def sentence(plan: Plan) -> str:
    """How long a plan takes, in one line.

    Example:
        >>> from dstill.planning.plan import Stage
        >>> sizes = {"peak_bytes": 0, "disk_bytes": 0}
        >>> stages = Stage(name="experts", seconds=600, **sizes), Stage(name="distilling", seconds=1200, **sizes)
        >>> sentence(Plan(title="", stages=stages))
        'this takes about 30 min: experts 10 min, distilling 20 min'
    """
    parts = [f"{one.name} {rough(one.seconds)}" for one in plan.stages if one.seconds > _WORTH_NAMING * plan.seconds]
    return f"this takes about {rough(plan.seconds)}" + (f": {', '.join(parts)}" if len(parts) > 1 else "")


def rough(seconds: float) -> str:
    """A duration with as many digits as an estimate has.

    Example:
        >>> rough(0.2), rough(42), rough(64), rough(754), rough(7260), rough(400_000)
        ('1 s', '40 s', '1 min', '13 min', '2 h', '5 days')
    """
    for unit, size, step in (("s", 1, 5 if seconds > 10 else 1), ("min", 60, 1), ("h", 3600, 1)):
        count = max(1, step * round(seconds / size / step))
        if count < {"s": 60, "min": 100, "h": 48}[unit]:
            return f"{count} {unit}"
    return f"{round(seconds / 86400)} days"
