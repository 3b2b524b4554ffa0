"""The table of methods. A new method is one file and one line here, or an entry point of another package.

Nothing here imports torch. Another package registers a method by an entry point of the group `dstill.methods` whose name is
the method's and whose value is a `MethodInfo`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata
from typing import Literal, get_args

from dstill.errors import DstillError, suggest

ENTRY_POINTS = "dstill.methods"
Need = Literal["real images", "experts", "trained network"]


@dataclass(frozen=True)
class MethodInfo:
    """What a method is and where it lives.

    Attributes:
        path: `module:Class` of a `dstill.methods.base.Method`.
        settings: `module:Class` of its `distill` section, a `dstill.config.settings.DistillConfig`; None for none.
        family: which idea it belongs to.
        needs: `experts`: expert trajectories; `trained network`: one network trained on the real images, with what it got
            wrong on the way; `real images`: nothing that has to be trained first.
        labels: `hard` class ids, or `soft` labels that are part of the result.
        paper: who published it.
        note: one line for `dstill ls methods`.
    """

    path: str
    settings: str | None
    family: str
    needs: Need
    labels: Literal["hard", "soft"]
    paper: str
    note: str

    @property
    def needs_experts(self) -> bool:
        return self.needs == "experts"


def _selection(name: str, needs: Need, paper: str, note: str) -> MethodInfo:
    settings = None if needs == "real images" else "dstill.methods.settings:SelectionConfig"
    return MethodInfo(f"dstill.methods.{name.lower()}:{name}", settings, "selection", needs, "hard", paper, note)


def _gradients(paper: str, note: str, settings: str = "GradientMatchingConfig") -> MethodInfo:
    path, settings = "dstill.methods.gradient_matching:GradientMatching", f"dstill.methods.settings:{settings}"
    return MethodInfo(path, settings, "gradient matching", "real images", "hard", paper, note)


def _trajectories(
    paper: str, note: str, labels: Literal["hard", "soft"] = "hard", settings: str = "MatchingConfig"
) -> MethodInfo:
    path, settings = (
        "dstill.methods.trajectory_matching:TrajectoryMatching",
        f"dstill.methods.settings:{settings}",
    )
    return MethodInfo(path, settings, "trajectory matching", "experts", labels, paper, note)


# DC and DSA are one algorithm, and so are MTT, TESLA, FTD and AST; what tells them apart are the defaults of their settings.
METHODS: dict[str, MethodInfo] = {
    "random": _selection("Random", "real images", "-", "real images drawn at random"),
    "herding": _selection(
        "Herding", "trained network", "Welling 2009", "real images whose mean feature stays near the class mean"
    ),
    "forgetting": _selection("Forgetting", "trained network", "Toneva et al. 2019", "real images forgotten most often"),
    "dc": _gradients("Zhao et al. 2021", "gradients of real and synthetic batches agree, class by class", settings="DcConfig"),
    "dsa": _gradients("Zhao and Bilen 2021", "DC under one augmentation of both batches"),
    "dm": MethodInfo(
        "dstill.methods.distribution_matching:DistributionMatching",
        "dstill.methods.settings:DistributionMatchingConfig",
        "distribution matching",
        "real images",
        "hard",
        "Zhao and Bilen 2023",
        "mean features of random networks agree",
    ),
    "cafe": MethodInfo(
        "dstill.methods.cafe:Cafe",
        "dstill.methods.settings:CafeConfig",
        "distribution matching",
        "real images",
        "hard",
        "Wang et al. 2022",
        "features of every layer agree, and synthetic centres classify real features",
    ),
    "frepo": MethodInfo(
        "dstill.methods.frepo:Frepo",
        "dstill.methods.settings:FrepoConfig",
        "kernel regression",
        "real images",
        "soft",
        "Zhou et al. 2022",
        "ridge regression on the features of a pool of networks; labels are learned",
    ),
    "mtt": _trajectories("Cazenavette et al. 2022", "segments of plain SGD experts"),
    "tesla": _trajectories(
        "Cui et al. 2023", "approximate gradient, labels from the target expert", "soft", settings="TeslaConfig"
    ),
    "ftd": _trajectories("Du et al. 2023", "flat experts (GSAM), moving average of the images", settings="FtdConfig"),
    "ast": _trajectories(
        "Shen, Yang, Lam",
        "smooth experts, representative start, balanced loss, intermediate matching, perturbation",
        settings="AstConfig",
    ),
}


@functools.cache
def methods() -> dict[str, MethodInfo]:
    """All methods: dstill's own, and those that installed packages register.

    Raises:
        DstillError: a package registers something else than a `MethodInfo`, or a name that is taken, or cannot be imported.
    """
    found = dict(METHODS)
    for point in metadata.entry_points(group=ENTRY_POINTS):
        reason = "the name is taken" if point.name in found else ""
        try:
            info = point.load()
        except Exception as error:  # whatever that package does when it is imported
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = reason or _fault(info)
        if reason:
            raise DstillError(f"method {point.name!r} of {point.value} cannot be registered: {reason}; uninstall or mend it")
        found[point.name] = info
    return found


def _fault(info: object) -> str:
    if not isinstance(info, MethodInfo):
        return f"it is a {type(info).__name__}, not a MethodInfo"
    if info.needs not in get_args(Need):
        return f"needs is {info.needs!r}, not one of {', '.join(get_args(Need))}"
    return "" if info.labels in ("hard", "soft") else f"labels is {info.labels!r}, not hard or soft"


def method_info(name: str) -> MethodInfo:
    """The table's entry.

    Raises:
        DstillError: the name is unknown.
    """
    if name not in methods():
        raise DstillError(f"unknown method {name!r}; {suggest(name, methods())}")
    return methods()[name]
