"""The code on a page runs as it stands and does what the run did; nothing in a file can become code."""

from __future__ import annotations

import html
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dstill
from dstill import DistilledSet
from dstill.artifacts.pictures import image_of
from dstill.artifacts.record import DataSource
from dstill.config.settings import NetConfig
from dstill.reporting import snippet


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two digits, which are easy to tell apart."""
    folder, digits = tmp_path_factory.mktemp("photos"), dstill.load_real("digits", classes=["0", "1"])
    for split, part in (("train", digits.train), ("test", digits.test)):
        for c, rows in enumerate(part.by_class(2)):
            (folder / split / f"a {c}").mkdir(parents=True)
            for row in rows[:20].tolist():
                image_of(part.images[row]).save(folder / split / f"a {c}" / f"{row}.png")
    return folder


def code(page: Path) -> list[str]:
    """What the page offers to copy."""
    return [html.unescape(text) for text in re.findall(r'<pre class="copy">(.*?)</pre>', page.read_text(), re.DOTALL)]


@pytest.mark.parametrize(
    ("method", "changes", "least"),
    [("dm", ["distill.parts=2"], 60), ("frepo", [], 70), ("random", [], 65)],
)
def test_the_code_of_a_page_trains_and_tests(
    photos: Path,
    tmp_path: Path,
    method: str,
    changes: list[str],
    least: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos.parent)
    options: dict[str, Any] = {"machine": dstill.Machine(cache=tmp_path / "cache")}
    real = dstill.load_real(photos.name, image_size=8)
    once = dstill.Evaluation(networks=1, random=False)
    dstill.run(real, method=method, recipe="smoke", changes=changes, out=tmp_path / "run", evaluation=once, **options)
    python, command = code(tmp_path / "run" / "report.html")
    assert ("labels.softmax(1)" in python) == (method == "frepo")
    assert ("# each stored image as the 4 that it holds" in python) == (method == "dm")
    capsys.readouterr()
    exec(compile(python.replace("range(1000)", "range(300)"), "page", "exec"), {})
    (accuracy,) = re.findall(r"test accuracy ([\d.]+)%", capsys.readouterr().out)
    assert float(accuracy) > least, "and not 50, as it would be with labels or inputs of another kind"
    words = ["dstill", "evaluate", str(tmp_path / "run" / "set-0"), photos.name, "--image-size", "8"]
    assert shlex.split(command) == words


def made(**changes: Any) -> DistilledSet:
    one = DistilledSet.from_tensors(torch.rand(2, 3, 8, 8), [0, 1], class_names=["cat", "dog"])
    return replace(one, **changes)


def test_a_name_from_a_file_cannot_become_code(tmp_path: Path) -> None:
    evil = "x'\nimport os; os.abort()\n'"
    source = DataSource(source=evil, classes=(evil, "dog"))
    text = snippet.python(made(net=NetConfig(name=f"m:{evil}")), tmp_path / evil, source)
    assert not [line for line in text.splitlines() if line.startswith("import os")]
    compile(text, "page", "exec")
    assert "build(NetConfig(), " in text, "no file decides what is imported"
    assert shlex.split(snippet.command(tmp_path, source)) == [
        "dstill",
        "evaluate",
        str(tmp_path),
        evil,
        "--classes",
        f"{evil},dog",
    ]


def test_data_of_a_known_name_are_found_by_it() -> None:
    digits = made(data="digits", class_names=tuple("0123456789"), images=torch.zeros(2, 1, 8, 8))
    assert snippet.source_by_name(digits) == DataSource.of({"source": "digits"})
    larger = replace(digits, images=torch.zeros(2, 1, 12, 12))
    assert snippet.source_by_name(larger) == DataSource.of({"source": "digits", "image_size": 12})
    for other in ({"data": "mine"}, {"class_names": ("1", "3")}, {"images": torch.zeros(2, 3, 8, 8)}):
        assert snippet.source_by_name(replace(digits, **other)) is None
    assert snippet.source_by_name(replace(digits, images=torch.zeros(2, 1, 8, 12))) is None


def test_the_home_folder_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    source = DataSource.of({"source": str(tmp_path / "my photos")})
    made().save(tmp_path / "a run")
    text, command = snippet.python(made(), tmp_path / "a run", source), snippet.command(tmp_path / "a run", source)
    assert str(tmp_path) not in text + command
    assert command == "dstill evaluate ~/'a run' ~/'my photos'\n"
    trains, _ = text.split("real = ")
    names: dict[str, Any] = {}
    exec(compile(trains.replace("range(1000)", "range(0)"), "page", "exec"), names)
    assert names["syn"].class_names == ("cat", "dog")


def test_without_a_source_the_code_trains_and_says_how_to_go_on(tmp_path: Path) -> None:
    made().save(tmp_path)
    text = snippet.python(made(), tmp_path, None)
    assert "load_real" not in text and "# predicted = net(syn.preprocess.forward(images)).argmax(1)" in text
    names: dict[str, Any] = {}
    exec(compile(text.replace("range(1000)", "range(1)"), "page", "exec"), names)
    assert names["net"](torch.rand(3, 3, 8, 8)).shape == (3, 2)


def test_a_flag_has_no_value_and_what_the_command_line_cannot_say_makes_no_command(tmp_path: Path) -> None:
    folder = tmp_path / "set-0"
    said = snippet.command(folder, DataSource(source="photos", skip_damaged=True, test_split="val"))
    assert shlex.split(said)[3:] == ["photos", "--test-split", "val", "--skip-damaged"]
    assert snippet.command(folder, DataSource(source="photos", class_names=("cat", "dog"))) == ""
    assert "class_names=('cat', 'dog')" in snippet.python(made(), folder, DataSource(source="x", class_names=("cat", "dog")))
