"""The command line: every command is the public function of the same name. Importing this never imports torch."""

from __future__ import annotations

import os
import sys

from dstill.cli import files, judge, make  # noqa: F401 - they register their commands
from dstill.cli.app import app
from dstill.errors import DstillError


def main() -> None:
    """Entry point: one sentence instead of a traceback for whatever the user can put right."""
    debug = "--debug" in sys.argv
    try:
        app()
    except DstillError as error:
        if debug:
            raise
        print(f"dstill: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ndstill: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


if __name__ == "__main__":
    main()
