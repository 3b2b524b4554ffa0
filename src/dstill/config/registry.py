"""The table of methods. A new method takes one file and one line here, or an entry point of another package.

Nothing here imports torch. Another package registers a method by an entry point of the group `dstill.methods`. The entry
point's name is the method's name, and its value is a `MethodInfo`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any, Literal, get_args

from dstill.errors import DstillError, suggest
from dstill.support.plugins import load_class

ENTRY_POINTS = "dstill.methods"
Need = Literal["real images", "experts", "trained network"]
Labels = Literal["hard", "soft"]


@dataclass(frozen=True)
class MethodInfo:
    """Facts about a method that are known without importing it.

    Attributes:
        path: `module:Class` of a `dstill.methods.base.Method`.
        family: the family of methods, such as `trajectory matching`.
        needs: what is trained first. `experts`: expert trajectories; `trained network`: one network trained on the real
            images, or as many as `DistillConfig.network_count` says, with the number of times each forgot each of them;
            `real images`: nothing.
        labels: `hard` class ids, or `soft` labels that are part of the result.
        paper: who published it.
        note: one line for `dstill ls methods`.
        curves: further metrics that reports draw, and their titles; `loss` and `alpha` are always drawn.

    Example:
        >>> info = MethodInfo("my_package:Mine", family="mine", needs="real images", labels="hard", note="a line")
        >>> info.needs_experts
        False
    """

    path: str
    family: str
    needs: Need = "real images"
    labels: Labels = "hard"
    paper: str = "-"
    note: str = ""
    curves: Mapping[str, str] = field(default_factory=dict)

    @property
    def needs_experts(self) -> bool:
        return self.needs == "experts"


METHODS: dict[str, MethodInfo] = {
    "random": MethodInfo("dstill.methods.random:Random", "selection", note="real images drawn at random"),
    "herding": MethodInfo(
        "dstill.methods.herding:Herding",
        "selection",
        needs="trained network",
        paper="Welling 2009",
        note="real images whose mean feature stays near the class mean",
    ),
    "forgetting": MethodInfo(
        "dstill.methods.forgetting:Forgetting",
        "selection",
        needs="trained network",
        paper="Toneva et al. 2019",
        note="real images forgotten most often",
    ),
    "kmeans": MethodInfo(
        "dstill.methods.kmeans:KMeans",
        "selection",
        needs="trained network",
        paper="Lloyd 1982",
        note="real images nearest to the centroids of K-Means on features",
    ),
    "k-centre": MethodInfo(
        "dstill.methods.k_centre:KCentre",
        "selection",
        needs="trained network",
        paper="Sener and Savarese 2018",
        note="real images that leave no feature far from a chosen one",
    ),
    "grand": MethodInfo(
        "dstill.methods.grand:Grand",
        "selection",
        needs="trained network",
        paper="Paul et al. 2021",
        note="real images with the smallest gradients early in training, or the largest",
    ),
    "el2n": MethodInfo(
        "dstill.methods.el2n:El2n",
        "selection",
        needs="trained network",
        paper="Paul et al. 2021",
        note="real images with the smallest errors early in training, or the largest",
    ),
    "dc": MethodInfo(
        "dstill.methods.dc:Dc",
        "gradient matching",
        paper="Zhao et al. 2021",
        note="gradients of real and synthetic batches agree, class by class",
    ),
    "dsa": MethodInfo(
        "dstill.methods.dsa:Dsa",
        "gradient matching",
        paper="Zhao and Bilen 2021",
        note="DC under one augmentation of both batches",
    ),
    "dm": MethodInfo(
        "dstill.methods.distribution_matching:DistributionMatching",
        "distribution matching",
        paper="Zhao and Bilen 2023",
        note="mean features of random networks agree",
    ),
    "cafe": MethodInfo(
        "dstill.methods.cafe:Cafe",
        "distribution matching",
        paper="Wang et al. 2022",
        note="features of every layer agree, and synthetic centres classify real features",
    ),
    "frepo": MethodInfo(
        "dstill.methods.frepo:Frepo",
        "kernel regression",
        labels="soft",
        paper="Zhou et al. 2022",
        note="ridge regression on the features of a pool of networks; labels are learned",
    ),
    "bptt": MethodInfo(
        "dstill.methods.bptt:Bptt",
        "training through training",
        paper="Wang et al. 2018",
        note="the real loss, differentiated through a short training; step sizes are learned",
    ),
    "rat-bptt": MethodInfo(
        "dstill.methods.rat_bptt:RatBptt",
        "training through training",
        paper="Feng et al. 2024",
        note="the real loss, differentiated through a window of a long training, placed at random",
    ),
    "mtt": MethodInfo(
        "dstill.methods.mtt:Mtt",
        "trajectory matching",
        needs="experts",
        paper="Cazenavette et al. 2022",
        note="segments of plain SGD experts",
    ),
    "tesla": MethodInfo(
        "dstill.methods.tesla:Tesla",
        "trajectory matching",
        needs="experts",
        labels="soft",
        paper="Cui et al. 2023",
        note="approximate gradient, labels from the target expert",
    ),
    "ftd": MethodInfo(
        "dstill.methods.ftd:Ftd",
        "trajectory matching",
        needs="experts",
        paper="Du et al. 2023",
        note="flat experts (GSAM), moving average of the images",
    ),
    "datm": MethodInfo(
        "dstill.methods.datm:Datm",
        "trajectory matching",
        needs="experts",
        labels="soft",
        paper="Guo et al. 2024",
        note="learned labels, start epochs that grow with the run",
    ),
    "ast": MethodInfo(
        "dstill.methods.ast:Ast",
        "trajectory matching",
        needs="experts",
        paper="Shen, Yang, Lam",
        note="smooth experts, representative start, balanced loss, intermediate matching, perturbation",
    ),
}


@functools.cache
def methods() -> dict[str, MethodInfo]:
    """All methods: those of dstill, and those that installed packages register.

    Raises:
        DstillError: a package registers something other than a `MethodInfo`, uses a name that is taken, or cannot be imported.
    """
    found = dict(METHODS)
    for point in metadata.entry_points(group=ENTRY_POINTS):
        reason = "the name is taken" if point.name in found else ""
        try:
            info = point.load()
        except Exception as error:  # importing the package may raise anything
            reason = f"{type(error).__name__}: {error}"
        else:
            reason = reason or _fault(info)
        if reason:
            raise DstillError(f"method {point.name!r} of {point.value} cannot be registered: {reason}; uninstall or repair it")
        found[point.name] = info
    return found


def _fault(info: object) -> str:
    if not isinstance(info, MethodInfo):
        return f"it is a {type(info).__name__}, not a MethodInfo"
    if info.needs not in get_args(Need):
        return f"needs is {info.needs!r}, not one of {', '.join(get_args(Need))}"
    return "" if info.labels in get_args(Labels) else f"labels is {info.labels!r}, not hard or soft"


def known(name: object) -> bool:
    """Whether a file may name this method: it is registered, or a class of a module that is already imported.

    A file must not decide what is imported.

    Example:
        >>> known("ast"), known("somewhere.else:Method")
        (True, False)
    """
    if not isinstance(name, str):
        return False
    return name.partition(":")[0] in sys.modules if ":" in name else name in METHODS or name in methods()


def method_info(name: str) -> MethodInfo:
    """The entry of a method in the table, or the `info` of your own `package.module:Class`.

    Raises:
        DstillError: the name is unknown.
    """
    if name in METHODS:  # avoids importing other packages
        return METHODS[name]
    if ":" in name:
        said = getattr(load_class(name, "method"), "info", None)
        return replace(said, path=name) if isinstance(said, MethodInfo) else MethodInfo(name, "your own")
    if name not in methods():
        raise DstillError(f"unknown method {name!r}; {suggest(name, methods())}")
    return methods()[name]


def load_method(name: str) -> Any:
    """Imports the class of a method; `dstill.methods.base.method_class` returns it with its type.

    Raises:
        DstillError: the name is unknown, or the class cannot be imported, or is not a method.
    """
    found = load_class(method_info(name).path, f"method {name!r}")
    if not (isinstance(found, type) and hasattr(found, "Settings")):
        raise DstillError(f"method {name!r} is {found!r}, which is no class of dstill.Method: derive it from dstill.Method")
    return found


def curve_titles(method: str) -> dict[str, str]:
    """Metrics that reports draw for a method, and their titles; those of all methods if this one is not installed.

    Example:
        >>> curve_titles("dm")
        {'loss': 'Objective', 'alpha': 'Learning rate α'}
    """
    own = method_info(method).curves if known(method) else {}
    return {"loss": "Objective", "alpha": "Learning rate α", **own}
