"""YAML as people expect it: 1e-5 is a number, `off` is a word. Safe loading only."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from dstill.config.settings import Recipe, Settings, settings_class
from dstill.errors import DstillError, suggest

S = TypeVar("S", bound=Settings)


_FLOAT = re.compile(r"^[-+]?(?:\d+\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)$")


_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$")


class _Loader(yaml.SafeLoader):
    """SafeLoader with the booleans and numbers of YAML 1.2, in which 12:00:00 is a word.

    It refuses aliases: a few lines of them can expand to gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases are not supported", self.peek_event().start_mark)
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse(text: str, where: str) -> Any:
    """The value of a YAML document.

    Raises:
        DstillError: the text is not YAML; names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except Exception as error:  # includes constructors at a date such as 2024-13-45, and RecursionError
        raise DstillError(f"{where} is not valid YAML: {error}") from error


class _Dumper(yaml.SafeDumper):
    """SafeDumper that writes no aliases, and quotes the words which `_Loader` would take for numbers, such as 1e5."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def dump(values: Any) -> str:
    """Plain values as YAML text that `parse` reads back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def located(name: str, folder: Path, what: str, known: Callable[[], Sequence[str]]) -> Path:
    """The file that a name stands for in a folder, or that a path names.

    Args:
        name: a name, or the path of a YAML file.
        folder: where named files lie.
        what: what they are, for errors.
        known: the known names.

    Raises:
        DstillError: the name is unknown, or the file does not exist.
    """
    is_file = name.endswith((".yaml", ".yml"))
    path = Path(name) if is_file else folder / f"{name}.yaml"
    if path.is_file():
        return path
    raise DstillError(
        f"the {what} file {name} does not exist" if is_file else f"unknown {what} {name!r}; {suggest(name, known())}"
    )


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        DstillError: the file cannot be read, or does not hold a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DstillError(f"{path} cannot be read: {error}") from error
    value = parse(text, str(path))
    if not isinstance(value, dict):
        raise DstillError(f"{path} must hold keys and values, it holds {type(value).__name__}")
    return value


def validate(model: type[S], values: Any, where: str) -> S:
    """Settings of a model from plain values.

    Raises:
        DstillError: an unknown key (with the closest known one), or a wrong type or value, with its dotted path.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise DstillError("; ".join(_explain(model, values, problem, where) for problem in error.errors()[:3])) from error


def _explain(model: type[Settings], values: Any, problem: Any, where: str) -> str:
    path = [str(part) for part in problem["loc"]]
    if problem["type"] != "extra_forbidden":
        given = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
        return f"{where}: {'.'.join(path) or 'settings'}: {problem['msg'].removeprefix('Value error, ')}{given}"
    return f"{where}: unknown key {'.'.join(path)!r}; {suggest(path[-1], _fields(model, path[:-1], values))}"


def _fields(model: type[Settings], path: list[str], values: Any) -> list[str]:
    """Names of the fields of the settings nested at `path`."""
    if model is Recipe and path[:1] == ["distill"]:
        model, path = settings_class(values["method"]), path[1:]
    for part in path:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, Settings))
    return list(model.model_fields)
