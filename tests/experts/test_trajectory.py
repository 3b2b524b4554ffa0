"""Stored trajectories are read back as they were written, and a wrong folder is refused with a sentence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import dstill
from dstill.artifacts import files
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.experts.trajectory import Trajectories, expert_path, missing_experts, save_expert

EPOCHS, NUMEL = 5, 7
RECORD = {"accuracy": [0.1, 0.625], "step_lengths": [3.0, 1.0]}


def trajectory(seed: int, epochs: int = EPOCHS) -> Tensor:
    return torch.randn(epochs + 1, NUMEL, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two experts of five epochs."""
    for index in range(2):
        save_expert(tmp_path, index, trajectory(index), {"index": index, "record": RECORD})
    return tmp_path


def test_a_segment_is_its_start_and_the_records_after_it(folder: Path) -> None:
    segment = Trajectories(folder).segment(1, 2, 3)
    stored = trajectory(1)
    assert (segment.expert, segment.epoch) == (1, 2)
    assert torch.equal(segment.start, stored[2])
    assert torch.equal(segment.targets, stored[3:6])


def test_experts_are_missing_where_there_is_none_or_a_shorter_one(tmp_path: Path) -> None:
    for index, epochs in enumerate((1, 2, 3)):
        save_expert(tmp_path, index, trajectory(index, epochs), {"index": index, "record": RECORD})
    assert [missing_experts(tmp_path, range(4), epochs) for epochs in (1, 2, 4)] == [[3], [0, 3], [0, 1, 2, 3]]


def test_the_last_segment_reaches_the_last_record(folder: Path) -> None:
    assert torch.equal(Trajectories(folder).segment(0, EPOCHS - 2, 2).targets[-1], trajectory(0)[EPOCHS])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_float32_whatever_is_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    save_expert(tmp_path, 0, trajectory(0).to(dtype), {"index": 0, "record": RECORD})
    rows = Trajectories(tmp_path).rows(0, 1, 3)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, trajectory(0).to(dtype)[1:3].float())


def test_the_shape_is_that_of_the_shortest_expert(folder: Path) -> None:
    save_expert(folder, 2, trajectory(2, epochs=3), {"index": 2, "record": RECORD})
    experts = Trajectories(folder)
    assert (len(experts), experts.epochs, experts.numel) == (3, 3, NUMEL)


def test_count_takes_the_first_experts(folder: Path) -> None:
    assert Trajectories(folder, 1).paths == [expert_path(folder, 0)]


def test_the_summary_names_accuracy_last_step_and_avg_var(folder: Path) -> None:
    first, *lines = Trajectories(folder).summary().splitlines()
    assert f"2 expert(s), {EPOCHS} epochs, {NUMEL} parameters" in first
    assert lines[1].strip() == f"expert-001: {EPOCHS} epochs, accuracy 62.5%, last step 1, Avg_Var 2"


def test_a_segment_beyond_the_last_record_is_refused_with_the_remedy(folder: Path) -> None:
    with pytest.raises(DstillError, match=r"needs 6 recorded epochs, the experts have 5: lower distill\.max_start_epoch"):
        Trajectories(folder).segment(0, 4, 2)


def test_an_empty_folder_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DstillError, match="holds no experts: run dstill train-experts first"):
        Trajectories(tmp_path)


def test_fewer_experts_than_asked_for_are_refused(folder: Path) -> None:
    with pytest.raises(DstillError, match="holds 2 experts, 3 are asked for"):
        Trajectories(folder, 3)


def test_a_truncated_file_is_refused_by_name(folder: Path) -> None:
    path = expert_path(folder, 1)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DstillError, match=r"expert-001\.safetensors is damaged"):
        Trajectories(folder)


def test_a_file_of_another_program_is_refused_by_name(folder: Path) -> None:
    save_file({"trajectory": trajectory(0)}, expert_path(folder, 1))
    with pytest.raises(DstillError, match=r"expert-001\.safetensors has no dstill header"):
        Trajectories(folder)


def test_a_file_of_another_kind_is_refused_by_name(folder: Path) -> None:
    files.save(expert_path(folder, 1), "checkpoint", {"trajectory": trajectory(0)}, {})
    with pytest.raises(DstillError, match=r"expert-001\.safetensors holds a checkpoint"):
        Trajectories(folder)


def test_experts_are_the_same_wherever_they_lie(tiny_real: RealSet, tmp_path: Path) -> None:
    def trained(seed: int) -> Trajectories:
        changes = ["net.width=4", "experts.count=2", "experts.gsam=null"]
        return dstill.train_experts(
            tiny_real, recipe="smoke", method="mtt", changes=changes, seed=seed, machine=dstill.Machine(cache=tmp_path)
        )

    one, other = trained(0), trained(1)
    assert one.identity == one.folder.name != other.identity == other.folder.name
    copied = Trajectories(shutil.copytree(one.folder, tmp_path / "elsewhere"))
    assert copied.identity == one.identity


def test_foreign_experts_are_told_apart_by_their_weights(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy" / folder.name, ignore=shutil.ignore_patterns("copy"))
    assert Trajectories(copied).identity == Trajectories(folder).identity
    save_expert(copied, 1, trajectory(7), {"index": 1, "record": RECORD})
    assert Trajectories(copied).identity != Trajectories(folder).identity


def test_experts_of_different_networks_do_not_share_a_folder(folder: Path) -> None:
    save_expert(folder, 2, torch.zeros(EPOCHS + 1, NUMEL + 2), {"index": 2, "record": RECORD})
    with pytest.raises(DstillError, match=r"experts of different networks \(7 and 9 parameters\): keep them apart"):
        Trajectories(folder)
    assert len(Trajectories(folder, count=2)) == 2


def test_imported_experts_beside_others_leave_the_accuracies_empty(folder: Path) -> None:
    assert Trajectories(folder).curves()["accuracy"] == [[0.1, 0.625]] * 2
    save_expert(folder, 2, trajectory(2), {"index": 2, "record": {"accuracy": [], "step_lengths": [1.0, 2.0]}})
    assert Trajectories(folder).curves() == {"accuracy": [[]] * 3, "step_lengths": [[3.0, 1.0], [3.0, 1.0], [1.0, 2.0]]}
