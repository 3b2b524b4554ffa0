"""Examples in docstrings run in an empty folder, with a cache of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.caches import with_kernels


@pytest.fixture(autouse=True)
def examples_leave_nothing_behind(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(request.node, pytest.DoctestItem):
        return
    folder: Path = tmp_path_factory.mktemp("example")
    monkeypatch.setenv("DSTILL_CACHE", str(with_kernels(folder / "cache")))
    monkeypatch.chdir(folder)
