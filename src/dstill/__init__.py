"""dstill: dataset distillation by alignment with smooth expert trajectories.

The public API. Names are imported when first used, so that `import dstill` and the command line's `--help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dstill.errors import DstillError
from dstill.version import __version__

if TYPE_CHECKING:
    from dstill.artifacts.distilled import DistilledSet
    from dstill.artifacts.exporting import export
    from dstill.artifacts.importing import import_set
    from dstill.artifacts.result import Result
    from dstill.commands import distill, run, train_experts
    from dstill.comparing import Comparison, compare
    from dstill.config import Recipe
    from dstill.data.real import RealSet, load_real
    from dstill.evaluating import evaluate
    from dstill.experts.importing import import_experts
    from dstill.experts.trajectory import Trajectories
    from dstill.judging import judge
    from dstill.planning import Plan, plan
    from dstill.recipes import load_recipe
    from dstill.reporting.page import report
    from dstill.reproducing import reproduce
    from dstill.tuning import tune
    from dstill.unroll import Step, Student, Unrolled

__all__ = [
    "Comparison",
    "DistilledSet",
    "DstillError",
    "Plan",
    "RealSet",
    "Recipe",
    "Result",
    "Step",
    "Student",
    "Trajectories",
    "Unrolled",
    "__version__",
    "compare",
    "distill",
    "evaluate",
    "export",
    "import_experts",
    "import_set",
    "judge",
    "load_real",
    "load_recipe",
    "plan",
    "report",
    "reproduce",
    "run",
    "train_experts",
    "tune",
]

_HOME = {
    "Comparison": "comparing",
    "DistilledSet": "artifacts.distilled",
    "Plan": "planning",
    "RealSet": "data.real",
    "Recipe": "config",
    "Result": "artifacts.result",
    "Step": "unroll",
    "Student": "unroll",
    "Trajectories": "experts.trajectory",
    "Unrolled": "unroll",
    "compare": "comparing",
    "distill": "commands",
    "evaluate": "evaluating",
    "export": "artifacts.exporting",
    "import_experts": "experts.importing",
    "import_set": "artifacts.importing",
    "judge": "judging",
    "load_real": "data.real",
    "load_recipe": "recipes",
    "plan": "planning",
    "report": "reporting.page",
    "reproduce": "reproducing",
    "run": "commands",
    "train_experts": "commands",
    "tune": "tuning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dstill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dstill.{_HOME[name]}"), name)
