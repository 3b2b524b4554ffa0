"""Devices are there or named in an error, and memory is what can be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstill.errors import DstillError
from dstill.support import devices
from dstill.support.devices import resolve_device


def test_a_card_that_is_not_there_is_refused_with_the_number_of_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1") and resolve_device("cuda") == torch.device("cuda")
    with pytest.raises(DstillError, match=r"has 2 cuda device\(s\), so 'cuda:2' is none of them: take cuda:0 to cuda:1"):
        resolve_device("cuda:2")


def test_cached_files_count_as_memory_that_a_container_can_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "Path", lambda _: tmp_path)
    assert devices._group_available() == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 600\ninactive_file 500\nactive_file 100\n")
    assert devices._group_available() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert devices._group_available() == float("inf")
