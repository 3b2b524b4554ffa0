"""The one exception that a user can cause."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DstillError(ValueError):
    """Something the user asked for cannot be done; the message says what, which value, and what to do instead.

    The command line prints the message alone and exits with code 2; `--debug` shows the traceback.
    """


def suggest(value: str, known: Iterable[str]) -> str:
    """The tail of a "not known" message: the closest known names, or all of them.

    Example:
        >>> suggest("cifra10", ["cifar10", "cifar100", "digits"])
        'did you mean cifar10 or cifar100?'
    """
    names = sorted(known)
    close = difflib.get_close_matches(value, names, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"


class CollapseError(DstillError):
    """A distillation left what can be computed with: its steps are too large for what it matches."""


class DamagedFileError(DstillError):
    """A file is not what was written: cut off, changed, or empty."""


def reason_of(error: Exception) -> str:
    """Why a run failed, as a row of a table keeps it."""
    return str(error) if isinstance(error, DstillError) else f"{type(error).__name__}: {error}"
