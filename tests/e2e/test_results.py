"""The measured results stay small and complete: what the documentation names exists, and `dstill reproduce` reads it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import dstill
from dstill.config.measured import Reached, reached
from dstill.config.recipes import load_recipe
from dstill.config.settings import Recipe, canonical
from dstill.reproductions.page import Entry
from dstill.reproductions.run import small_picture
from dstill.reproductions.spec import reproduction_names

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_BYTES = 6_000_000
PATH = re.compile(r"results/[\w./-]*\w")
ENTRIES = sorted(
    path
    for what in reproduction_names()
    for path in RESULTS.glob(f"{what}/*/*.json")
    if "record" in json.loads(path.read_text())
)


def tracked() -> list[Path]:
    """The tracked files of `results`; all files if git is not available."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z", "results"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return [path for path in RESULTS.rglob("*") if path.is_file()]
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_results_take_at_most_six_megabytes() -> None:
    sizes = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    assert sum(sizes.values()) <= MOST_BYTES, f"the largest files: {largest}"


@pytest.mark.parametrize("source", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_result_that_a_page_names_is_there(source: Path) -> None:
    for name in PATH.findall(source.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{source.name} names {name}"


def test_runs_from_before_later_settings_are_still_the_same_runs() -> None:
    settings = json.loads((RESULTS / "digits-ipc1" / "set-0" / "settings.json").read_text())
    recipe = Recipe.model_validate(settings["recipe"])
    assert canonical(recipe)["distill"] == settings["recipe"]["distill"]
    other = recipe.model_copy(update={"distill": recipe.distill.model_copy(update={"skip_above": 1.0, "parts": 2})})
    assert canonical(other)["distill"].items() >= {"skip_above": 1.0, "parts": 2}.items()
    datm = load_recipe("cifar10/datm-ipc1")
    assert Recipe.model_validate(canonical(datm)) == datm and canonical(datm)["distill"]["start_epochs"] == "uniform"


@pytest.mark.parametrize("one", reached(), ids=lambda one: f"{one.data}-ipc{one.ipc}-{one.minutes:g}min")
def test_what_commands_say_of_budgets_was_measured(one: Reached) -> None:
    (path,) = (path for path in (RESULTS / "budget").glob("*.json") if json.loads(path.read_text())["data"] == one.data)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["ipc"] == one.ipc]
    runs = [cell for cell in cells if (cell["minutes"], cell["handed_out"]) == (one.minutes, one.method)]
    assert one.accuracy in [round(100 * cell["accuracy"]["mean"], 1) for cell in runs]
    coresets = [cell["accuracy"]["mean"] for cell in cells if cell["method"] in ("random", "herding", "kmeans")]
    coresets += [score for cell in cells for score in cell.get("aside", {}).values()]
    assert one.coreset in [round(100 * score, 1) for score in coresets]


def test_there_are_rows() -> None:
    assert len(ENTRIES) >= 50
    assert {path.parents[1].name for path in ENTRIES} >= {"table1", "table3", "table6", "table7", "table8", "fig6"}


@pytest.mark.parametrize("path", ENTRIES, ids=lambda path: str(path.relative_to(RESULTS)))
def test_a_row_can_be_read_and_has_its_picture(path: Path) -> None:
    entry = Entry.load(path)
    assert entry.record.result is not None
    assert bool(entry.picture) == (entry.set == 0), "one picture per row"
    if entry.picture:
        with Image.open(path.parent / entry.picture) as picture:
            picture.load()


@pytest.mark.parametrize("folder", sorted({path.parent for path in ENTRIES}), ids=lambda path: str(path.relative_to(RESULTS)))
def test_no_file_of_a_reproduction_is_left_over(folder: Path) -> None:
    shown = (folder / "page.md").read_text(encoding="utf-8")
    wanted = {Entry.load(path).picture for path in ENTRIES if path.parent == folder}
    wanted |= set(re.findall(r"\]\((.+?)\)", shown))
    assert wanted - {""} == {path.name for path in folder.iterdir() if path.suffix in {".png", ".webp"}}


@pytest.mark.parametrize(("width", "kept"), [(331, 331), (662, 331), (2262, 377)])
def test_a_picture_is_reduced_to_at_most_400_pixels(width: int, kept: int, tmp_path: Path) -> None:
    Image.effect_noise((width, width), 90).convert("RGB").save(tmp_path / "distilled.png")
    small_picture(tmp_path / "distilled.png", tmp_path / "small.webp")
    with Image.open(tmp_path / "small.webp") as picture:
        assert (picture.format, picture.size) == ("WEBP", (kept, kept))
    assert (tmp_path / "small.webp").stat().st_size < 100_000


def test_a_high_picture_shows_its_upper_part(tmp_path: Path) -> None:
    grid = Image.new("RGB", (40, 400), "black")
    grid.paste("white", (0, 0, 40, 40))
    grid.save(tmp_path / "distilled.png")
    small_picture(tmp_path / "distilled.png", tmp_path / "small.webp")
    with Image.open(tmp_path / "small.webp") as picture:
        assert picture.size == (40, 40)
        assert min(low for low, _ in picture.convert("RGB").getextrema()) > 250


@pytest.mark.usefixtures("in_this_process")
def test_a_new_row_gets_a_small_picture(tmp_path: Path) -> None:
    runs, cache = tmp_path / "runs", dstill.Machine(cache=tmp_path / "cache")
    folder = dstill.reproduce("table3", only=["random"], out=tmp_path / "results", runs=runs, machine=cache)
    entry = Entry.load(folder / "random-digits-ipc1.json")
    assert entry.picture == "random-digits-ipc1.webp"
    (original,) = runs.glob("*/set-0/distilled.png")
    with Image.open(original) as large, Image.open(folder / entry.picture) as small:
        assert (small.width, small.height) == (large.width // 2, large.height // 2)
