"""Every shipped recipe holds the published numbers; every other case is derived, changed or refused with a sentence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dstill.config import recipes
from dstill.config.recipes import dump, load_recipe, recipe_names
from dstill.config.registry import METHODS
from dstill.config.settings import DistillConfig, Recipe
from dstill.data.catalog import DATASETS, Shape
from dstill.errors import DstillError
from dstill.evaluation.protocols import load_protocol
from dstill.methods.bptt import BpttConfig
from dstill.methods.cafe import CafeConfig
from dstill.methods.distribution_matching import DistributionMatchingConfig
from dstill.methods.frepo import FrepoConfig
from dstill.methods.gradient_matching import GradientMatchingConfig
from dstill.methods.matching_config import MatchingConfig

NAMES = recipe_names()
IPCS = {"cifar10": (1, 10, 50), "cifar100": (1, 10, 50), "tiny-imagenet": (1, 10), "imagenet-subset": (1, 10)}
SYSTEMS = ("mtt", "tesla", "ftd", "ast", "ast-released")
OTHERS = ("dc", "dsa", "dm", "cafe", "frepo")
# Not published: FTD on the ImageNet subsets; the others on these and on Tiny ImageNet, and some of them on CIFAR-100.
OTHER_GRID = [
    f"{data}/{system}-ipc{ipc}"
    for data in ("cifar10", "cifar100")
    for ipc in (1, 10, 50)
    for system in OTHERS
    if (data, ipc, system) not in {("cifar100", 50, "dc"), ("cifar100", 50, "frepo")}
]
GRID = [
    f"{data}/{system}-ipc{ipc}"
    for data, ipcs in IPCS.items()
    for ipc in ipcs
    for system in SYSTEMS
    if (data, system) != ("imagenet-subset", "ftd")
]
# Learned labels, and back-propagation through training; the last two are ours.
DATM = [f"{data}/datm-ipc{ipc}" for data, ipcs in list(IPCS.items())[:3] for ipc in ipcs]
RAT = [f"{data}/rat-bptt-ipc{ipc}" for data, ipcs in list(IPCS.items())[:3] for ipc in ipcs if (data, ipc) != ("cifar100", 50)]
OURS = [f"cifar10/{system}-ipc{ipc}" for system in ("datm-smooth", "bptt") for ipc in (1, 10)]
TUNED = [name for name in NAMES if "-tuned-" in name]

# The published settings, row by row: data, IPC, N, M, T+, batch_syn (None: all), lr_images, lr_alpha, alpha_init, ZCA.
Row = tuple[str, int, int, int, int, int | None, float, float, float, bool]
PUBLISHED: dict[str, list[Row]] = {
    "mtt": [
        ("cifar10", 1, 50, 2, 2, None, 100, 1e-7, 0.01, True),
        ("cifar10", 10, 30, 2, 20, None, 100, 1e-5, 0.001, True),
        ("cifar10", 50, 30, 2, 40, None, 1000, 1e-5, 0.001, False),
        ("cifar100", 1, 20, 3, 20, None, 1000, 1e-5, 0.01, True),
        ("cifar100", 10, 20, 2, 20, None, 1000, 1e-5, 0.01, False),
        ("cifar100", 50, 80, 2, 40, 125, 1000, 1e-5, 0.01, True),
        ("tiny-imagenet", 1, 10, 2, 10, None, 1e4, 1e-4, 0.01, False),
        ("tiny-imagenet", 10, 20, 2, 40, 200, 1e4, 1e-4, 0.01, False),
        ("imagenet-subset", 1, 20, 2, 10, None, 1e5, 1e-6, 0.01, False),
        ("imagenet-subset", 10, 20, 2, 10, 20, 1e5, 1e-6, 0.01, False),
    ],
    "ftd": [
        ("cifar10", 1, 50, 2, 2, None, 100, 1e-7, 0.01, True),
        ("cifar10", 10, 30, 2, 20, None, 100, 1e-5, 0.001, True),
        ("cifar10", 50, 30, 2, 40, None, 1000, 1e-5, 0.01, True),
        ("cifar100", 1, 40, 3, 20, None, 1000, 1e-5, 0.01, True),
        ("cifar100", 10, 20, 2, 40, None, 1000, 1e-5, 0.01, True),
        ("cifar100", 50, 80, 2, 40, 1000, 1000, 1e-5, 0.01, True),
        ("tiny-imagenet", 1, 30, 2, 10, None, 1e4, 1e-4, 0.01, False),
        ("tiny-imagenet", 10, 20, 2, 40, 500, 1e4, 1e-4, 0.01, False),
    ],
    # lr_images as published; the recipe has the effective one, which is half of it.
    "tesla": [
        ("cifar10", 1, 50, 2, 5, None, 1000, 1e-7, 0.01, False),
        ("cifar100", 50, 80, 2, 40, 125, 1000, 1e-5, 0.01, True),
    ],
    "ast": [
        ("cifar10", 10, 30, 2, 20, None, 100, 1e-6, 0.01, True),
        ("cifar100", 1, 40, 3, 15, None, 100, 1e-5, 0.01, False),
        ("cifar100", 10, 20, 2, 30, 128, 1000, 1e-5, 0.01, False),
        ("cifar100", 50, 80, 2, 40, 700, 1000, 1e-5, 0.01, False),
        ("tiny-imagenet", 1, 10, 2, 10, None, 1e4, 1e-4, 0.01, False),
    ],
}
EMA = {"cifar10": (0.9999, 0.9995, 0.999), "cifar100": (0.9995, 0.9995, 0.999), "tiny-imagenet": (0.999, 0.999)}


def row_of(name: str) -> Row:
    recipe = load_recipe(name)
    d = recipe.distill
    assert isinstance(d, MatchingConfig)
    return (
        *(recipe.data, recipe.ipc, d.student_steps, d.expert_epochs, d.max_start_epoch, d.batch_syn),
        *(d.lr_images, d.lr_alpha, d.alpha_init, recipe.preprocess == "zca"),
    )


class About(NamedTuple):
    """Data that settings are resolved for."""

    name: str
    shape: Shape
    memory: float


def shape(name: str = "mine", channels: int = 3, side: int = 32, classes: int = 10, memory: float = math.inf) -> About:
    return About(name, Shape(channels, (side, side), classes), memory)


def resolve(recipe: str | None, about: About, **options: Any) -> tuple[Recipe, str]:
    return recipes.resolve(recipe, about.name, about.shape, memory=about.memory, **options)


def test_the_grid_of_published_cases_is_complete() -> None:
    assert (len(GRID), len(OTHER_GRID)) == (48, 28)
    assert {*GRID, *OTHER_GRID} <= set(NAMES)


def test_nothing_but_the_grid_and_what_won_here_is_shipped_for_the_published_data_sets() -> None:
    assert {name for name in NAMES if name.split("/")[0] in IPCS} == {
        *(*GRID, *OTHER_GRID, *DATM, *RAT, *OURS, *TUNED),
    }


@pytest.mark.parametrize("name", TUNED)
def test_a_tuned_recipe_is_taken_unless_the_published_one_is_named(name: str) -> None:
    published, recipe = name.replace("-tuned", ""), load_recipe(name)
    found, origin = resolve(None, shape(recipe.data), method=recipe.method, ipc=recipe.ipc)
    assert found == recipe and published in origin
    assert resolve(published, shape(recipe.data), method=None, ipc=None)[0] == load_recipe(published)
    derived, origin = resolve(None, shape(), method=recipe.method, ipc=recipe.ipc)
    assert derived.distill == recipe.distill and name in origin


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_what_its_file_name_says(name: str) -> None:
    recipe = load_recipe(name)
    forms = {recipe.method, *(f"{recipe.method}-{form}" for form in ("released", "tuned", "smooth"))}
    assert name in {f"{recipe.data}/{form}-ipc{recipe.ipc}" for form in forms}
    assert recipe.method in METHODS
    assert recipe.note


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_survives_being_written_and_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "copy.yaml"
    path.write_text(dump(load_recipe(name)), encoding="utf-8")
    assert load_recipe(str(path)) == load_recipe(name)


def test_a_note_and_a_name_that_look_like_numbers_survive_being_written_and_read(tmp_path: Path) -> None:
    odd = load_recipe("cifar10/mtt-ipc1").model_copy(update={"data": "5e8", "note": "off"})
    path = tmp_path / "odd.yaml"
    path.write_text(dump(odd), encoding="utf-8")
    assert load_recipe(str(path)) == odd


@pytest.mark.parametrize(("system", "row"), [(system, row) for system, rows in PUBLISHED.items() for row in rows])
def test_published_settings_are_in_the_recipe(system: str, row: Row) -> None:
    expected = (*row[:6], row[6] / 2, *row[7:]) if system == "tesla" else row
    assert row_of(f"{row[0]}/{system}-ipc{row[1]}") == expected


# DATM's published settings: N, M, T-, the limit of the start epochs at the start, T+, over how many iterations, the step
# sizes of images and labels, the decay of the average, and the loss above which a segment is skipped.
DATM_ROWS: dict[str, tuple[float | None, ...]] = {
    "cifar10/datm-ipc1": (80, 2, 0, None, 4, None, 100, 5, 0.995, 1.1),
    "cifar10/datm-ipc10": (80, 2, 0, 10, 20, 1000, 100, 2, 0.9995, 1.0),
    "cifar10/datm-ipc50": (80, 2, 0, 20, 40, 2000, 1000, 2, 0.995, 1.0),
    "cifar100/datm-ipc1": (40, 3, 0, 20, 30, 3000, 1000, 2, 0.9995, 1.0),
    "cifar100/datm-ipc10": (80, 2, 0, 30, 50, 2000, 1000, 10, 0.9995, 1.0),
    "cifar100/datm-ipc50": (80, 2, 20, None, 70, None, 1000, 10, 0.9995, 1.0),
    "tiny-imagenet/datm-ipc1": (40, 2, 0, 15, 20, 2000, 10_000, 10, 0.9995, 1.0),
    "tiny-imagenet/datm-ipc10": (40, 2, 10, 46, 50, 1000, 100, 10, 0.9995, 1.0),
}


@pytest.mark.parametrize("name", DATM)
def test_datms_published_settings_are_in_the_recipe(name: str) -> None:
    recipe = load_recipe(name)
    d, experts = recipe.distill, recipe.experts
    assert isinstance(d, MatchingConfig) and experts is not None
    growing = (d.first_start_epochs, d.max_start_epoch, d.grow_over if d.start_epochs == "growing" else None)
    sizes = (d.lr_images, d.lr_labels, d.image_ema, d.skip_above)
    assert (d.student_steps, d.expert_epochs, d.min_start_epoch, *growing, *sizes) == DATM_ROWS[name]
    assert (d.soft_labels, d.label_momentum, d.iterations, recipe.protocol) == ("learned", 0.9, 10_000, "datm")
    assert (experts.count, experts.epochs, experts.gsam is not None, experts.lr) == (100, 100, True, 0.01)


def test_datm_on_smooth_experts_differs_from_datm_by_the_experts_alone() -> None:
    for ipc in (1, 10):
        ours, published = load_recipe(f"cifar10/datm-smooth-ipc{ipc}"), load_recipe(f"cifar10/datm-ipc{ipc}")
        assert ours.experts == load_recipe(f"cifar10/ast-ipc{ipc}").experts
        assert ours.distill == published.distill and ours.protocol == published.protocol


# RaT-BPTT's: T, W, the step size of the images, real images in a batch, and whether labels are learned.
RAT_ROWS = {
    "cifar10/rat-bptt-ipc10": (200, 60, 1e-3, 5000, False),
    "cifar100/rat-bptt-ipc1": (130, 90, 3e-4, 5000, True),
    "cifar100/rat-bptt-ipc10": (300, 100, 1e-3, 5000, True),
    "tiny-imagenet/rat-bptt-ipc10": (300, 100, 3e-4, 2000, True),
}


@pytest.mark.parametrize("name", RAT)
def test_rat_bptts_published_settings_are_in_the_recipe(name: str) -> None:
    recipe = load_recipe(name)
    d = recipe.distill
    assert isinstance(d, BpttConfig)
    row = (d.total_steps, d.window, d.lr_images, d.batch_real, d.soft_labels == "learned")
    if name in RAT_ROWS:
        assert row == RAT_ROWS[name]
    else:
        assert "not published" in recipe.note
    assert (d.optimiser, d.alpha_init, d.learn_alpha, d.clip, d.window_start) == ("adam", 1e-3, "off", 2.0, "random")
    assert (recipe.augmentation, recipe.protocol, d.iterations, d.schedule) == ("flip_rotate", "rat", 60_000, "constant")


def test_the_table_is_read_whole() -> None:
    assert {system: len(rows) for system, rows in PUBLISHED.items()} == {"mtt": 10, "ftd": 8, "tesla": 2, "ast": 5}


@pytest.mark.parametrize(
    ("case", "source"),
    [
        ("cifar10/ast-ipc1", "cifar10/ftd-ipc1"),
        ("cifar10/ast-ipc50", "cifar10/ftd-ipc50"),
        ("tiny-imagenet/ast-ipc10", "tiny-imagenet/ftd-ipc10"),
        ("imagenet-subset/ast-ipc1", "imagenet-subset/mtt-ipc1"),
        ("imagenet-subset/ast-ipc10", "imagenet-subset/mtt-ipc10"),
        ("cifar10/tesla-ipc10", "cifar10/mtt-ipc10"),
        ("cifar10/tesla-ipc50", "cifar10/mtt-ipc50"),
        ("cifar100/tesla-ipc1", "cifar100/mtt-ipc1"),
        ("cifar100/tesla-ipc10", "cifar100/mtt-ipc10"),
        ("tiny-imagenet/tesla-ipc1", "tiny-imagenet/mtt-ipc1"),
        ("tiny-imagenet/tesla-ipc10", "tiny-imagenet/mtt-ipc10"),
        ("imagenet-subset/tesla-ipc1", "imagenet-subset/mtt-ipc1"),
        ("imagenet-subset/tesla-ipc10", "imagenet-subset/mtt-ipc10"),
    ],
)
def test_an_unpublished_case_takes_the_settings_of_the_stated_system(case: str, source: str) -> None:
    assert row_of(case) == row_of(source)


@pytest.mark.parametrize("name", [name for name in GRID if "/ast-released-" in name])
def test_the_two_forms_of_ast_share_their_published_numbers(name: str) -> None:
    assert row_of(name) == row_of(name.replace("-released", ""))


@pytest.mark.parametrize("name", [name for name in GRID if "/ast-ipc" in name])
def test_paper_recipes_have_every_part_in_the_papers_form(name: str) -> None:
    recipe = load_recipe(name)
    experts, matching = recipe.experts, recipe.distill
    assert experts is not None and isinstance(matching, MatchingConfig)
    assert (experts.clipped_loss, experts.gradient_penalty, experts.lr_step) == ("paper", "paper", "paper")
    assert (experts.count, experts.lr, experts.momentum, experts.weight_decay) == (50, 0.003, 0.9, 1e-3)
    assert (matching.balanced_loss, matching.intermediate_matching, matching.perturbation) == ("paper", "paper", "paper")
    assert (matching.initialisation, matching.student_momentum, matching.rho) == ("representative", 0.0, 0.1)
    assert matching.feature_epochs == 50
    assert (matching.intermediate_scale, matching.denominator, matching.dropout) == ("equal", "perturbed", 0.0)


@pytest.mark.parametrize("name", [name for name in GRID if "/ast-released-" in name])
def test_released_recipes_have_every_part_in_the_released_form(name: str) -> None:
    recipe = load_recipe(name)
    experts, matching = recipe.experts, recipe.distill
    assert experts is not None and isinstance(matching, MatchingConfig)
    assert (experts.clipped_loss, experts.gradient_penalty, experts.lr_step) == ("released", "released", "released")
    assert (experts.count, experts.lr, experts.momentum, experts.weight_decay) == (100, 0.003, 0.9, 1e-3)
    assert (matching.balanced_loss, matching.intermediate_matching, matching.perturbation) == ("released",) * 3
    assert (matching.initialisation, matching.student_momentum) == ("representative-released", 0.9)


@pytest.mark.parametrize("name", [name for name in GRID if name.split("/")[1].startswith(("mtt", "tesla", "ftd"))])
def test_the_earlier_systems_have_plain_sgd_experts_and_none_of_asts_parts(name: str) -> None:
    recipe = load_recipe(name)
    experts, matching = recipe.experts, recipe.distill
    assert experts is not None and isinstance(matching, MatchingConfig)
    assert (experts.optimiser, experts.lr, experts.momentum, experts.weight_decay) == ("sgd", 0.01, 0.0, 0.0)
    assert (experts.clipped_loss, experts.gradient_penalty, experts.lr_step) == ("off", "off", "off")
    assert (experts.gsam is not None) == (recipe.method == "ftd")
    assert (matching.balanced_loss, matching.intermediate_matching, matching.perturbation) == ("off", "off", "off")
    assert (matching.initialisation, matching.student_momentum) == ("random", 0.0)


@pytest.mark.parametrize("name", GRID)
def test_what_all_published_cases_have_in_common(name: str) -> None:
    recipe = load_recipe(name)
    experts, matching = recipe.experts, recipe.distill
    assert experts is not None and isinstance(matching, MatchingConfig)
    tesla = recipe.method == "tesla"
    depth = {"cifar10": 3, "cifar100": 3, "tiny-imagenet": 4, "imagenet-subset": 5}[recipe.data]
    assert recipe.net.model_dump() == {"name": "convnet", "width": 128, "depth": depth, "norm": "instance"}
    assert matching.iterations == (10_000 if tesla else 5000)
    assert matching.image_momentum == 0.5
    assert (matching.gradient, matching.soft_labels) == (("tesla", "expert") if tesla else ("adjoint", "off"))
    assert (experts.batch_size, experts.planned_epochs, experts.epochs) == (256, 50, None)
    assert recipe.augmentation == "colour_crop_cutout_flip_scale_rotate"
    assert recipe.protocol == ("ast" if recipe.method == "ast" else "mtt")


@pytest.mark.parametrize("name", [name for name in GRID if "/ftd-" in name])
def test_ftd_averages_its_images_and_flattens_its_experts(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.distill is not None and recipe.experts is not None and recipe.experts.gsam is not None
    assert recipe.distill.image_ema == EMA[recipe.data][IPCS[recipe.data].index(recipe.ipc)]
    assert recipe.experts.gsam.rho == 0.01
    assert recipe.experts.gsam.alpha == (0.3 if name in ("cifar10/ftd-ipc1", "cifar10/ftd-ipc10") else 1.0)


@pytest.mark.parametrize(
    ("name", "epochs"),
    [("cifar10/mtt-ipc1", 3), ("cifar10/ast-ipc1", 3), ("cifar10/tesla-ipc1", 6), ("cifar100/ast-ipc1", 17)],
)
def test_experts_are_trained_for_the_epochs_that_matching_reads(name: str, epochs: int) -> None:
    assert load_recipe(name).expert_config.epochs == epochs


@pytest.mark.parametrize("name", GRID)
def test_no_recipe_trains_experts_beyond_the_published_fifty_epochs(name: str) -> None:
    epochs = load_recipe(name).expert_config.epochs
    assert epochs is not None and epochs <= 50


# Refusals


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(DstillError, match=r"unknown recipe 'cifar10/ast-ipc2'; did you mean cifar10/ast-ipc1"):
        load_recipe("cifar10/ast-ipc2")


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(DstillError, match=r"unknown method 'mt'; did you mean mtt"):
        resolve(None, shape(), method="mt", ipc=None)


def write(folder: Path, old: str, new: str) -> str:
    """A copy of a shipped recipe with one line replaced."""
    text = dump(load_recipe("cifar10/ast-ipc1"))
    assert old in text
    path = folder / "mine.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ipc: 1\n", "ipc: 1\nipcs: 1\n", r"unknown key 'ipcs'; did you mean ipc"),
        ("  lr_images:", "  lr_image:", r"unknown key 'distill\.lr_image'; did you mean lr_images"),
        ("distill:\n", "distil:\n", r"unknown key 'distil'; did you mean distill"),
        ("  depth: 3\n", "  depht: 3\n", r"unknown key 'net\.depht'; did you mean depth"),
    ],
)
def test_an_unknown_key_or_section_is_refused_with_the_nearest_name(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DstillError, match=message):
        load_recipe(write(tmp_path, old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  iterations: 5000\n", "  iterations: many\n", r"mine\.yaml: distill\.iterations: .*integer \(got 'many'\)"),
        ("  lr_images: 100.0\n", "  lr_images: '100'\n", r"distill\.lr_images: .*number \(got '100'\)"),
        ("  count: 50\n", "  count: 0\n", r"experts\.count: .*greater than or equal to 1 \(got 0\)"),
        ("preprocess: zca\n", "preprocess: pca\n", r"preprocess: .*'zca' \(got 'pca'\)"),
        ("method: ast\n", "", r"method: Field required"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DstillError, match=message):
        load_recipe(write(tmp_path, old, new))


def test_settings_that_contradict_each_other_are_refused_in_one_sentence() -> None:
    with pytest.raises(DstillError) as caught:
        resolve("cifar10/ast-ipc1", shape(), method=None, ipc=None, changes=["distill.min_start_epoch=9"])
    assert str(caught.value) == "--set: distill: min_start_epoch 9 must be below max_start_epoch 2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.iteration=3", r"unknown key 'distill\.iteration'; did you mean iterations"),
        ("distil.iterations=3", r"unknown key 'distil'; did you mean distill"),
        ("protcol=mtt", r"unknown key 'protcol'; did you mean protocol"),
        ("experts.gsam.rh=1", r"unknown key 'experts\.gsam\.rh'; did you mean rho"),
        ("distill.iterations", r"not an assignment: write section\.key=value"),
        ("net.name.x=1", r"name is a value, not a section"),
        ("distill.iterations=abc", r"--set: distill\.iterations: .*integer"),
        ("distill.iterations=[1", r"not valid YAML"),
    ],
)
def test_a_mistyped_assignment_is_refused(change: str, message: str) -> None:
    with pytest.raises(DstillError, match=message):
        resolve("cifar10/ast-ipc1", shape(), method=None, ipc=None, changes=[change])


# Resolving


def test_assignments_are_applied_last_and_in_order() -> None:
    changes = ["distill.iterations=3", "distill.lr_alpha=1e-6", "distill.iterations=4", "distill.balanced_loss=off", "ipc=7"]
    found, _ = resolve("cifar10/ast-ipc1", shape(), method=None, ipc=2, changes=changes)
    assert found.distill is not None
    assert (found.ipc, found.distill.iterations, found.distill.lr_alpha) == (7, 4, 1e-6)
    assert found.distill.balanced_loss == "off"


def test_an_assignment_may_open_a_section_that_the_recipe_leaves_out() -> None:
    found, _ = resolve("cifar10/ast-ipc1", shape(), method=None, ipc=None, changes=["experts.gsam.rho=0.05"])
    assert found.experts is not None and found.experts.gsam is not None
    assert (found.experts.gsam.rho, found.experts.gsam.alpha) == (0.05, 1.0)


def test_an_assignment_leaves_the_recipe_it_starts_from_alone() -> None:
    before = load_recipe("cifar10/ast-ipc1")
    recipes.changed(before, ["distill.iterations=3", "net.width=8"], "recipe")
    assert before == load_recipe("cifar10/ast-ipc1")


@pytest.mark.parametrize(("data", "side", "classes"), [("cifar10", 32, 10), ("cifar100", 32, 100), ("tiny-imagenet", 64, 200)])
def test_a_data_set_finds_its_own_recipe(data: str, side: int, classes: int) -> None:
    found, origin = resolve(None, shape(data, 3, side, classes), method="mtt", ipc=10)
    assert found == load_recipe(f"{data}/mtt-ipc10")
    assert origin == f"recipe {data}/mtt-ipc10"


def test_the_default_is_ast_with_one_image_per_class() -> None:
    assert resolve(None, shape("cifar10"), method=None, ipc=None)[0] == load_recipe("cifar10/ast-ipc1")


@pytest.mark.parametrize("subset", ["nette", "woof", "meow", "squawk", "fruit", "yellow"])
def test_imagenet_subsets_share_their_recipes(subset: str) -> None:
    found, origin = resolve(None, shape(subset, 3, 128, 10), method="ast", ipc=10)
    assert found == load_recipe("imagenet-subset/ast-ipc10")
    assert origin == "recipe imagenet-subset/ast-ipc10"


@pytest.mark.parametrize(
    ("side", "classes", "ipc", "nearest"),
    [
        (32, 10, 1, "cifar10/ast-ipc1"),
        (32, 12, 40, "cifar10/ast-ipc50"),
        (32, 80, 10, "cifar100/ast-ipc10"),
        (64, 150, 1, "tiny-imagenet/ast-ipc1"),
        (128, 12, 8, "imagenet-subset/ast-ipc10"),
        (28, 2, 1, "cifar10/ast-ipc1"),
    ],
)
def test_other_data_take_the_settings_of_the_nearest_published_case(side: int, classes: int, ipc: int, nearest: str) -> None:
    found, origin = resolve(None, shape(side=side, classes=classes), method="ast", ipc=ipc)
    base = load_recipe(nearest)
    assert (found.data, found.ipc) == ("mine", ipc)
    assert found.experts == base.experts
    assert found.distill is not None and base.distill is not None
    assert (found.distill.lr_images, found.distill.max_start_epoch) == (base.distill.lr_images, base.distill.max_start_epoch)
    assert f"derived from {nearest}" in origin
    assert f"no recipe for mine at IPC {ipc}" in origin
    assert "dstill tune" in origin
    assert found.note == f"derived from {nearest}"


@pytest.mark.parametrize("method", ["mtt", "tesla", "ftd", "ast"])
def test_settings_are_derived_within_the_method(method: str) -> None:
    found, origin = resolve(None, shape(classes=7), method=method, ipc=3)
    assert found.method == method
    assert f"/{method}-ipc" in origin


@pytest.mark.parametrize(("side", "depth"), [(8, 2), (16, 2), (28, 2), (32, 3), (48, 3), (64, 4), (128, 5), (256, 5)])
def test_larger_images_get_a_deeper_network(side: int, depth: int) -> None:
    assert resolve(None, shape(side=side, classes=7), method="ast", ipc=1)[0].net.depth == depth


@pytest.mark.parametrize("side", [4, 7, 8, 15, 16, 28, 100])
def test_a_derived_network_can_be_built_for_its_images(side: int) -> None:
    import torch

    from dstill.nets import networks as nets

    found, _ = resolve(None, shape(side=side, classes=7), method="ast", ipc=1)
    net = nets.build(found.net.model_copy(update={"width": 4}), 3, 7, (side, side), torch.Generator())
    assert net(torch.rand(2, 3, side, side)).shape == (2, 7)


@pytest.mark.parametrize(
    ("channels", "side", "kind"),
    [(3, 32, "zca"), (3, 48, "zca"), (3, 49, "standardise"), (1, 56, "zca"), (1, 90, "standardise")],
)
def test_only_small_images_are_whitened(channels: int, side: int, kind: str) -> None:
    assert resolve(None, shape(channels=channels, side=side, classes=7), method="ast", ipc=1)[0].preprocess == kind


@pytest.mark.parametrize("name", [name for name, entry in DATASETS.items() if not entry.mirror])
@pytest.mark.parametrize("method", ["ast", "mtt"])
def test_digits_are_not_mirrored(name: str, method: str) -> None:
    found, _ = resolve(None, shape(name, 1, 8 if name == "digits" else 32), method=method, ipc=3)
    assert "flip" not in found.augmentation
    assert {"crop", "scale", "rotate"} <= set(found.augmentation.split("_"))


@pytest.mark.parametrize("name", ["mine", "fashion-mnist"])
def test_other_data_are_mirrored(name: str) -> None:
    assert "flip" in resolve(None, shape(name, 1), method="ast", ipc=1)[0].augmentation


def test_a_small_memory_cuts_the_students_steps_and_says_so() -> None:
    roomy, said = resolve(None, shape(), method="ast", ipc=1)
    tight, origin = resolve(None, shape(memory=50e6), method="ast", ipc=1)
    assert roomy.distill is not None and tight.distill is not None
    assert roomy.distill.student_steps == 50
    assert "cut" not in said
    # A quarter of 50 MB holds 9 vectors of 320,010 float32 numbers.
    assert tight.distill.student_steps == 9
    assert "N cut from 50 to 9 to fit the memory" in origin


def test_the_window_is_cut_where_its_vectors_do_not_fit_and_a_batch_of_everything_is_dropped() -> None:
    plenty, _ = resolve(None, shape(), method="rat-bptt", ipc=50)
    assert (plenty.distill.window, plenty.distill.batch_syn) == (60, None)  # type: ignore[attr-defined]
    # 320,010 parameters, four vectors of which are kept for each step.
    tight, origin = resolve(None, shape(memory=4 * 4 * 4 * 320_010 * 20), method="rat-bptt", ipc=10)
    assert tight.distill.window == 20 and "W cut from 60 to 20 to fit the memory" in origin  # type: ignore[attr-defined]


def test_the_students_steps_are_never_cut_below_the_expert_epochs() -> None:
    found, _ = resolve(None, shape(memory=1.0), method="ast", ipc=1)
    assert found.distill is not None
    assert found.distill.student_steps == found.distill.expert_epochs


def test_a_batch_larger_than_the_whole_set_is_dropped() -> None:
    found, _ = resolve(None, shape(classes=80), method="ast", ipc=1)
    larger, _ = resolve(None, shape(classes=80), method="ast", ipc=10)
    assert found.distill is not None and larger.distill is not None
    assert found.distill.batch_syn is None
    assert larger.distill.batch_syn == 128


def test_random_needs_no_settings() -> None:
    found, origin = resolve(None, shape(), method="random", ipc=5)
    assert (found.method, found.ipc, found.experts, found.distill) == ("random", 5, None, DistillConfig())
    assert origin.startswith("the method's own settings")


def test_random_images_meet_the_network_and_inputs_of_the_methods_beside_them() -> None:
    data = shape("digits", 1, 8)
    random, ast = (resolve(None, data, method=method, ipc=1)[0] for method in ("random", "ast"))
    assert (random.net, random.preprocess, random.augmentation) == (ast.net, ast.preprocess, ast.augmentation)


def test_a_recipe_of_another_method_is_refused() -> None:
    with pytest.raises(DstillError, match="is for method 'ast', not 'mtt'"):
        resolve("cifar10/ast-ipc1", shape(), method="mtt", ipc=None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "data", [shape("cifar10"), shape("cifar100", 3, 32, 100), shape("digits", 1, 8), shape("mine", 3, 128, 5)]
)
def test_smoke_is_small_for_every_method_and_data_set(method: str, data: About) -> None:
    found, origin = resolve("smoke", data, method=method, ipc=2)
    assert (found.method, found.ipc, found.protocol, found.net.width) == (method, 2, "quick", 8)
    assert "smoke" in origin
    if METHODS[method].needs_experts:
        assert found.distill is not None
        assert (found.expert_config.count, found.expert_config.epochs) == (2, 3)
        assert found.distill.iterations * found.distill.student_steps <= 50


def test_smoke_keeps_what_makes_a_method() -> None:
    def smoke(method: str) -> Recipe:
        return resolve("smoke", shape("cifar10"), method=method, ipc=1)[0]

    tesla, ftd, ast = (smoke(method) for method in ("tesla", "ftd", "ast"))
    assert tesla.distill is not None and ftd.distill is not None and ast.distill is not None
    assert (tesla.distill.gradient, tesla.distill.soft_labels) == ("tesla", "expert")
    assert ftd.distill.image_ema == 0.9999
    assert ftd.expert_config.gsam is not None
    assert (ast.distill.initialisation, ast.distill.perturbation) == ("representative", "paper")


@pytest.mark.parametrize("name", [name for name in OTHER_GRID if "/dc-" in name or "/dsa-" in name])
def test_gradient_matching_is_as_published(name: str) -> None:
    recipe = load_recipe(name)
    matching = recipe.distill
    assert isinstance(matching, GradientMatchingConfig)
    assert matching.loops(recipe.ipc) == {1: (1, 1), 10: (10, 50), 50: (50, 10)}[recipe.ipc]
    assert (matching.iterations, matching.batch_real, matching.lr_images, matching.image_momentum) == (1000, 256, 0.1, 0.5)
    assert (matching.lr_net, matching.batch_train) == (0.01, 256)
    kind = ("noise", False) if recipe.method == "dc" else ("random", True)
    assert (matching.initialisation, matching.augment) == kind


def test_the_other_published_methods_are_as_published() -> None:
    dm, cafe, frepo = (load_recipe(f"cifar10/{name}-ipc10").distill for name in ("dm", "cafe", "frepo"))
    assert isinstance(dm, DistributionMatchingConfig)
    assert (dm.iterations, dm.batch_real, dm.lr_images, dm.initialisation) == (20_000, 256, 1.0, "random")
    assert isinstance(cafe, CafeConfig)
    assert (cafe.iterations, cafe.lr_images, cafe.settled, cafe.moved, cafe.window) == (2000, 0.1, 0.04, 0.03, 10)
    assert [share * cafe.iterations for share in cafe.halve_at] == [1200, 1600, 1800]
    assert isinstance(frepo, FrepoConfig)
    assert (frepo.iterations, frepo.lr, frepo.pool, frepo.max_age, frepo.batch_real) == (500_000, 3e-4, 10, 100, 1024)
    assert [load_recipe(f"cifar10/frepo-ipc{ipc}").distill.flip for ipc in (1, 10, 50)] == [True, False, False]  # type: ignore[attr-defined]


def test_what_depends_on_the_ipc_and_on_the_data_is_not_inherited_from_a_nearby_recipe() -> None:
    found = resolve(None, shape("cifar10"), method="dc", ipc=20)[0].distill
    assert isinstance(found, GradientMatchingConfig) and found.loops(20) == (20, 25)
    for name, side, ipc, flip, depth in [("cifar10", 32, 2, False, 3), ("svhn", 32, 1, False, 3), ("mine", 64, 1, True, 4)]:
        frepo = resolve(None, shape(name, side=side), method="frepo", ipc=ipc)[0].distill
        assert isinstance(frepo, FrepoConfig)
        assert (frepo.flip, frepo.net.depth) == (flip, depth), name


@pytest.mark.parametrize("ipc", [0, -1])
def test_an_ipc_below_one_is_refused(ipc: int) -> None:
    with pytest.raises(DstillError, match=f"ipc must be at least 1, got {ipc}"):
        resolve(None, shape(), method="dm", ipc=ipc)


def test_a_data_sets_own_recipe_of_another_ipc_comes_before_other_data() -> None:
    recipe, origin = resolve(None, shape("digits", 1, 8), method="dm", ipc=7)
    assert "derived from digits/dm-ipc1" in origin
    assert recipe == load_recipe("digits/dm-ipc1").model_copy(update={"ipc": 7, "note": recipe.note})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_has_settings_for_data_that_nobody_wrote_a_recipe_for(method: str) -> None:
    for name in (None, "smoke"):
        found, _ = resolve(name, shape(side=20, classes=7), method=method, ipc=3)
        assert found.method == method
        assert (found.experts is not None) == METHODS[method].needs_experts


def test_unknown_and_mistyped_keys_of_a_methods_settings_are_named() -> None:
    with pytest.raises(DstillError, match=r"unknown key 'distill.batch_reel'; did you mean batch_real"):
        resolve(None, shape(), method="dm", ipc=1, changes=["distill.batch_reel=3"])
    with pytest.raises(DstillError, match=r"distill.lr_images: Input should be greater than 0"):
        resolve(None, shape(), method="dc", ipc=1, changes=["distill.lr_images=-1"])
    with pytest.raises(DstillError, match=r"unknown key 'distill.net.widht'; did you mean width"):
        resolve(None, shape(), method="frepo", ipc=1, changes=["distill.net.widht=3"])
    with pytest.raises(DstillError, match=r"unknown key 'distill.student_steps'"):
        resolve(None, shape(), method="random", ipc=1, changes=["distill.student_steps=3"])


@pytest.mark.parametrize(
    ("method", "section", "key", "value"),
    [
        ("dc", "distill", "augment", False),
        ("dc", "distill", "initialisation", "noise"),
        ("dsa", "distill", "augment", True),
        ("tesla", "distill", "gradient", "tesla"),
        ("tesla", "distill", "soft_labels", "expert"),
        ("ftd", "distill", "image_ema", 0.9995),
        ("ftd", "experts", "gsam", {"rho": 0.01, "alpha": 1.0}),
        ("mtt", "experts", "gsam", None),
    ],
)
def test_what_a_recipe_leaves_out_is_as_its_method_has_it(method: str, section: str, key: str, value: object) -> None:
    recipe = Recipe.model_validate({"data": "mine", "method": method, "ipc": 1})
    found = recipe.expert_config if section == "experts" else recipe.distill
    assert found.model_dump()[key] == value


@pytest.mark.parametrize("changes", [[], ["distill.image_ema=null"], ["experts.gsam=null", "distill.image_ema=0.5"]])
def test_what_is_switched_off_stays_off_in_a_file(changes: list[str], tmp_path: Path) -> None:
    recipe = recipes.changed(recipes.load_recipe("cifar10/ftd-ipc10"), changes, "here")
    (tmp_path / "mine.yaml").write_text(recipes.dump(recipe))
    assert recipes.load_recipe(str(tmp_path / "mine.yaml")) == recipe


@pytest.mark.parametrize("name", ["gone.yaml", "/nowhere/gone.yaml", "gone/gone.yml"])
def test_a_file_that_is_missing_is_no_unknown_name(name: str) -> None:
    for load, what in ((load_recipe, "recipe"), (load_protocol, "protocol")):
        with pytest.raises(DstillError, match=f"^the {what} file {name} does not exist"):
            load(name)
