"""The entry point of the command line.

Importing this does not import torch.
"""

from __future__ import annotations

import errno
import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from dstill.cli import files, judge, make  # noqa: F401 - they register their commands
from dstill.cli.app import app
from dstill.cli.options import TEAM
from dstill.errors import DstillError, DstillWarning
from dstill.support.console import printable
from dstill.support.stopping import Terminated, raise_on_sigterm

_FAULTS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file is larger than this system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EISDIR: "a folder is where a file should be",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.EEXIST: "a file is where a folder should be",
    errno.EMFILE: "too many files are open",
    errno.ENFILE: "too many files are open on this system",
    errno.ENOMEM: "out of memory",
}


def machine_fault(error: BaseException) -> str | None:
    """What the machine lacks, in words; None for other errors."""
    if isinstance(error, OSError) and error.errno in _FAULTS:
        return _FAULTS[error.errno] + (f" ({error.filename})" if error.filename else "")
    text = str(error)
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        return "out of memory: " + text.splitlines()[0]
    return None


def _show(others: Callable[..., None], message: Warning | str, *about: Any, **more: Any) -> None:
    """Shows a warning of dstill without the line of code that gave it, and other warnings as Python does."""
    if isinstance(message, DstillWarning):
        print(f"dstill: {printable(str(message))}", file=sys.stderr)
    else:
        others(message, *about, **more)


def _command() -> None:
    """Runs the command; or, in a process that torchrun has started beside another one, works for that one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return app()
    from dstill.support.ranks import Rank, leading, serve

    rank = Rank.of_environment()
    if rank is None:
        app()
    elif rank.number > 0:
        serve(rank)
    else:
        with leading(rank) as team:
            TEAM.set(team)
            app()


def main() -> None:
    """Entry point. Prints one sentence instead of a traceback for everything that the user can fix."""
    debug = "--debug" in sys.argv
    raise_on_sigterm()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show, warnings.showwarning)
            _command()
    except DstillError as error:
        if debug:
            raise
        print(f"dstill: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ndstill: interrupted; what was stored is kept, and the same command resumes from there", file=sys.stderr)
        sys.exit(130)
    except Terminated:
        print("\ndstill: terminated; what was stored is kept, and the same command resumes from there", file=sys.stderr)
        sys.exit(143)
    except MemoryError:
        print("dstill: out of memory; what was stored is kept, and dstill plan estimates what a run takes", file=sys.stderr)
        sys.exit(3)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (OSError, RuntimeError) as error:  # torch reports a lack of memory as the latter
        sentence = machine_fault(error)
        if debug or sentence is None:
            raise
        print(f"dstill: {sentence}; what was stored is kept, and the same command resumes from there", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
