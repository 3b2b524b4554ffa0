"""The library `datasets` without progress bars."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Switches the progress bars of `datasets` off, and restores the setting afterwards."""
    import datasets

    quiet = not datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    """`datasets.load_dataset` without progress bars."""
    import datasets

    with without_progress_bars():
        return datasets.load_dataset(*args, **kwargs)
