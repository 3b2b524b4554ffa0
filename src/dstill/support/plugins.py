"""Classes given as text, `package.module:Class`: those in dstill's own tables and those that users write."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from dstill.errors import DstillError


def load_class(path: str, what: str) -> Any:
    """The class at `package.module:Class`.

    Args:
        path: the module and the class.
        what: what the class is, for the error; for example `network`.

    Raises:
        DstillError: the module or the class cannot be imported.

    Example:
        >>> load_class("collections:Counter", "class")
        <class 'collections.Counter'>
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DstillError(f"{what} {path!r} cannot be imported: {error}. Is it installed or on PYTHONPATH?") from error


def name_of(thing: Any, table: Mapping[str, str], what: str) -> str:
    """The name of a class or a factory in a table of paths, else its own path, by which it can be imported again.

    Args:
        thing: a class or a function at the top level of a module; text is returned as it is.
        table: paths `package.module:Class` by name.
        what: how the error calls it, such as `network`.

    Raises:
        DstillError: it cannot be imported by its name, as is true of a lambda or of a class within a function.

    Example:
        >>> name_of(Mapping, {"map": "collections.abc:Mapping"}, "table")
        'map'
    """
    if isinstance(thing, str):
        return thing
    module, name = getattr(thing, "__module__", ""), getattr(thing, "__qualname__", "")
    path = f"{module}:{name}"
    if not name.isidentifier() or load_class(path, what) is not thing:
        raise DstillError(f"{what} {thing!r} cannot be found again by name: define it at the top level of a module")
    return {path: known for known, path in table.items()}.get(path, path)
