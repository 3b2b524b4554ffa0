"""The exceptions that a user can cause, and the words of their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DstillError(ValueError):
    """Something that the user asked for cannot be done. The message says what, for which value, and what to do instead.

    The command line prints the message alone and exits with code 2; with `--debug` it shows the traceback.

    Example:
        >>> from dstill.data.siamese import parse
        >>> try:
        ...     parse("flip_crp")
        ... except DstillError as error:
        ...     print(error)
        unknown augmentation 'crp' in 'flip_crp'; did you mean crop?
    """


class DstillWarning(UserWarning):
    """Something that can be done, but is probably not what the user wants. The message says what to do."""


def suggest(value: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known names closest to it, or all of them if none is close.

    Args:
        value: the unknown name.
        known: the known names.

    Example:
        >>> suggest("cifra10", ["cifar10", "cifar100", "digits"])
        'did you mean cifar10 or cifar100?'
    """
    names = sorted(known)
    close = difflib.get_close_matches(value, names, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names)}"


class CollapseError(DstillError):
    """A distillation collapsed: its numbers are no longer usable, because its steps are too large for what it matches."""


class DamagedFileError(DstillError):
    """A file is not as it was written: it is cut off, changed or empty."""


def reason_of(error: Exception) -> str:
    """Why a run failed, in the words that a table shows.

    Example:
        >>> reason_of(DstillError("no images")), reason_of(KeyError("x"))
        ('no images', "KeyError: 'x'")
    """
    return str(error) if isinstance(error, DstillError) else f"{type(error).__name__}: {error}"
