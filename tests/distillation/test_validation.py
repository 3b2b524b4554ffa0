"""The curve of a distillation is measured on validation images: never on test images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dstill.config.settings import NetConfig, Recipe
from dstill.data import preprocess
from dstill.data.real import RealSet, Split
from dstill.distillation.loop import Cadence, run_method
from dstill.evaluation.networks import evaluate_set, prepared
from dstill.evaluation.protocols import load_protocol
from dstill.methods.base import Metrics, Problem

CPU = torch.device("cpu")


def problem(real: RealSet) -> Problem:
    recipe = Recipe.model_validate(
        {
            "data": "tiny",
            "method": "dm",
            "ipc": 1,
            "net": NetConfig(width=4, depth=2),
            "augmentation": "none",
            "distill": {"iterations": 2, "batch_real": 8},
        }
    )
    return Problem(real, preprocess.fit("standardise", real.train.images), recipe, None, CPU, 3)


def curve(real: RealSet) -> list[float]:
    rows: list[Metrics] = []
    run_method(problem(real), cadence=Cadence(validate=1), observer=lambda iteration, total, row: rows.append(row))
    return [row["validation_accuracy"] for row in rows]


def noise(split: Split) -> Split:
    images = torch.randint(256, split.images.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Split(images, (split.labels + 1) % 3)


def mixed(split: Split, copies: int) -> Split:
    """Images that noise almost hides."""
    many = split.take(torch.arange(len(split)).repeat(copies))
    return Split((0.3 * many.images + 0.7 * noise(many).images).to(torch.uint8), many.labels)


def test_the_curve_does_not_know_the_test_images(tiny_real: RealSet) -> None:
    ours = curve(tiny_real)
    assert min(ours) > 0.5  # of a kind that the set teaches: of noise a third would be right
    assert curve(replace(tiny_real, test=noise(tiny_real.test), fingerprint="")) == ours


def test_the_curve_of_a_holdout_is_measured_on_what_was_held_out(tiny_real: RealSet) -> None:
    held = tiny_real.holdout(1)
    changed = replace(held, test=replace(held.test, labels=(held.test.labels + 1) % 3), fingerprint="")
    assert min(curve(held)) > 0.5
    assert max(curve(changed)) < 0.5


def test_the_curve_is_one_network_of_the_quick_protocol(tiny_real: RealSet) -> None:
    held = tiny_real.holdout(1)
    held = replace(held, test=mixed(held.test, 200), fingerprint="")  # on which accuracies differ
    one, values = problem(held), list[float]()
    run_method(
        one,
        cadence=Cadence(validate=2, picture=2),
        observer=lambda iteration, total, row: values.append(row.get("validation_accuracy", -1.0)),
        painter=lambda done, so_far: values.extend(
            evaluate_set(
                so_far,
                prepared(held.test, one.preprocess, CPU),
                load_protocol("quick"),
                networks=1,
                seed=3,
                stream=("validate",),
            )
        ),
    )
    assert len(values) == 3
    assert values == [-1.0, values[1], pytest.approx(values[1])]
