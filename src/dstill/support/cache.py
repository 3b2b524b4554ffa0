"""Where what runs share is kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache: str | Path | None = None) -> Path:
    """The folder that keeps experts and whitening for every run: `cache`, else $DSTILL_CACHE, else ~/.cache/dstill."""
    chosen = cache or os.environ.get("DSTILL_CACHE") or Path.home() / ".cache" / "dstill"
    return Path(chosen).expanduser()
