"""Recipes: every published setting is a file. Recipes are found by name, changed by flags, or derived for other data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dstill.config import yamls
from dstill.config.registry import method_info
from dstill.config.settings import Case, ExpertConfig, Recipe, canonical, settings_class
from dstill.data.catalog import DATASETS, Shape
from dstill.errors import DstillError

_FOLDER = Path(__file__).parent / "recipe_files"
# Data sets that share the recipes of another name.
_SHARED = dict.fromkeys(("nette", "woof", "meow", "squawk", "fruit", "yellow"), "imagenet-subset")
# Side and number of classes of the data sets that have recipes, to find the one nearest to other data.
_PUBLISHED = {"cifar10": (32, 10), "cifar100": (32, 100), "tiny-imagenet": (64, 200), "imagenet-subset": (128, 10)}
_ZCA_MAX_PIXELS = 3 * 48 * 48
DERIVED = "derived from"  # first words of the note of settings derived for a case without a recipe
_FOREIGN = 100.0  # distance added for another data set: more than between any two cases of the same one


def recipe_names() -> list[str]:
    """Names of all shipped recipes, `<data>/<method>[-<form>]-ipc<k>`.

    Without a form they are the paper's; `released` is its code, `tuned` was tuned here, `smooth` is on AST's experts.
    """
    return sorted(path.relative_to(_FOLDER).with_suffix("").as_posix() for path in _FOLDER.glob("*/*.yaml"))


def recipe_heads() -> dict[str, dict[str, Any]]:
    """The first keys of the shipped recipes, by name: note, data, method, IPC. Imports no method."""
    files = {name: yamls.read_mapping(_FOLDER / f"{name}.yaml") for name in recipe_names()}
    return {name: {key: values[key] for key in ("note", "data", "method", "ipc")} for name, values in files.items()}


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from your own YAML file.

    Args:
        name: a name of `dstill ls recipes`, or a path that ends in .yaml.

    Returns:
        The settings. Keys that the file leaves out take the method's defaults.

    Raises:
        DstillError: unknown name, unknown key, wrong type.

    Example:
        >>> recipe = load_recipe("cifar10/ast-ipc1")
        >>> recipe.method, recipe.ipc, recipe.distill.iterations
        ('ast', 1, 5000)
    """
    path = yamls.located(name, _FOLDER, "recipe", lambda: ["smoke", *recipe_names()])
    return yamls.validate(Recipe, yamls.read_mapping(path), f"recipe {name}")


def resolve(
    recipe: str | None,
    data: str,
    shape: Shape,
    *,
    method: str | None,
    ipc: int | None,
    changes: Sequence[str] = (),
    memory: float = math.inf,
    name: str = "",
) -> tuple[Recipe, str]:
    """The settings of a run, and a sentence on where they come from.

    Args:
        recipe: name or file; `smoke` for a tiny run on any data; None for the data set's own recipe (the tuned one if there
            is one), or else settings derived from the nearest recipe.
        data: name in the catalogue of the data set that the real data are; empty for all others, whatever they are called.
        shape: shape of the real data.
        method: must agree with the recipe's method; `ast` if neither is given.
        ipc: overrides the recipe's; 1 if neither is given.
        changes: assignments `section.key=value`, applied last.
        memory: memory of the device in bytes, which derived settings must fit.
        name: what the real data are called in messages and notes; `data` if left out. It has no other effect.

    Raises:
        DstillError: see `load_recipe`; or a change names an unknown key.
    """
    if method is not None:
        method_info(method)
    if ipc is not None and ipc < 1:
        raise DstillError(f"ipc must be at least 1, got {ipc}")
    about = _About(data, name or data, shape, memory)
    if recipe == "smoke":
        found = _smoke(_default(about, method or "ast", ipc or 1)[0])
        origin = "settings of a smoke run: they show that everything works, not what accuracy is possible"
    elif recipe is None:
        found, origin = _default(about, method or "ast", ipc or 1)
    else:
        found, origin = load_recipe(recipe), f"recipe {recipe}"
        check_method(found, method, f"recipe {recipe}")
    flags = {key: value for key, value in (("method", method), ("ipc", ipc)) if value is not None}
    values = {**found.model_dump(), **flags}
    assign(values, changes)
    return yamls.validate(Recipe, values, "--set" if changes else origin), origin


class _About(NamedTuple):
    """The data for which settings are wanted: what they are, if the catalogue knows it, and what they are called."""

    known: str
    name: str
    shape: Shape
    memory: float


def check_method(recipe: Recipe, method: str | None, name: str) -> None:
    """Raises `DstillError` if the method is not the recipe's, whose settings would not apply to it."""
    if method is not None and method != recipe.method:
        raise DstillError(f"{name} is for method {recipe.method!r}, not {method!r}: leave one of the two out")


def assignments(changes: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Changes as assignments `section.key=value`.

    Raises:
        DstillError: `changes` is neither a mapping nor a list of assignments.

    Example:
        >>> assignments({"distill": {"iterations": 300}, "net.width": 32})
        ['distill.iterations=300', 'net.width=32']
    """
    if isinstance(changes, str) or not isinstance(changes, Mapping | Sequence):
        raise DstillError(f"changes must be a mapping or a list of 'section.key=value', got {changes!r}")
    if not isinstance(changes, Mapping):
        return list(changes)
    found: list[str] = []
    for key, value in changes.items():
        if isinstance(value, Mapping) and value:
            found += [f"{key}.{inner}" for inner in assignments(value)]
        else:
            found.append(f"{key}={json.dumps(value)}")
    return found


def assign(values: dict[str, Any], changes: Sequence[str]) -> None:
    """Applies assignments to the nested plain values of a recipe."""
    for change in changes:
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


def _default(about: _About, method: str, ipc: int) -> tuple[Recipe, str]:
    name = published(about.known, method, ipc)
    if name is not None:
        chosen = _tuned(name)
        return load_recipe(chosen), f"recipe {chosen}" + (f" (as published: {name})" if chosen != name else "")
    if _comparable(about, method):
        return _derived(about, method, ipc)
    like, _ = _default(about, "ast", ipc)
    settings = settings_class(method)
    experts = ExpertConfig(**settings.expert_defaults()) if method_info(method).needs_experts else None
    update = {"data": about.name, "method": method, "experts": experts, "distill": settings(), "note": ""}
    return like.model_copy(update=update), "the method's own settings; preprocessing, network and augmentation are those of ast"


def published(data: str, method: str, ipc: int) -> str | None:
    """Name of the recipe with a method's published settings for a case; None if there is none."""
    name = f"{_SHARED.get(data, data)}/{method}-ipc{ipc}"
    return name if name in recipe_names() else None


def _tuned(name: str) -> str:
    """The recipe with settings tuned here, if there is one beside the published one."""
    tuned = name.replace("-ipc", "-tuned-ipc")
    return tuned if tuned in recipe_names() else name


def _distance(about: _About, ipc: int, name: str) -> float:
    """How far these data and IPC are from those of a recipe, of which the name says all that is needed."""
    data, _, rest = name.partition("/")
    steps = abs(math.log2(ipc / int(rest.rpartition("-ipc")[2])))
    if data == about.known:
        return steps
    side, classes = _PUBLISHED[data]
    return _FOREIGN + abs(math.log2(about.shape.side / side)) + abs(math.log2(about.shape.classes / classes)) + steps


def _comparable(about: _About, method: str) -> list[str]:
    """The method's recipes from which settings for these data can be derived."""
    return [
        name
        for name in recipe_names()
        if name.split("/")[0] in {*_PUBLISHED, about.known} and name.split("/")[1].startswith(f"{method}-ipc")
    ]


def _derived(about: _About, method: str, ipc: int) -> tuple[Recipe, str]:
    """Settings for a case without a recipe: those of the nearest recipe, adapted.

    A recipe of the same data set at another IPC is nearest. Otherwise published cases are compared by side, classes and IPC.
    """
    nearest = _tuned(min(_comparable(about, method), key=lambda name: _distance(about, ipc, name)))
    base, missing = load_recipe(nearest), f"no recipe for {about.name} at IPC {ipc}: settings derived from {nearest}"
    own = base.data == about.known
    depth = base.net.depth if own and base.net.depth else usual_depth(about.shape.side)
    case = Case(about.shape, ipc, base.net.model_copy(update={"depth": depth}), _mirrors(about.known), about.memory)
    update: dict[str, Any] = {"ipc": ipc, "distill": base.distill.adapted(case), "note": f"{DERIVED} {nearest}"}
    if own:
        return base.model_copy(update=update), missing
    update["distill"], cut = update["distill"].fitted(case)
    update |= {
        "data": about.name,
        "net": case.net,
        "augmentation": _augmentation(base.augmentation, case.mirror),
        "preprocess": _preprocess(base.preprocess, about.shape),
    }
    return base.model_copy(update=update), f"{missing}{cut}. dstill tune finds better ones on a validation part"


def usual_depth(side: int) -> int:
    """Blocks of a ConvNet for images of this side: the published depth from 16 pixels on, one more for smaller images."""
    return max(1, min(5, int(math.log2(side)) - 2)) if side >= 16 else max(1, int(math.log2(side)) - 1)


def _mirrors(name: str) -> bool:
    """Whether a mirrored image keeps its class; assumed for unknown data."""
    return name not in DATASETS or DATASETS[name].mirror


def _augmentation(strategy: str, mirror: bool) -> str:
    """The augmentation, without mirroring for data whose classes it changes."""
    return strategy if mirror else "_".join(op for op in strategy.split("_") if op != "flip")


def _preprocess(kind: Literal["standardise", "zca"], shape: Shape) -> Literal["standardise", "zca"]:
    """ZCA only for small images: its memory grows with the square of the pixels, its time with the cube."""
    return kind if shape.numbers <= _ZCA_MAX_PIXELS else "standardise"


def _smoke(recipe: Recipe) -> Recipe:
    """A recipe reduced to a run of seconds: narrow network, two short experts, a few iterations."""
    net = recipe.net.model_copy(update={"width": 8})
    update: dict[str, Any] = {"net": net, "protocol": "quick", "distill": recipe.distill.smoke()}
    if recipe.experts:
        update["experts"] = recipe.experts.model_copy(update={"count": 2, "epochs": None, "compile": False})
    return recipe.model_copy(update=update)


def dump(recipe: Recipe) -> str:
    """A recipe as YAML text for `load_recipe`. Null is written if leaving the key out would mean the method's default."""
    short = canonical(recipe, exclude_none=True)
    return yamls.dump(short if Recipe.model_validate(short) == recipe else canonical(recipe))


def changed(recipe: Recipe, changes: Sequence[str], where: str) -> Recipe:
    """A recipe with assignments `section.key=value` applied; the result is checked."""
    values = recipe.model_dump()
    assign(values, changes)
    return yamls.validate(Recipe, values, where)
