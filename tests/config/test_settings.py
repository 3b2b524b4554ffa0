"""Settings are frozen, strict and documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from dstill.config.settings import DistillConfig, ExpertConfig, GsamConfig, NetConfig, Protocol, Recipe, Settings
from dstill.methods.ast import AstConfig
from dstill.methods.distribution_matching import DistributionMatchingConfig
from dstill.methods.frepo import FrepoConfig
from dstill.methods.gradient_matching import GradientMatchingConfig
from dstill.methods.matching_config import MatchingConfig


def every_model(base: type[Settings] = Settings) -> Iterator[type[Settings]]:
    for model in base.__subclasses__():
        yield model
        yield from every_model(model)


MODELS = [model for model in every_model() if model.__module__.startswith(("dstill.config.", "dstill.methods."))]


def test_all_models_are_found() -> None:
    assert {NetConfig, GsamConfig, ExpertConfig, MatchingConfig, FrepoConfig, Recipe, Protocol} <= set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_every_field_has_a_description(model: type[Settings]) -> None:
    silent = [name for name, field in model.model_fields.items() if not (field.description or "").strip()]
    assert silent == []


@pytest.mark.parametrize("settings", [NetConfig(), MatchingConfig(), Recipe(data="mine", method="ast", ipc=1)])
def test_settings_cannot_be_changed(settings: Settings) -> None:
    name = next(iter(type(settings).model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(settings, name, getattr(settings, name))


@pytest.mark.parametrize("model", [NetConfig, GsamConfig, ExpertConfig, MatchingConfig])
def test_an_unknown_key_is_refused(model: type[Settings]) -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        model.model_validate({"no_such_key": 1})


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (MatchingConfig, {"iterations": "300"}),
        (MatchingConfig, {"iterations": 3.0}),
        (MatchingConfig, {"iterations": True}),
        (MatchingConfig, {"lr_images": "100"}),
        (MatchingConfig, {"balanced_loss": False}),
        (MatchingConfig, {"compile": "true"}),
        (ExpertConfig, {"count": "4"}),
        (ExpertConfig, {"compile": 1}),
        (NetConfig, {"name": 3}),
    ],
)
def test_a_value_of_another_type_is_not_converted(model: type[Settings], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(values)


def test_a_whole_number_is_a_valid_float() -> None:
    assert MatchingConfig(lr_images=100).lr_images == 100.0


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (MatchingConfig, {"iterations": 0}),
        (MatchingConfig, {"lr_images": 0.0}),
        (MatchingConfig, {"lr_alpha": -1e-5}),
        (MatchingConfig, {"alpha_init": -0.01}),
        (MatchingConfig, {"image_momentum": 1.0}),
        (MatchingConfig, {"image_ema": 1.0}),
        (MatchingConfig, {"dropout": 1.0}),
        (MatchingConfig, {"min_start_epoch": -1}),
        (MatchingConfig, {"gradient": "exact"}),
        (ExpertConfig, {"count": 0}),
        (ExpertConfig, {"lr": 0.0}),
        (ExpertConfig, {"weight_decay": -1.0}),
        (GsamConfig, {"rho": 0.0}),
        (NetConfig, {"width": 0}),
    ],
)
def test_a_value_out_of_range_is_refused(model: type[Settings], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        model.model_validate(values)


def test_the_lowest_start_epoch_must_be_below_the_highest() -> None:
    assert MatchingConfig(min_start_epoch=9, max_start_epoch=10).min_start_epoch == 9
    with pytest.raises(ValidationError, match="min_start_epoch 10 must be below max_start_epoch 10"):
        MatchingConfig(min_start_epoch=10, max_start_epoch=10)


def test_a_student_takes_at_least_one_step_for_each_expert_epoch() -> None:
    assert MatchingConfig(student_steps=3, expert_epochs=3).student_steps == 3
    with pytest.raises(ValidationError, match="student_steps 2 must be at least expert_epochs 3"):
        MatchingConfig(student_steps=2, expert_epochs=3)


def test_matching_reads_the_start_epochs_and_the_last_segment() -> None:
    matching = MatchingConfig(max_start_epoch=4, expert_epochs=3)
    # Starts 0 .. 3; the last segment ends at record 3 + 3.
    assert matching.epochs_needed == 6


def test_experts_train_no_longer_than_matching_needs_unless_asked() -> None:
    matching = MatchingConfig(max_start_epoch=4, expert_epochs=3)
    recipe = Recipe(data="mine", method="ast", ipc=1, experts=ExpertConfig(), distill=matching)
    assert recipe.expert_config.epochs == 6
    asked = recipe.model_copy(update={"experts": ExpertConfig(epochs=50)})
    assert asked.expert_config.epochs == 50
    alone = Recipe(data="mine", method="random", ipc=1, experts=ExpertConfig(planned_epochs=30))
    assert alone.expert_config.epochs == 30


def test_the_distill_section_is_read_as_the_settings_of_the_method() -> None:
    recipe = Recipe.model_validate({"data": "mine", "method": "dm", "ipc": 1, "distill": {"iterations": 3}})
    assert recipe.distill == DistributionMatchingConfig(iterations=3)
    assert Recipe.model_validate(recipe.model_dump()) == recipe
    assert Recipe(data="mine", method="mtt", ipc=1).distill == MatchingConfig()
    assert Recipe(data="mine", method="dm", ipc=1, distill=DistillConfig(iterations=5)).distill.iterations == 5
    for method in ("dm", "random"):
        with pytest.raises(ValidationError):
            Recipe(data="mine", method=method, ipc=1, distill=MatchingConfig())


def test_a_recipe_that_leaves_settings_out_is_still_of_its_method() -> None:
    ast, mtt = (
        Recipe.model_validate({"data": "mine", "method": name, "ipc": 1, "experts": {"count": 2}}) for name in ("ast", "mtt")
    )
    parts = {"initialisation": "representative"} | dict.fromkeys(
        ("balanced_loss", "intermediate_matching", "perturbation"), "paper"
    )
    assert ast.distill.model_dump() == {**MatchingConfig().model_dump(), **parts}
    assert ast.experts == ExpertConfig(count=2)
    plain = {
        "lr": 0.01,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "clipped_loss": "off",
        "gradient_penalty": "off",
        "lr_step": "off",
    }
    assert mtt.experts == ExpertConfig(count=2, **plain)  # type: ignore[arg-type]
    # Also if the whole section is missing; and given values are kept.
    assert Recipe(data="mine", method="mtt", ipc=1).expert_config.lr == 0.01
    smooth = Recipe.model_validate({"data": "mine", "method": "mtt", "ipc": 1, "experts": {"gradient_penalty": "paper"}})
    assert smooth.experts == ExpertConfig(**{**plain, "gradient_penalty": "paper"})  # type: ignore[arg-type]
    stated = Recipe(data="mine", method="ast", ipc=1, distill=MatchingConfig())
    assert stated.distill == AstConfig(**MatchingConfig().model_dump())


@pytest.mark.parametrize(
    ("ipc", "expected"),
    [
        (1, (1, 1)),
        (10, (10, 50)),
        (20, (20, 25)),
        (30, (30, 20)),
        (40, (40, 15)),
        (50, (50, 10)),
        (15, (15, 38)),
        (80, (50, 10)),
    ],
)
def test_the_loops_of_gradient_matching_follow_the_published_table(ipc: int, expected: tuple[int, int]) -> None:
    assert GradientMatchingConfig().loops(ipc) == expected
    assert GradientMatchingConfig(outer_steps=3, inner_epochs=0).loops(ipc) == (3, 0)
