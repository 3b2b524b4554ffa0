"""Every option of every command reaches the argument of the public function that it is for."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dstill.cli import files, judge, make  # noqa: F401 - they register their commands
from dstill.cli.app import app
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.jobs.options import Evaluation, Executor, Machine, Recording, Seeds
from dstill.support.console import ConsoleReporter

CHOICE = "--method mtt --ipc 3 --recipe smoke --net alexnet --set a=1 b=2"
CHOSEN = {"method": "mtt", "ipc": 3, "recipe": "smoke", "net": "alexnet", "changes": ("a=1", "b=2")}
PLACE = "--device cpu --cache c --threads 3 --workers 2 --deterministic --streams 4 --seed 5 --quiet"
MACHINE = {"machine": Machine("cpu", "c", 3, 2, True, 4), "seed": 5}
JUDGED = "--nets vgg11,alexnet --networks 4 --no-random --whole --also ast,mtt"
EVALUATION = Evaluation(("vgg11", "alexnet"), 4, False, True, ("ast", "mtt"))
RECORDED = "--validate-every 6 --checkpoint-every 7 --picture-every 8 --keep-every 9 --log wandb,tensorboard"
RECORDING = Recording(6, 7, 8, ("wandb", "tensorboard"), 9)

COMMANDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "run": (
        "api.run",
        f"digits --minutes 2.5 {CHOICE} {PLACE} {JUDGED} {RECORDED} -o o --init i --sets 9 --expert-seed 4",
        CHOSEN
        | MACHINE
        | {"out": Path("o"), "init": Path("i"), "sets": 9, "evaluation": EVALUATION}
        | {"recording": RECORDING, "seed": Seeds(5, 4)},
    ),
    "train-experts": ("api.run", f"digits {CHOICE} {PLACE} --only 1,2", CHOSEN | MACHINE | {"only": [1, 2]}),
    "distill": (
        "api.run",
        f"digits --minutes 2.5 {CHOICE} {PLACE} {RECORDED} -o o --experts e --init i --expert-seed 0",
        CHOSEN
        | MACHINE
        | {"out": Path("o"), "experts": Path("e"), "init": Path("i"), "recording": RECORDING, "seed": Seeds(5, 0)},
    ),
    "plan": (
        "planning.plan",
        f"digits {CHOICE} {PLACE} {JUDGED} {RECORDED} --sets 9",
        CHOSEN | MACHINE | {"sets": 9, "evaluation": EVALUATION, "recording": RECORDING},
    ),
    "judge": (
        "api.judge",
        f"d digits {PLACE} --nets vgg11,alexnet --augmentations flip,none --protocol p --networks 4 --no-whole -o o",
        MACHINE
        | {"nets": ["vgg11", "alexnet"], "augmentations": ["flip", "none"], "protocol": "p", "networks": 4}
        | {"whole": False, "out": Path("o")},
    ),
    "leaderboard": (
        "api.leaderboard",
        f"d digits {PLACE} --net vgg11 --protocol p --networks 4 --label-weight 0.25 --augmentation-weight 0.75 -o o",
        MACHINE
        | {"net": "vgg11", "protocol": "p", "networks": 4, "label_weight": 0.25, "augmentation_weight": 0.75, "out": Path("o")},
    ),
    "compare": (
        "api.compare",
        f"digits {PLACE} --methods dm,mtt --ipc 1,10 --recipe smoke --set a=1 -o o --sets 2 --networks 4 --protocol p "
        "--no-whole --checkpoint-every 7 --minutes 2.5 --executor slurm --executor-option timeout_min=9 slurm_partition=gpu",
        MACHINE
        | {"methods": ["dm", "mtt"], "ipc": [1, 10], "recipe": "smoke", "changes": ("a=1",), "out": Path("o"), "sets": 2}
        | {"networks": 4, "protocol": "p", "whole": False, "checkpoint_every": 7}
        | {"executor": Executor("slurm", {"timeout_min": 9, "slurm_partition": "gpu"})},
    ),
    "tune": ("api.tune", f"digits {CHOICE} {PLACE} --budget 2.5 -o o", CHOSEN | MACHINE | {"budget": 2.5, "out": Path("o")}),
    "reproduce": (
        "reproductions.run",
        f"table8 {PLACE} --scale cpu --source a=b --only base,all --cases c,d --sets 2 -o o --runs r "
        "--checkpoint-every 7 --executor local",
        MACHINE
        | {"scale": "cpu", "sources": {"a": "b"}, "only": ["base", "all"], "cases": ["c", "d"], "sets": 2}
        | {"out": Path("o"), "runs": Path("r"), "checkpoint_every": 7, "executor": Executor("local", {})},
    ),
}


class _Called(Exception):
    def __init__(self, *positional: Any, **named: Any) -> None:
        self.positional, self.named = positional, named


def called(monkeypatch: pytest.MonkeyPatch, module: str, command: str, text: str) -> _Called:
    """How a command calls the public function of its name."""

    def catch(*positional: Any, **named: Any) -> None:
        raise _Called(*positional, **named)

    monkeypatch.setattr(importlib.import_module(f"dstill.{module}"), command.replace("-", "_"), catch)
    with pytest.raises(_Called) as caught:
        app([command, *shlex.split(text)], exit_on_error=False, print_error=False)
    return caught.value


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_reaches_its_argument(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module, text, expected = COMMANDS[command]
    call = called(monkeypatch, module, command, text)
    progress = call.named.pop("progress")
    assert isinstance(progress, ConsoleReporter) and progress.console.quiet
    budget = call.named.pop("minutes", None)
    assert (budget and budget.minutes) == (2.5 if "--minutes" in text else None)
    assert call.named == expected
    source = call.positional[-1]
    assert source == "table8" or (isinstance(source, RealSet) and source.name == "digits")


def test_evaluate_takes_the_set_as_its_options_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dstill.artifacts import set_file

    asked: list[Any] = []
    one = SimpleNamespace(
        with_hard_labels=lambda: asked.append("hard") or one, with_augmentation=lambda text: asked.append(text) or one
    )
    monkeypatch.setattr(set_file, "read", lambda path: one)
    text = f"d digits {PLACE} {JUDGED} --protocol p --hard --augmentation flip -o o"
    call = called(monkeypatch, "api.evaluate", "evaluate", text)
    call.named.pop("progress")
    assert call.positional[0] is one and asked == ["hard", "flip"]
    judged = {"nets": ("vgg11", "alexnet"), "networks": 4, "random": False, "whole": True, "also": ("ast", "mtt")}
    assert call.named == MACHINE | judged | {"protocol": "p", "out": Path("o")}


def test_a_command_takes_all_cores_and_a_seed_for_everything_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    call = called(monkeypatch, "api.run", "run", "digits")
    assert call.named["machine"] == Machine(workers="auto")
    assert (call.named["seed"], call.named["out"], call.named["sets"]) == (0, None, 1)
    assert (call.named["evaluation"], call.named["recording"]) == (Evaluation(), Recording())


@pytest.mark.parametrize("command", ["run", "distill"])
def test_a_command_knows_how_it_has_read_the_data(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "digits --image-size 8 --fit resize --train-fraction 0.5 --classes 3,1"
    real = called(monkeypatch, "api.run", command, text).positional[0]
    read = {"source": "digits", "image_size": 8, "fit": "resize", "train_fraction": 0.5, "classes": ["3", "1"]}
    assert real.read_as == read


def test_how_the_data_are_read_is_asked_of_load_real(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "digits --image-size 16 --fit resize --train-fraction 0.5 --classes 3,1"
    real = called(monkeypatch, "api.run", "train-experts", text).positional[0]
    assert (real.size, real.class_names) == ((16, 16), ("3", "1"))
    whole = called(monkeypatch, "api.run", "train-experts", "digits --classes 3,1").positional[0]
    assert len(real.train) == pytest.approx(len(whole.train) / 2, abs=2)


def test_every_option_of_the_data_reaches_load_real(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("dstill.data.real.load_real", lambda source, **options: asked.update(source=source, **options))
    read = "--image-size 16 --fit pad --train-fraction 0.5 --classes a,b --test-fraction 0.2 --test-split val"
    text = f"x {read} --image-column img --label-column breed --skip-damaged --quiet"
    called(monkeypatch, "api.run", "train-experts", text)
    progress = asked.pop("progress")
    assert isinstance(progress, ConsoleReporter) and progress.console.quiet
    sizes = {"image_size": 16, "fit": "pad", "train_fraction": 0.5, "classes": ["a", "b"], "test_fraction": 0.2}
    columns = {"test_split": "val", "image_column": "img", "label_column": "breed", "skip_damaged": True}
    assert asked == {"source": "x"} | sizes | columns


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--executor-option timeout_min=9", "--executor-option needs --executor slurm or local"),
        ("--executor local --executor-option 9", "--executor-option takes NAME=VALUE, got '9'"),
    ],
)
def test_options_of_an_executor_need_one_and_have_names(options: str, why: str) -> None:
    with pytest.raises(DstillError, match=why):
        app(["compare", "digits", *shlex.split(options)], exit_on_error=False, print_error=False)


def test_rows_run_in_the_command_itself_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, "api.compare", "compare", "digits").named["executor"] is None
