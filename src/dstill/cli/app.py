"""The application that commands register with."""

from __future__ import annotations

from cyclopts import App

from dstill.version import __version__

app = App(
    name="dstill",
    version=__version__,
    help="Dataset distillation: a large labelled image set in, a tiny synthetic one out.",
    version_flags=["--version"],
    suppress_keyboard_interrupt=False,  # `main` handles it
)
