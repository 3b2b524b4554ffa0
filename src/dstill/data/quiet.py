"""`datasets` without bars on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keeps `datasets` from writing bars to the terminal."""
    import datasets

    quiet = not datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not quiet:
            datasets.enable_progress_bars()


def load_dataset(*args: Any, **kwargs: Any) -> Any:
    import datasets

    with without_progress_bars():
        return datasets.load_dataset(*args, **kwargs)
