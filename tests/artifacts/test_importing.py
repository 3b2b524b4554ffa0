"""What the caller says of a foreign set goes before what its files say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dstill.artifacts.importing import import_set
from dstill.data import preprocess
from dstill.data.real import RealSet


@pytest.mark.parametrize(
    ("stored", "told", "taken"), [(0.03, None, 0.03), (0.03, 0.5, 0.5), (None, 0.5, 0.5), (None, None, None)]
)
def test_a_learning_rate_that_is_told_goes_before_the_stored_one(
    tiny_real: RealSet, tmp_path: Path, stored: float | None, told: float | None, taken: float | None
) -> None:
    contents = {"images": torch.randn(3, 3, 8, 8), "labels": torch.arange(3)}
    if stored is not None:
        contents["lr"] = torch.tensor(stored, dtype=torch.float64)
    for name, tensor in contents.items():
        torch.save(tensor, tmp_path / f"{name}_best.pt")
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    assert import_set(tmp_path, tiny_real, preprocess=fitted, alpha=told).alpha == taken
