"""The page is complete, correct and accessible, and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import html.parser
import io
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.short import SHORT

import dstill
from dstill import DistilledSet, DstillError
from dstill.artifacts.record import RunRecord
from dstill.cli.show import describe
from dstill.data.real import RealSet
from dstill.reporting.images import MOST_IMAGES
from dstill.reporting.page import report

HOSTILE = ("<script>alert(1)</script>", 'a"onload="x', "$x_1$")


class Page(html.parser.HTMLParser):
    """Every tag with its attributes, and the text between."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def runs(tiny_real: RealSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three finished runs: with experts and a representative start, with soft labels, a selection. Class names are hostile."""
    folder = tmp_path_factory.mktemp("runs")
    real = RealSet("tiny", tiny_real.train, tiny_real.test, HOSTILE)
    options: dict[str, Any] = {"recipe": "smoke", "machine": dstill.Machine(cache=folder / "cache"), "changes": ["net.width=4"]}
    options["changes"].append(f"protocol={SHORT}")
    for method in ("ast", "frepo", "random"):
        validate = 0 if method == "random" else 3
        dstill.run(
            real,
            method=method,
            out=folder / method,
            evaluation=dstill.Evaluation(whole=True, networks=2),
            recording=dstill.Recording(validate_every=validate),
            **options,
        )
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> Page:
    return Page(runs / "ast" / "report.html")


def test_nothing_is_asked_of_the_network_and_nothing_runs(runs: Path) -> None:
    report([runs / "ast", runs / "frepo"], runs / "both.html")
    for name in ("ast/report.html", "frepo/report.html", "random/report.html", "both.html"):
        page = Page(runs / name)
        assert not page.all("script") and not page.all("iframe") and not page.all("link")
        policies = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
        assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
        for _, attributes in page.tags:
            assert not [key for key in attributes if key.startswith("on")], "no handlers"
            for key in ("src", "href", "xlink:href", "action", "data"):
                assert attributes.get(key, "#").startswith(("#", "data:image/png;base64,", "data:image/webp;base64,"))
        assert "@import" not in page.source and not re.search(r"url\((?!#)", page.source)


def test_names_cannot_become_markup(page: Page) -> None:
    assert "alert(1)</script>" not in page.source
    assert HOSTILE[0] in page.text and HOSTILE[1] in page.text


def test_the_numbers_are_those_of_the_result(runs: Path, page: Page) -> None:
    result = dstill.Result.load(runs / "ast" / "result.json")
    assert result.random is not None and result.whole is not None
    for score in (result.accuracy, result.random, result.whole):
        assert f"{100 * score.mean:.1f} %" in page.text
    assert sum(map(sum, result.confusion)) == 30 * result.accuracy.n
    right = sum(row[i] for i, row in enumerate(result.confusion))
    assert right / (30 * result.accuracy.n) == pytest.approx(result.accuracy.mean)
    for i, row in enumerate(result.confusion):
        assert f"{100 * row[i] / sum(row):.1f} %" in page.text
    assert result.whole_bytes is not None
    assert f"1/{result.whole_bytes / result.stored_bytes:,.0f} of the training set" in page.text
    assert result.data_fingerprint in page.text


def test_images_are_those_of_the_set_and_have_words_instead(runs: Path, page: Page) -> None:
    one = DistilledSet.load(runs / "ast" / "set-0")
    images = page.all("img")
    ends = [image["alt"].rpartition(", ")[2] for image in images]
    assert ends == ["real", "at the start", "distilled"] * 3, "for each class, real images, the start and the end"
    assert [image["alt"] for image in images[2::3]] == [f"{name}, distilled" for name in HOSTILE]
    after = images[2::3]
    expected = (one.pixels() * 255).round().byte().permute(0, 2, 3, 1)
    for image, pixels in zip(after, expected, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as picture:
            assert np.array_equal(np.asarray(picture), pixels.numpy())
    drawings = page.all("svg")
    assert len(drawings) == 5, "validation, objective, rate, experts, map"
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in drawings)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_stored_images_are_shown_beside_what_they_hold(runs: Path, tiny_real: RealSet, tmp_path: Path) -> None:
    once = dstill.Evaluation(networks=1)
    options: dict[str, Any] = {"evaluation": once, "machine": dstill.Machine(cache=runs / "cache"), "out": tmp_path / "held"}
    dstill.run(tiny_real, method="dm", recipe="smoke", changes=["net.width=4", "distill.parts=2"], **options)
    page, one = Page(tmp_path / "held" / "report.html"), DistilledSet.load(tmp_path / "held" / "set-0")
    seen = [image for image in page.all("img") if image["alt"].endswith(", distilled")]
    stored = [image for image in page.all("img") if image["alt"].endswith(", stored")]
    assert (len(seen), len(stored), len(page.all("img"))) == (12, 3, 3 + 12 + 12 + 3)
    for images, of in ((seen, one.decoded), (stored, one)):
        expected = (of.pixels() * 255).round().byte().permute(0, 2, 3, 1)
        for image, pixels in zip(images, expected, strict=True):
            with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as picture:
                assert np.array_equal(np.asarray(picture), pixels.numpy())
    for words in ("tiny in 3 images", "Each holds 2 x 2 smaller ones", "random real images of the same size in bytes"):
        assert words in page.text
    assert (tmp_path / "held" / "set-0" / "stored.png").exists()
    assert not (runs / "ast" / "set-0" / "stored.png").exists() and "stored images" not in Page(runs / "ast/report.html").text


def test_a_class_says_how_many_of_its_images_are_recognised(runs: Path, page: Page) -> None:
    confusion = dstill.Result.load(runs / "ast" / "result.json").confusion
    for i, row in enumerate(confusion):
        assert f"{HOSTILE[i]} {100 * row[i] / sum(row):.1f} % recognised" in page.text


def test_a_selection_has_chosen_and_not_distilled(runs: Path) -> None:
    page = Page(runs / "random" / "report.html")
    assert [image["alt"].rpartition(", ")[2] for image in page.all("img")] == ["real", "chosen"] * 3
    assert "1 real image for each of 3 classes, chosen by random." in page.text
    assert "For each class: real images and what was chosen." in page.text


def test_a_folder_from_before_there_were_real_images_and_sources_makes_a_page(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "ast", tmp_path / "old")
    for name in ("real.webp", "source.json"):
        (tmp_path / "old" / "set-0" / name).unlink(missing_ok=True)
    page = Page(report([tmp_path / "old"], tmp_path / "old.html"))
    assert [image["alt"].rpartition(", ")[2] for image in page.all("img")] == ["at the start", "distilled"] * 3
    (tmp_path / "old" / "set-0" / "real.webp").write_bytes(b"RIFF")
    with pytest.raises(DstillError, match=r"real\.webp is damaged"):
        report([tmp_path / "old"], tmp_path / "old.html")


def test_kept_pictures_become_a_slider_that_stands_at_the_last(tiny_real: RealSet, runs: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"evaluation": dstill.Evaluation(networks=1), "machine": dstill.Machine(cache=runs / "cache")}
    recording = dstill.Recording(picture_every=2)
    dstill.run(tiny_real, method="dm", recipe="smoke", changes=["net.width=4"], out=tmp_path, recording=recording, **options)
    page = Page(tmp_path / "report.html")
    knobs = [knob for knob in page.all("input") if knob["type"] == "radio"]
    told = [f"after {iteration} iterations" for iteration in (0, 2, 4, 5)]
    assert [knob["aria-label"] for knob in knobs] == told
    assert ["checked" in knob for knob in knobs] == [False, False, False, True]
    assert {knob["name"] for knob in knobs} == {"film-1"}
    assert [image["alt"] for image in page.all("img")][-4:] == [f"the images {words}" for words in told]
    assert "after 2 iterations" in page.text
    score = dstill.Result.load(tmp_path / "result.json").accuracy
    assert f"{score.percent} % with this set (n = 1)" in page.text and f"reach {score.percent} % on the test set" in page.text


def test_every_tag_is_closed_in_its_order(runs: Path) -> None:
    report([runs / name for name in ("ast", "frepo", "random")], runs / "nested.html")
    for name in ("ast/report.html", "frepo/report.html", "random/report.html", "nested.html"):
        assert nesting((runs / name).read_text()) == []


def nesting(source: str) -> list[str]:
    """Tags that are not closed, or not in the order in which they were opened."""
    wrong, open_tags = list[str](), list[str]()

    class Checker(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in {"meta", "img", "input", "br", "hr", "link"}:
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            return None  # in drawings

        def handle_endtag(self, tag: str) -> None:
            if not open_tags or open_tags.pop() != tag:
                wrong.append(tag)

    Checker().feed(source)
    return wrong + open_tags


def test_a_wrong_order_would_be_found() -> None:
    assert nesting("<p><b></b></p>") == []
    assert nesting("<p><b></p></b>") and nesting("<div>")


def test_soft_labels_are_spelled_out(runs: Path) -> None:
    one, page = DistilledSet.load(runs / "frepo" / "set-0"), Page(runs / "frepo" / "report.html")
    first = one.labels[0].softmax(0)
    assert f"{one.class_names[int(first.argmax())]}: {100 * float(first.max()):.0f} %" in page.text


def test_no_id_is_on_a_page_twice(runs: Path) -> None:
    shutil.copytree(runs / "ast", runs / "again")
    page = Page(report([runs / "ast", runs / "again"], runs / "twice.html"))
    assert len(page.all("svg")) == 6, "four figures of both, and a map of each"
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)


def test_a_run_repeated_with_fewer_sets_shows_these_alone(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "random", tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "set-0", tmp_path / "run" / "set-1")
    assert len(RunRecord.read(runs / "ast").sets) == 1
    assert "set-1" not in describe(tmp_path / "run")
    shutil.copytree(runs / "ast", tmp_path / "ast")
    shutil.copytree(tmp_path / "ast" / "set-0", tmp_path / "ast" / "set-1")
    assert RunRecord.read(tmp_path / "ast") == RunRecord.read(runs / "ast")


def test_several_runs_share_a_table_and_their_curves(runs: Path) -> None:
    page = Page(report([runs / name for name in ("ast", "frepo", "random")], runs / "all.html"))
    assert "3 runs on tiny" in page.text
    for name, family in (("ast", "raw"), ("frepo", "labels"), ("random", "raw")):
        assert dstill.Result.load(runs / name / "result.json").accuracy.mean * 100 == pytest.approx(
            float(re.search(rf"{name} {name} 1 {family} ([\d.]+) ±", page.text).group(1)),
            abs=0.051,  # type: ignore[union-attr]
        )
    assert "Rows of different families" in page.text
    alike = Page(report([runs / name for name in ("ast", "random")], runs / "alike.html"))
    assert "Rows of different families" not in alike.text


def test_large_sets_are_cut_and_say_so(runs: Path, tmp_path: Path) -> None:
    one = DistilledSet.load(runs / "random" / "set-0")
    times = 100
    many = replace(one, images=one.images.repeat(times, 1, 1, 1), labels=one.labels.repeat(times), ipc=times)
    many.save(tmp_path / "many")
    page = Page(report([tmp_path / "many"], tmp_path / "many.html"))
    each = MOST_IMAGES // 3
    assert len(page.all("img")) == 3 * each, "and no real ones, which this folder does not have"
    assert f"{len(many.images) - 3 * each} more are not shown" in page.text


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(DstillError, match="no finished run"):
        report([tmp_path], tmp_path / "page.html")
    with pytest.raises(DstillError, match="at least one"):
        report([], tmp_path / "page.html")


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_the_contrast_that_accessibility_asks_for(page: Page) -> None:
    themes = re.findall(r":root \{([^}]*)\}", page.source)
    assert len(themes) == 3, "light, dark and paper"
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for ground in ("ground", "card"):
            for ink in ("ink", "soft", "accent", "good"):
                light, dark = sorted((_luminance(colours[ground]), _luminance(colours[ink])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, ink)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_complaint_or_sideways_scrolling(runs: Path, tmp_path: Path, width: int) -> None:
    report([runs / name for name in ("ast", "frepo", "random")], runs / "all.html")
    for name in ("all.html", "ast/report.html"):
        probe = tmp_path / f"probe-{width}.html"
        probe.write_text(
            f"<iframe id=f src='file://{runs / name}' style='width:{width}px;height:3000px;border:0'></iframe><p id=o></p>"
            "<script>onload=()=>{const d=f.contentDocument;o.textContent=JSON.stringify([d.documentElement.scrollWidth,"
            "[...d.images].every(i=>i.naturalWidth>0),performance.getEntriesByType('resource').length])}</script>"
        )
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
        command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width + 100},900"]
        shown = subprocess.run([*command, "--dump-dom", str(probe)], capture_output=True, text=True, timeout=120, check=True)
        found = re.search(r'<p id="o">\[(\d+),(\w+),\d+\]</p>', shown.stdout)
        assert found is not None, shown.stdout[-500:]
        assert int(found.group(1)) <= width
        assert found.group(2) == "true", "every image decodes"
        assert "CONSOLE" not in shown.stderr, [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
