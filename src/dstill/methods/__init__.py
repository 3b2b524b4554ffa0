"""The table of methods. A new method is one file and one line here; nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from dstill.errors import DstillError, suggest


@dataclass(frozen=True)
class MethodInfo:
    """What a method is and where it lives.

    Attributes:
        path: `module:Class` of a `dstill.methods.base.Method`.
        family: `selection` or `trajectory matching`.
        needs_experts: whether expert trajectories are trained first.
        paper: who published it.
        note: one line for `dstill ls methods`.
    """

    path: str
    family: str
    needs_experts: bool
    paper: str
    note: str


def _matching(paper: str, note: str) -> MethodInfo:
    path = "dstill.methods.trajectory_matching:TrajectoryMatching"
    return MethodInfo(path, "trajectory matching", True, paper, note)


# MTT, TESLA, FTD and AST are one algorithm; what tells them apart is in their recipes.
METHODS: dict[str, MethodInfo] = {
    "random": MethodInfo("dstill.methods.random:Random", "selection", False, "-", "real images drawn at random"),
    "mtt": _matching("Cazenavette et al. 2022", "segments of plain SGD experts"),
    "tesla": _matching("Cui et al. 2023", "approximate gradient, labels from the target expert"),
    "ftd": _matching("Du et al. 2023", "flat experts (GSAM), moving average of the images"),
    "ast": _matching(
        "Shen, Yang, Lam", "smooth experts, representative start, balanced loss, intermediate matching, perturbation"
    ),
}


def method_info(name: str) -> MethodInfo:
    """The table's entry.

    Raises:
        DstillError: the name is unknown.
    """
    if name not in METHODS:
        raise DstillError(f"unknown method {name!r}; {suggest(name, METHODS)}")
    return METHODS[name]
