"""Classes given as text, `package.module:Class`: those in dstill's own tables and those that users write."""

from __future__ import annotations

import importlib
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
