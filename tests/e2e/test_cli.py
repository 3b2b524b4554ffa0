"""What the command line prints, for people and for programs."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.caches import with_kernels

from dstill import load_recipe
from dstill.cli import main as cli
from dstill.config.recipes import recipe_names
from dstill.config.registry import METHODS
from dstill.errors import DstillError
from dstill.nets.networks import NETWORKS
from dstill.support.console import ConsoleReporter

# `main` reads sys.argv; in a test, cyclopts warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:Cyclopts application invoked without tokens")

Call = Callable[..., tuple[int, str, str]]
PROTOCOL = (
    "{name: tiny, version: 7, passes: 3, batch_size: 8, momentum: 0.9, weight_decay: 0.0, lr: 0.05, lr_factor: 0.5, "
    "networks: 1}"
)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs the command line in this process, in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DSTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dstill", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


FAST = ["--recipe", "smoke", "--train-fraction", "0.1", "--set", "protocol=tiny.yaml", "net.width=4"]


def test_neither_help_nor_any_list_imports_torch() -> None:
    code = """
import contextlib, io, sys
from dstill.cli.main import main
commands = ["run", "train-experts", "distill", "evaluate", "tune", "show", "ls"]
calls = [["--help"], ["--version"], *([c, "--help"] for c in commands)]
calls += [["ls", k, *j] for k in ("methods", "networks", "datasets", "recipes", "protocols") for j in ([], ["--json"])]
for call in calls:
    sys.argv = ["dstill", *call]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, call
    assert out.getvalue().strip(), call
    heavy = {"torch", "numpy", "sklearn", "datasets", "matplotlib"} & set(sys.modules)
    assert not heavy, (call, heavy)
print(len(calls))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "19\n"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import dstill, sys; assert 'torch' not in sys.modules; dstill.RealSet; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "names"), [("methods", list(METHODS)), ("networks", list(NETWORKS)), ("recipes", recipe_names())]
)
def test_a_list_names_everything_there_is(kind: str, names: list[str], call: Call) -> None:
    code, out, err = call("ls", kind, "--json")
    assert (code, err) == (0, "")
    assert [row["name"] for row in json.loads(out)] == names
    plain, _, rest = call("ls", kind)[1].partition("\n\n")
    assert [line.split()[0] for line in plain.splitlines()] == names
    assert ("--minutes" in rest) == (kind == "methods"), "what budgets reached"


def test_a_list_of_recipes_says_what_each_is_for(call: Call) -> None:
    rows = {row["name"]: row for row in json.loads(call("ls", "recipes", "--json")[1])}
    row = rows["cifar100/ast-released-ipc10"]
    assert (row["data"], row["method"], row["ipc"]) == ("cifar100", "ast", 10)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "digits", "--set", "protocol=astt"], "unknown protocol 'astt'; did you mean ast?"),
        (["run", "digits", "--nets", "convnet,vgg12"], "unknown network 'vgg12'; did you mean vgg11?"),
        (["run", "digits", *FAST, "--sets", "0"], "sets must be at least 1, got 0"),
        (["run", "digits", *FAST, "--networks", "-2"], "networks must be at least 1, got -2"),
        (["run", "digits", *FAST, "-o", "tiny.yaml"], "tiny.yaml is not a folder, and none can be made there"),
        (["run", "digits", *FAST, "-o", "/proc/nope"], "/proc/nope cannot be made or written to"),
        (["compare", "digits", "--recipe", "smoke", "-o", "/proc/nope"], "/proc/nope cannot be made or written to"),
        (["run", "digits", "--test-split", "val"], "digits has no split 'val' to test on; known: test"),
        (["run", "digits", "--train-fraction", "2"], "train_fraction must be above 0 and at most 1, got 2.0"),
        (["train-experts", "digits", *FAST, "--only", "0,x"], "--only takes numbers joined by commas, got '0,x'"),
        (["train-experts", "digits", *FAST, "--only", "-1"], "experts are numbered from 0, got -1"),
        (["train-experts", "digits", "--method", "random"], "method 'random' needs no experts"),
        (["distill", "digits", *FAST, "--experts", "nowhere"], "nowhere holds no experts"),
        (
            ["tune", "digits", "--method", "random", "--budget", "1"],
            "method 'random' names no settings that tune could search: take ast, mtt or rat-bptt",
        ),
        (["show", "tiny.yaml"], "tiny.yaml is damaged or not a safetensors file"),
        (["show", "."], "holds no distilled set, no experts and no result"),
        (["run", "digits", "--set", "distill.min_start_epoch=99"], "min_start_epoch 99 must be below max_start_epoch"),
        (["run", "digits", "--set", "distill.iterations=[1"], "is not valid YAML"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_code_2(arguments: list[str], sentence: str, call: Call) -> None:
    code, out, err = call(*arguments)
    last = [line for line in err.splitlines() if line.startswith("dstill: ")]
    assert code == 2
    assert out == ""
    assert len(last) == 1
    assert sentence in last[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "digits", "--metod", "ast"], "--method"),
        (["rum", "digits"], "run"),
        (["ls", "recipe"], "recipes"),
        (["run"], "--source requires an argument"),
        (["run", "digits", "--ipc", "many"], "many"),
        (["run", "digits", "--ipc", "1.5"], "'1.5' is not a whole number"),
        (["run", "digits", "--workers", "few"], "'few' is not a whole number"),
    ],
)
def test_a_mistyped_command_line_is_answered_with_code_2_and_a_hint(arguments: list[str], hint: str, call: Call) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert hint in err


def test_a_comparison_with_a_row_that_failed_ends_with_code_1(call: Call, tmp_path: Path) -> None:
    words = [
        "compare",
        "digits",
        "--methods",
        "random",
        "--recipe",
        "smoke",
        "--ipc",
        "9999",
        "-o",
        str(tmp_path),
        "--no-whole",
    ]
    code, out, _ = call(*words)
    assert code == 1
    assert "fewer than the 9999" in " ".join(out.split())


@pytest.mark.parametrize("command", ["run", "compare", "distill"])
def test_results_are_not_put_among_the_images(
    command: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There, the next command would read them as a class or a split."""
    (tmp_path / "train" / "cat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    code, _, err = call(command, ".")
    assert code == 2
    assert "lies inside the folder of images .: pass -o a folder outside it" in err
    assert not (tmp_path / "runs").exists() and not (tmp_path / "distilled").exists()


def test_debug_raises_what_is_otherwise_a_sentence(call: Call) -> None:
    with pytest.raises(DstillError, match="did you mean digits"):
        call("run", "digots", "--debug")


def test_ctrl_c_says_that_the_same_command_continues(tmp_path: Path) -> None:
    # The interruption comes with a progress line, so that nothing depends on time.
    code = """
import sys
from dstill.cli import main as cli
from dstill.cli import options
from dstill.support.console import ConsoleReporter

class Interrupted(ConsoleReporter):
    def progress(self, stage, done, total, detail=""):
        raise KeyboardInterrupt

options.ConsoleReporter = Interrupted
cli.main()
"""
    command = [sys.executable, "-c", code, "run", "digits", "--recipe", "smoke", "--train-fraction", "0.1"]
    environment = {**os.environ, "DSTILL_CACHE": str(with_kernels(tmp_path / "cache"))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 130
    assert "what was stored is kept, and the same command resumes from there" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_can_be_shown_evaluated_and_continued(call: Call, tmp_path: Path) -> None:
    code, out, err = call("run", "digits", *FAST, "--method", "mtt", "-o", "r", "--quiet")
    assert (code, err) == (0, "")
    assert "random real images" in out

    code, out, _ = call("show", "r")
    assert code == 0
    assert "mtt on digits, IPC 1, test accuracy" in out
    assert "10 classes, 1x8x8, hard labels" in out
    assert "protocol tiny v7" in out

    assert "r/set-0: digits distilled by mtt" in call("show", "r/set-0")[1]
    assert "test accuracy" in call("show", "r/result.json")[1]
    (experts,) = (tmp_path / "cache" / "experts").iterdir()
    assert "2 expert(s), 3 epochs" in call("show", str(experts))[1]
    assert call("show", "r", "--png", "x.png")[0] == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")

    code, out, err = call("evaluate", "r/set-0", "digits", "--train-fraction", "0.1", "--protocol", "tiny.yaml", "-o", "e.json")
    assert code == 0
    again = json.loads((tmp_path / "e.json").read_text())
    assert again["accuracy"]["values"] == json.loads((tmp_path / "r" / "result.json").read_text())["accuracy"]["values"]
    assert (again["protocol"], again["method"]) == ({"name": "tiny", "version": 7}, "mtt")

    code, _, err = call("run", "digits", *FAST, "--method", "mtt", "-o", "r")
    assert code == 0
    assert "is finished: nothing to do" in err
    assert "\r" not in err and "\x1b" not in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--classes", "1,2"], "evaluate it on the data it was distilled from"),
        (["--image-size", "16"], "pass --image-size"),
    ],
)
def test_a_set_is_not_evaluated_on_other_data(arguments: list[str], sentence: str, call: Call) -> None:
    call("run", "digits", *FAST, "--method", "random", "-o", "r", "--quiet")
    code, _, err = call("evaluate", "r/set-0", "digits", "--protocol", "tiny.yaml", *arguments)
    assert code == 2
    assert sentence in err


def test_several_images_in_one_go_through_every_command(call: Call, tmp_path: Path) -> None:
    fast = [*FAST, "distill.parts=2", "distill.initialisation=noise"]
    assert call("run", "digits", "--method", "dm", "--networks", "1", "-o", "run", *fast)[0] == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["parts"], result["family"], result["stored_bytes"]) == (2, "parts", 10 * 64 + 10)
    code, out, _ = call("show", "run", "--png", "seen.png")
    assert code == 0 and "1x8x8 with 2x2 parts" in out
    assert call("show", "run", "--png", "stored.png", "--stored")[0] == 0
    with Image.open("seen.png") as seen, Image.open("stored.png") as stored:
        assert (seen.size, stored.size) == ((4 * 66 + 2, 10 * 66 + 2), (10 * 66 + 2, 66 + 2))
    assert call("export", "run/set-0", "pt", "-o", "held", "--stored")[0] == 0
    digits = ["digits", "--train-fraction", "0.1"]
    imported = ["import", "held/images_best.pt", *digits, "--preprocess", "standardise", "-o", "back", "--parts", "2"]
    code, out, _ = call(*imported, "--method", "dm")
    assert code == 0 and "digits distilled by dm, 1 image(s) of each of 10 classes, 1x8x8 with 2x2 parts" in out
    code, out, _ = call("plan", "digits", "--method", "random", *FAST, "distill.parts=2")
    assert code == 2


def test_tune_writes_a_recipe_that_says_how_it_was_found(call: Call) -> None:
    short = ["--set", "distill.iterations=2", "distill.student_steps=2"]
    code, out, err = call("tune", "digits", *FAST, *short, "--method", "mtt", "--budget", "0.01", "-o", "best.yaml")
    assert code == 0
    assert out == "best.yaml\n"
    assert "candidate 1" in err
    best = load_recipe("best.yaml")
    assert (best.data, best.method, best.ipc) == ("digits", "mtt", 1)
    assert "tuned on the validation part" in best.note
    code, _, err = call("run", "digits", "--recipe", "best.yaml", "--train-fraction", "0.1", "-o", "r", "--quiet")
    assert (code, err) == (0, "")


def test_tune_says_that_every_candidate_collapsed(call: Call) -> None:
    wild = ["--set", "distill.iterations=12", "distill.student_steps=2", "distill.lr_alpha=1e30"]
    code, _, err = call("tune", "digits", *FAST, *wild, "--method", "mtt", "--budget", "0.001", "-o", "best.yaml")
    assert code == 2
    assert "candidate 1: " in err and "collapsed" in err
    assert "all of 1 candidates collapsed" in err
    assert not Path("best.yaml").exists()


def test_progress_on_a_terminal_rewrites_one_line_and_ends_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    reporter = ConsoleReporter(stream)
    for done in (1, 2, 3):
        reporter.progress("distilling", done, 3, f"loss {done}")
    reporter.note("done")
    text = stream.getvalue()
    assert text.count("\r") == 3
    assert text.count("\n") == 2
    assert "distilling 3/3  loss 3\n" in text


def test_progress_elsewhere_is_the_first_and_the_last_plain_line() -> None:
    stream = io.StringIO()
    reporter = ConsoleReporter(stream)
    for done in range(1, 101):
        reporter.progress("distilling", done, 100)
    assert stream.getvalue().splitlines() == ["distilling 1/100", "distilling 100/100"]


def test_the_time_left_is_that_of_the_stage_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sets of a run are stages of the same name."""
    now = [0.0]
    monkeypatch.setattr("dstill.support.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    reporter = ConsoleReporter(stream)
    for _ in range(2):
        for done in range(1, 101):
            reporter.progress("distilling", done, 100)
            now[0] += 20.0
        now[0] += 5000.0
    left = [line.split("  ")[1] for line in stream.getvalue().splitlines() if line.startswith("distilling 51/")]
    assert left == ["16 min 20 s left"] * 2


@pytest.mark.parametrize("name", ["cpu:x", "gpu", "cuda:first"])
def test_a_device_that_is_none_is_refused_in_a_sentence(call: Call, name: str) -> None:
    code, _, err = call("run", "digits", *FAST, "--device", name)
    assert code == 2
    assert err.startswith("dstill: ") and "device" in err and err.count("\n") == 1


def test_quiet_reports_nothing() -> None:
    stream = io.StringIO()
    reporter = ConsoleReporter(stream, quiet=True)
    reporter.note("a [b] c")
    reporter.progress("distilling", 1, 1)
    assert stream.getvalue() == ""


def test_brackets_in_a_note_are_not_taken_for_markup() -> None:
    stream = io.StringIO()
    ConsoleReporter(stream).note("folder [red]x[/red]")
    assert stream.getvalue() == "folder [red]x[/red]\n"


def test_what_is_cut_off_for_testing_does_not_depend_on_the_seed(call: Call, tmp_path: Path) -> None:
    """Otherwise a set could be tested, under another seed, on images that it was distilled from."""
    shades = np.arange(40, dtype=np.uint8).reshape(2, 20)
    for name, row in zip(("cat", "dog"), shades, strict=True):
        (tmp_path / "pics" / name).mkdir(parents=True)
        for shade in row:
            Image.fromarray(np.full((8, 8), 6 * shade, np.uint8)).save(tmp_path / "pics" / name / f"{shade}.png")
    cut = ["pics", "--test-fraction", "0.2"]
    settings = ["--method", "random", *FAST[:2], *FAST[4:]]
    assert call("distill", *cut, *settings, "--seed", "1", "-o", "r")[0] == 0
    code, _, err = call("evaluate", "r", *cut, "--networks", "1", "--seed", "2")
    assert code == 0 and "the set was not distilled from" not in err
    assert "the set was not distilled from" in call("evaluate", "r", "pics", "--test-fraction", "0.3", "--networks", "1")[2]


def test_the_first_line_says_what_was_read_unless_the_command_is_quiet(call: Call) -> None:
    line = "digits has 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9; 1,437 train, 360 test images of 1x8x8"
    code, _, err = call("distill", "digits", "--method", "random", "--recipe", "smoke", "-o", "out")
    assert code == 0 and err.splitlines()[0] == line and err.count(line) == 1
    for command in (
        ["evaluate", "out", "digits", "--protocol", "tiny.yaml", "--no-random"],
        ["judge", "out", "digits", "--protocol", "tiny.yaml", "--no-whole"],
        ["import", "out", "digits", "-o", "again"],
        ["plan", "digits", "--method", "random", "--recipe", "smoke"],
    ):
        code, _, err = call(*command)
        assert code == 0 and err.splitlines()[0] == line and err.count(line) == 1
    assert call("distill", "digits", "--method", "random", "--recipe", "smoke", "-o", "out2", "--quiet")[2] == ""


def test_a_folder_here_is_read_and_planned_in_place_of_a_data_set_of_its_name(call: Call, tmp_path: Path) -> None:
    for split, name, value in itertools.product(("train", "test"), ("cat", "dog"), (10, 200)):
        path = tmp_path / "cifar10" / split / name / f"{value}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (value, value, value)).save(path)
    code, _, err = call("plan", "cifar10", "--method", "random", "--recipe", "smoke")
    assert code == 0
    assert [line for line in err.splitlines() if not line.startswith("reading ")][:2] == [
        f"cifar10 is read from {tmp_path / 'cifar10'}, not the data set of that name: rename it to load that one",
        "cifar10 has 2 classes: cat, dog; 4 train, 4 test images of 3x16x16",
    ]
