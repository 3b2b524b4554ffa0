"""A set whose images hold several is measured by what they hold, weighed by what is stored, and ranked with its like only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dstill
from dstill import DistilledSet, DstillError
from dstill.api.compare import Comparison, Row
from dstill.api.judge import judge
from dstill.artifacts.record import RunRecord
from dstill.artifacts.result import Result
from dstill.config.settings import NetConfig, Protocol
from dstill.data import preprocess
from dstill.data.formation import encode
from dstill.data.real import RealSet
from dstill.evaluation.baselines import random_set
from dstill.evaluation.networks import evaluate_set, prepared
from dstill.reproductions import page as pages
from dstill.reproductions.page import Entry, Sets, verdict
from dstill.reproductions.spec import Case
from dstill.reproductions.spec import Row as Printed

NET = NetConfig(width=4, depth=2)
PROTOCOL = Protocol(name="short", version=1, passes=6, batch_size=5, momentum=0.9, weight_decay=5e-4, lr=0.05, networks=2)
ONCE: dict[str, Any] = {"protocol": "quick", "networks": 1, "progress": False}


@pytest.fixture
def held(tiny_real: RealSet) -> DistilledSet:
    """One stored image of each class, with four real ones in it."""
    fitted = preprocess.fit("standardise", tiny_real.train.images)
    rows = torch.cat([rows[:4] for rows in tiny_real.train.by_class(3)])
    images = encode(fitted.forward(tiny_real.train.images[rows].float() / 255), 2)
    names, mark = tiny_real.class_names, tiny_real.fingerprint
    return DistilledSet(
        images, torch.arange(3), 0.03, fitted, "mtt", 1, names, "flip_crop", NET, "tiny", mark, None, 0, parts=2
    )


def test_networks_are_trained_on_what_the_images_hold(held: DistilledSet, tiny_real: RealSet) -> None:
    test = prepared(tiny_real.test, held.preprocess, torch.device("cpu"))
    for one in (held, replace(held, labels=torch.randn(12, 3))):
        assert evaluate_set(one, test, PROTOCOL, seed=4) == evaluate_set(one.decoded, test, PROTOCOL, seed=4)
    collages = replace(held, parts=1)
    assert evaluate_set(held, test, PROTOCOL, seed=4) != evaluate_set(collages, test, PROTOCOL, seed=4)


def test_a_result_counts_stored_bytes_and_stands_beside_random_images_of_as_many(
    held: DistilledSet, tiny_real: RealSet, tmp_path: Path
) -> None:
    machine = dstill.Machine(cache=tmp_path)
    result = dstill.evaluate(held, tiny_real, out=tmp_path, machine=machine, **ONCE)
    like = dstill.evaluate(replace(held, parts=1), tiny_real, machine=machine, **ONCE)
    assert (result.ipc, result.parts, result.family, result.stored_bytes) == (1, 2, "parts", 3 * 192 + 3)
    assert result.random == like.random, "one whole real image of each class"
    drawn = random_set(held, tiny_real.train, torch.Generator().manual_seed(0))
    assert (len(drawn.images), drawn.parts, drawn.stored_bytes) == (3, 1, held.stored_bytes)
    written = json.loads((tmp_path / "result.json").read_text())
    assert (written["parts"], written["family"]) == (2, "parts") and Result.load(tmp_path / "result.json") == result
    with pytest.raises(DstillError, match="only if method, IPC, parts"):
        dstill.evaluate([held, replace(held, parts=1)], tiny_real, **ONCE)


def test_a_result_from_before_there_were_parts_is_read(held: DistilledSet, tiny_real: RealSet, tmp_path: Path) -> None:
    dstill.evaluate(held.decoded, tiny_real, random=False, out=tmp_path, **ONCE)
    old = json.loads((tmp_path / "result.json").read_text())
    for key in ("parts", "family"):
        del old[key]
    (tmp_path / "result.json").write_text(json.dumps(old))
    assert (Result.load(tmp_path / "result.json").parts, Result.load(tmp_path / "result.json").family) == (1, "raw")
    (tmp_path / "result.json").write_text(json.dumps({**old, "shape": 3}))
    with pytest.raises(DstillError, match="is not a result"):
        Result.load(tmp_path / "result.json")


def test_a_judgement_is_one_of_what_the_images_hold(held: DistilledSet, tiny_real: RealSet, tmp_path: Path) -> None:
    soft = replace(held, labels=3 * torch.nn.functional.one_hot(held.decoded.labels, 3).float())
    judgement = judge(soft, tiny_real, augmentations=["none"], whole=False, machine=dstill.Machine(cache=tmp_path), **ONCE)
    assert [(row.labels, row.result.family) for row in judgement.rows] == [("soft", "parts and labels"), ("hard", "parts")]
    assert judgement.stored_bytes == 3 * 192 + 4 * 12 * 3


def measured(held: DistilledSet, real: RealSet, **changes: Any) -> Result:
    return dstill.evaluate(held, real, random=False, **ONCE).model_copy(update=changes)


def test_a_comparison_names_the_family_of_each_row(held: DistilledSet, tiny_real: RealSet) -> None:
    rows = [Row(method="mtt", ipc=1, result=measured(one, tiny_real)) for one in (held, held.decoded)]
    table = Comparison(data="tiny", protocol="quick", rows=(*rows, Row(method="dm", ipc=1, result=None, reason="no")))
    assert [line[2] for line in table.texts()] == ["family", "parts", "raw", "–"]
    assert [line.split(",")[2:5] for line in table.csv().splitlines()[:3]] == [
        ["labels", "parts", "family"],
        ["hard", "2", "parts"],
        ["hard", "1", "raw"],
    ]
    assert Comparison.model_validate_json(table.model_dump_json()) == table


def test_rows_are_ranked_within_their_family_only(held: DistilledSet, tiny_real: RealSet) -> None:
    base, case = measured(held, tiny_real), Case(data="cifar10", ipc=1)
    published = {"a": 10.0, "b": 20.0, "c": 30.0, "d": 40.0}
    families = {"a": ("hard", 1), "b": ("soft", 1), "c": ("hard", 2), "d": ("hard", 2)}
    accuracies = {"a": 0.4, "b": 0.3, "c": 0.1, "d": 0.2}
    rows, entries = [], {}
    for name, value in accuracies.items():
        labels, parts = families[name]
        score = base.accuracy.model_copy(update={"mean": value})
        found = base.model_copy(update={"accuracy": score, "labels": labels, "parts": parts})
        record = RunRecord(recipe={}, result=found)
        entries[name, case.name] = Sets([Entry(row=name, case=case.name, request={}, record=record)])
        rows.append(Printed(name=name, title=name, method="mtt", published={case.name: {"accuracy": published[name]}}))
    # Of the six pairs, only c and d are of one family, and these two are in order.
    assert verdict(rows, case, entries).endswith("Of 1 pair of rows of one family, 1 in the published order.")
    alone = verdict(rows[:3], case, entries)
    assert "order" not in alone and "points from the published figures" in alone
    assert pages.verdict(rows[2:], case, entries).endswith("Of 1 pair of rows, 1 in the published order.")
