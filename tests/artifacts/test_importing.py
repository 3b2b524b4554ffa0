"""What the caller says of a foreign set goes before what its files say; what experts do not say is worked out."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dstill.artifacts.importing import import_set
from dstill.data import preprocess
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.experts.importing import import_experts
from dstill.experts.trajectory import Trajectories


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


def test_imported_experts_tell_the_length_of_every_step(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    trajectory = [[torch.randn(2, 3, generator=generator), torch.randn(3, generator=generator)] for _ in range(4)]
    torch.save([trajectory], tmp_path / "replay_buffer_0.pt")
    experts = Trajectories(import_experts([tmp_path / "replay_buffer_0.pt"], tmp_path / "experts"))
    flat = [torch.cat([tensor.flatten() for tensor in record]) for record in trajectory]
    expected = [float((b - a).square().sum()) for a, b in pairwise(flat)]
    assert experts.curves()["step_lengths"] == [pytest.approx(expected, rel=1e-5)]


def test_buffers_of_different_networks_and_none_at_all_are_refused(tmp_path: Path) -> None:
    for name, width in (("a", 2), ("b", 3)):
        torch.save([[[torch.zeros(width, 2)], [torch.zeros(width, 2)]]], tmp_path / f"{name}.pt")
    with pytest.raises(DstillError, match=r"different networks \(4 and 6 parameters\): import each by itself"):
        import_experts([tmp_path / "a.pt", tmp_path / "b.pt"], tmp_path / "experts")
    assert not list((tmp_path / "experts").glob("expert-*"))
    with pytest.raises(DstillError, match="no buffers are given"):
        import_experts([], tmp_path / "experts")
