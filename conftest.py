"""Examples in docstrings run in an empty folder, with a cache of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstill.support.cache import cache_folder


@pytest.fixture(autouse=True)
def examples_leave_nothing_behind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(request.node, pytest.DoctestItem):
        return
    folder: Path = tmp_path_factory.mktemp("example")
    compiled = cache_folder(None) / "native"  # kernels are compiled once for all
    compiled.mkdir(parents=True, exist_ok=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "native").symlink_to(compiled, target_is_directory=True)
    monkeypatch.setenv("DSTILL_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
