"""Classes named as text, `package.module:Class`: dstill's own tables and the user's own code alike."""

from __future__ import annotations

import importlib
from typing import Any

from dstill.errors import DstillError


def load_class(path: str, what: str) -> Any:
    """The class at `package.module:Class`.

    Args:
        path: where it is.
        what: how the error calls it, such as `network`.

    Raises:
        DstillError: the module or the class cannot be imported.
    """
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise DstillError(f"{what} {path!r} cannot be imported: {error}. Is it installed or on PYTHONPATH?") from error
