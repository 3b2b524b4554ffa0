"""The sets that ship with the package."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
import torch

import dstill
from dstill.artifacts.ready import Ready, ready_card, ready_file, ready_names
from dstill.artifacts.set_file import located
from dstill.cli.ls import rows, table
from dstill.config.yamls import read_mapping
from dstill.errors import DstillError, DstillWarning

MOST_BYTES = 4_000_000


def test_all_of_them_load_and_are_what_their_names_say() -> None:
    assert sum(file.stat().st_size for file in ready_file("digits-ipc1").parent.iterdir()) <= MOST_BYTES
    assert {file.stem for file in ready_file("digits-ipc1").parent.glob("*.safetensors")} == set(ready_names())
    for name in ready_names():
        one = quietly(name)
        assert name.startswith(f"{one.data}-ipc{one.ipc}")
        assert one.images.dtype == torch.float32 and len(one.images) == one.ipc * one.classes
        assert name.endswith("-parts") == (one.parts > 1)


def quietly(name: str) -> dstill.DistilledSet:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the whitening", DstillWarning)
        return dstill.load_set(name)


def test_without_the_real_data_a_whitening_is_missed() -> None:
    with pytest.warns(DstillWarning, match="the whitening of cifar10"):
        dstill.load_set("cifar10-ipc1")


@pytest.mark.parametrize("name", ready_names())
def test_the_first_figure_of_a_card_is_what_the_set_claims(name: str) -> None:
    card = ready_card(name)
    claim = quietly(name).accuracy
    assert claim is not None
    first = card.measured[0]
    assert (first.protocol, first.networks) == (claim.protocol.name, claim.n)
    assert first.network.startswith(claim.net)
    assert (first.accuracy, first.spread) == (round(100 * claim.mean, 1), round(100 * claim.std, 1))


def test_networks_learn_from_one_that_needs_no_whitening() -> None:
    real = dstill.load_real("digits")
    result = dstill.evaluate("digits-ipc1", real, networks=1, random=False, protocol="quick")
    assert result.accuracy.mean > 0.8


def test_a_path_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert located("cifar10-ipc1") == ready_file("cifar10-ipc1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10-ipc1").mkdir()
    shutil.copy(ready_file("digits-ipc1"), tmp_path / "cifar10-ipc1" / "distilled.safetensors")
    assert dstill.DistilledSet.load("cifar10-ipc1").data == "digits"


def test_unknown_names_are_answered_with_known_ones() -> None:
    with pytest.raises(DstillError, match="no set 'digit-ipc1' ships with dstill; did you mean digits-ipc1"):
        dstill.load_set("digit-ipc1")


def test_the_list_has_their_cards() -> None:
    listed = {row["name"]: row for row in rows("sets")}
    assert listed.keys() == set(ready_names())
    card = Ready.model_validate(read_mapping(ready_file("cifar10-ipc1").with_suffix(".yaml")))
    assert listed["cifar10-ipc1"]["measured"] == card.model_dump()["measured"]
    assert "47.6 ± 0.7 % (n = 5, convnet of width 128, protocol rat)" in "\n".join(table("sets"))
