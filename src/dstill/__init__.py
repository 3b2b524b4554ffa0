"""dstill: dataset distillation by alignment with smooth expert trajectories.

The public API. Names are imported when first used, so that `import dstill` and the command line's `--help` stay fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dstill.errors import DstillError
from dstill.version import __version__

if TYPE_CHECKING:
    from dstill.api.compare import Comparison, compare
    from dstill.api.evaluate import evaluate
    from dstill.api.importing import import_set
    from dstill.api.judge import judge
    from dstill.api.leaderboard import Leaderboard, leaderboard
    from dstill.api.run import distill, run, train_experts
    from dstill.api.tune import tune
    from dstill.artifacts.distilled import DistilledSet
    from dstill.artifacts.exporting import export
    from dstill.artifacts.hub import push_to_hub
    from dstill.artifacts.ready import load_set
    from dstill.artifacts.result import Result
    from dstill.config.recipes import load_recipe
    from dstill.config.registry import MethodInfo
    from dstill.config.settings import Recipe
    from dstill.data.real import RealSet, Source, load_real
    from dstill.experts.importing import import_experts
    from dstill.experts.trajectory import Trajectories
    from dstill.jobs.options import Budget, Evaluation, Executor, Machine, Recording, Seeds
    from dstill.methods.base import Method
    from dstill.planning.plan import plan
    from dstill.planning.stages import Plan
    from dstill.reporting.page import report
    from dstill.reproductions.run import reproduce
    from dstill.support.progress import Reporter
    from dstill.unrolling.student import Student
    from dstill.unrolling.types import Step, Unrolled
    from dstill.unrolling.unroll import unroll

__all__ = [
    "Budget",
    "Comparison",
    "DistilledSet",
    "DstillError",
    "Evaluation",
    "Executor",
    "Leaderboard",
    "Machine",
    "Method",
    "MethodInfo",
    "Plan",
    "RealSet",
    "Recipe",
    "Recording",
    "Reporter",
    "Result",
    "Seeds",
    "Source",
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
    "leaderboard",
    "load_real",
    "load_recipe",
    "load_set",
    "plan",
    "push_to_hub",
    "report",
    "reproduce",
    "run",
    "train_experts",
    "tune",
    "unroll",
]

_HOME = {
    "Budget": "jobs.options",
    "Comparison": "api.compare",
    "DistilledSet": "artifacts.distilled",
    "Evaluation": "jobs.options",
    "Executor": "jobs.options",
    "Leaderboard": "api.leaderboard",
    "Machine": "jobs.options",
    "Method": "methods.base",
    "MethodInfo": "config.registry",
    "Plan": "planning.stages",
    "RealSet": "data.real",
    "Recipe": "config.settings",
    "Recording": "jobs.options",
    "Reporter": "support.progress",
    "Result": "artifacts.result",
    "Seeds": "jobs.options",
    "Source": "data.real",
    "Step": "unrolling.types",
    "Student": "unrolling.student",
    "Trajectories": "experts.trajectory",
    "Unrolled": "unrolling.types",
    "compare": "api.compare",
    "distill": "api.run",
    "evaluate": "api.evaluate",
    "export": "artifacts.exporting",
    "import_experts": "experts.importing",
    "import_set": "api.importing",
    "judge": "api.judge",
    "leaderboard": "api.leaderboard",
    "load_real": "data.real",
    "load_recipe": "config.recipes",
    "load_set": "artifacts.ready",
    "plan": "planning.plan",
    "push_to_hub": "artifacts.hub",
    "report": "reporting.page",
    "reproduce": "reproductions.run",
    "run": "api.run",
    "train_experts": "api.run",
    "tune": "api.tune",
    "unroll": "unrolling.unroll",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dstill' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dstill.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names, for completion in a notebook, and what every module has."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
