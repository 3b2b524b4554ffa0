"""Recipes: every published setting as a file, and how one is found, changed by flags, or derived for other data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dstill.config import yamls
from dstill.config.registry import method_info
from dstill.config.settings import ExpertConfig, Recipe, canonical, settings_class
from dstill.data.catalog import DATASETS
from dstill.errors import DstillError, suggest
from dstill.methods.settings import MatchingConfig

_FOLDER = Path(__file__).parent / "recipe_files"
# Data sets that share the recipes of another name.
_SHARED = dict.fromkeys(("nette", "woof", "meow", "squawk", "fruit", "yellow"), "imagenet-subset")
# Side, classes of the data sets that recipes are written for: how near another data set is to them.
_PUBLISHED = {"cifar10": (32, 10), "cifar100": (32, 100), "tiny-imagenet": (64, 200), "imagenet-subset": (128, 10)}
_ZCA_MAX_PIXELS = 3 * 48 * 48
DERIVED = "derived from"  # begins the note of settings that no recipe was written for
_FOREIGN = 100.0  # added to the distance of other data: more than any two cases of one data set are apart


@dataclass(frozen=True)
class DataShape:
    """What settings depend on: name, colour channels, height and breadth in pixels, classes, bytes of memory at hand."""

    name: str
    channels: int
    size: tuple[int, int]
    classes: int
    memory: float = math.inf

    @property
    def side(self) -> int:
        """The shorter one: what the depth of a network depends on."""
        return min(self.size)


def recipe_names() -> list[str]:
    """Names of all shipped recipes, `<data>/<method>[-released|-tuned]-ipc<k>`: the paper's, its code's, what won here."""
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.glob("*/*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one in a YAML file of your own.

    Raises:
        DstillError: unknown name, unknown key, wrong type.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else _FOLDER / f"{name}.yaml"
    if not path.is_file() and path.parent != _FOLDER / Path(name).parent:
        raise DstillError(f"the recipe file {name} does not exist")
    if not path.is_file():
        raise DstillError(f"unknown recipe {name!r}; {suggest(name, ['smoke', *recipe_names()])}")
    return yamls.validate(Recipe, yamls.read_mapping(path), f"recipe {name}")


def resolve(
    recipe: str | None, shape: DataShape, *, method: str | None, ipc: int | None, changes: Sequence[str] = ()
) -> tuple[Recipe, str]:
    """The settings of a run and a sentence on where they come from.

    Args:
        recipe: name or file; `smoke` for a tiny run on any data; left out: the data set's own, tuned where there is one,
            else derived.
        shape: the real data.
        method: must agree with the recipe's; `ast` where there is neither.
        ipc: overrides the recipe's; 1 where there is neither.
        changes: `section.key=value` assignments, applied last.

    Raises:
        DstillError: see `load_recipe`; or an assignment names an unknown key.
    """
    if method is not None:
        method_info(method)
    if ipc is not None and ipc < 1:
        raise DstillError(f"ipc must be at least 1, got {ipc}")
    if recipe == "smoke":
        found = _smoke(_default(shape, method or "ast", ipc or 1)[0])
        origin = "settings of a smoke run: they show that everything works, not what it can reach"
    elif recipe is None:
        found, origin = _default(shape, method or "ast", ipc or 1)
    else:
        found, origin = load_recipe(recipe), f"recipe {recipe}"
        check_method(found, method, f"recipe {recipe}")
    flags = {key: value for key, value in (("method", method), ("ipc", ipc)) if value is not None}
    values = {**found.model_dump(), **flags}
    _assign(values, changes)
    return yamls.validate(Recipe, values, "--set" if changes else origin), origin


def check_method(recipe: Recipe, method: str | None, name: str) -> None:
    """Raises `DstillError` where another method is asked for than the recipe's, whose settings are not that one's."""
    if method is not None and method != recipe.method:
        raise DstillError(f"{name} is for method {recipe.method!r}, not {method!r}: leave one of the two out")


def _assign(values: dict[str, Any], changes: Sequence[str]) -> None:
    if isinstance(changes, str | Mapping):
        raise DstillError(f"changes are a list of 'section.key=value', got {changes!r}")
    for change in changes:
        _assign_one(values, change)


def _assign_one(values: dict[str, Any], change: str) -> None:
    path, separator, text = change.partition("=")
    if not separator:
        raise DstillError(f"{change!r} is not an assignment: write section.key=value, for example distill.iterations=300")
    *sections, key = path.strip().split(".")
    target = values
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise DstillError(f"{change!r}: {section} is a value, not a section")
    target[key] = yamls.parse(text, f"--set {change}")


def _default(shape: DataShape, method: str, ipc: int) -> tuple[Recipe, str]:
    name = published(shape.name, method, ipc)
    if name is not None:
        chosen = _tuned(name)
        return load_recipe(chosen), f"recipe {chosen}" + (f" (as published: {name})" if chosen != name else "")
    if _comparable(shape, method):
        return _derived(shape, method, ipc)
    like, _ = _default(shape, "ast", ipc)
    settings = settings_class(method)
    experts = ExpertConfig(**settings.expert_defaults()) if method_info(method).needs_experts else None
    update = {"data": shape.name, "method": method, "experts": experts, "distill": settings(), "note": ""}
    return like.model_copy(update=update), "the method's own settings; preprocessing, network and augmentation are those of ast"


def published(data: str, method: str, ipc: int) -> str | None:
    """Name of the recipe with a method's published settings for a case, None where there is none."""
    name = f"{_SHARED.get(data, data)}/{method}-ipc{ipc}"
    return name if name in recipe_names() else None


def _tuned(name: str) -> str:
    """The recipe with the settings that won here, where there is one beside the published one."""
    tuned = name.replace("-ipc", "-tuned-ipc")
    return tuned if tuned in recipe_names() else name


def _distance(shape: DataShape, ipc: int, candidate: Recipe) -> float:
    if candidate.data == shape.name:
        return abs(math.log2(ipc / candidate.ipc))
    side, classes = _PUBLISHED[candidate.data]
    return (
        _FOREIGN
        + abs(math.log2(shape.side / side))
        + abs(math.log2(shape.classes / classes))
        + abs(math.log2(ipc / candidate.ipc))
    )


def _comparable(shape: DataShape, method: str) -> list[str]:
    """The method's recipes that settings for these data can be derived from."""
    return [
        name
        for name in recipe_names()
        if name.split("/")[0] in {*_PUBLISHED, shape.name} and name.split("/")[1].startswith(f"{method}-ipc")
    ]


def _derived(shape: DataShape, method: str, ipc: int) -> tuple[Recipe, str]:
    """Settings for a case that no recipe was written for: those of the nearest one, cut to fit.

    The data set's own recipe of another IPC is nearest; else published cases are compared by side, classes and IPC.
    """
    nearest = _tuned(min(_comparable(shape, method), key=lambda name: _distance(shape, ipc, load_recipe(name))))
    base = load_recipe(nearest)
    depth = max(1, min(5, int(math.log2(shape.side)) - 2)) if shape.side >= 16 else max(1, int(math.log2(shape.side)) - 1)
    mirror = _mirrors(shape.name)
    if base.data == shape.name:
        distill = base.distill.adapted(ipc=ipc, depth=base.net.depth or depth, mirror=mirror)
        update: dict[str, Any] = {"ipc": ipc, "distill": distill, "note": f"{DERIVED} {nearest}"}
        return base.model_copy(update=update), f"no recipe for {shape.name} at IPC {ipc}: settings derived from {nearest}"
    net = base.net.model_copy(update={"depth": depth})
    distill, cut = base.distill.adapted(ipc=ipc, depth=depth, mirror=mirror), ""
    if isinstance(distill, MatchingConfig):
        steps = _steps_in_memory(distill, net.width or 128, depth, shape)
        batch = distill.batch_syn if distill.batch_syn is not None and distill.batch_syn < ipc * shape.classes else None
        cut = f"; N cut from {distill.student_steps} to {steps} to fit the memory" if steps < distill.student_steps else ""
        distill = distill.model_copy(update={"student_steps": steps, "batch_syn": batch})
    update = {
        "data": shape.name,
        "ipc": ipc,
        "net": net,
        "augmentation": _augmentation(base.augmentation, mirror),
        "preprocess": _preprocess(base.preprocess, shape),
        "distill": distill,
        "note": f"{DERIVED} {nearest}",
    }
    origin = (
        f"no recipe for {shape.name} at IPC {ipc}: settings derived from {nearest}{cut}. "
        "dstill tune finds better ones on a validation part"
    )
    return base.model_copy(update=update), origin


def _mirrors(name: str) -> bool:
    """Whether a mirrored image keeps its class; unknown data are taken to."""
    return name not in DATASETS or DATASETS[name].mirror


def _augmentation(strategy: str, mirror: bool) -> str:
    """Without the mirror for data whose classes it changes."""
    return strategy if mirror else "_".join(op for op in strategy.split("_") if op != "flip")


def _preprocess(kind: Literal["standardise", "zca"], shape: DataShape) -> Literal["standardise", "zca"]:
    """ZCA takes the square of the pixels in memory and their cube in time: only for small images."""
    return kind if shape.channels * math.prod(shape.size) <= _ZCA_MAX_PIXELS else "standardise"


def _steps_in_memory(distill: MatchingConfig, width: int, depth: int, shape: DataShape) -> int:
    """N, so that the kept parameter vectors (two a step with momentum) take at most a quarter of the memory."""
    last = math.prod(max(1, side >> depth) for side in shape.size)
    parameters = 9 * width * (shape.channels + width * (depth - 1)) + 3 * width * depth + (width * last + 1) * shape.classes
    vectors = 2 if distill.student_momentum else 1
    affordable = 0.25 * shape.memory / (4 * parameters * vectors)
    return max(distill.expert_epochs, int(min(distill.student_steps, affordable)))


def _smoke(recipe: Recipe) -> Recipe:
    """A recipe shrunk until it takes seconds: narrow network, two short experts, a few iterations."""
    net = recipe.net.model_copy(update={"width": 8})
    update: dict[str, Any] = {"net": net, "protocol": "quick", "distill": recipe.distill.smoke()}
    if recipe.experts:
        update["experts"] = recipe.experts.model_copy(update={"count": 2, "epochs": None, "compile": False})
    return recipe.model_copy(update=update)


def dump(recipe: Recipe) -> str:
    """A recipe as YAML text that `load_recipe` reads back; nulls where leaving a key out would mean the method's default."""
    short = canonical(recipe, exclude_none=True)
    return yamls.dump(short if Recipe.model_validate(short) == recipe else canonical(recipe))


def changed(recipe: Recipe, changes: Sequence[str], where: str) -> Recipe:
    """A recipe with `section.key=value` assignments applied and checked."""
    values = recipe.model_dump()
    _assign(values, changes)
    return yamls.validate(Recipe, values, where)
