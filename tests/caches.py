"""Caches of their own for tests that start processes."""

from __future__ import annotations

from pathlib import Path

from dstill.support.cache import cache_folder

_COMPILED = cache_folder() / "native"


def with_kernels(cache: Path) -> Path:
    """A new cache that has the kernels of the user's own, since compiling them takes eight seconds.

    Tests that start no process compile them there as well.

    Args:
        cache: its folder; one that exists is left as it is.
    """
    if not cache.exists():
        _COMPILED.mkdir(parents=True, exist_ok=True)
        cache.mkdir(parents=True)
        (cache / "native").symlink_to(_COMPILED, target_is_directory=True)
    return cache
