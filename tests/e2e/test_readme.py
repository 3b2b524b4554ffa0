"""Every command of the README is valid, with names and settings that exist."""

from __future__ import annotations

import re
import shlex
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest

from dstill.cli import files, judge, make  # noqa: F401 - they register their commands
from dstill.cli.app import app
from dstill.config import recipes
from dstill.data.catalog import DATASETS, Shape
from dstill.evaluation.protocols import load_protocol
from dstill.nets.networks import network_class

README = Path(__file__).parents[2] / "README.md"
OPERATORS = {"|", "||", "&&", ";", ">", ">>", "<", "&"}


def commands(text: str) -> list[list[str]]:
    """Tokens after `dstill` of each command in the ```sh blocks, without comments, pipes and continuation marks."""
    found: list[list[str]] = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            tokens = list(lexer)
            while tokens:
                end = next((i for i, token in enumerate(tokens) if token in OPERATORS), len(tokens))
                if tokens[:1] == ["dstill"]:
                    found.append(tokens[1:end])
                tokens = tokens[end + 1 :]
    return found


FOUND = commands(README.read_text(encoding="utf-8"))


def test_the_readme_shows_commands() -> None:
    assert len(FOUND) >= 5
    assert {"run", "distill", "evaluate"} <= {tokens[0] for tokens in FOUND}


def test_commands_are_found_whatever_stands_around_them() -> None:
    shell = "$ dstill run 'a b' \\\n  --ipc 1   # why\nmake demo && dstill ls recipes | head\n"
    text = f"```sh\n{shell}```\n```python\ndstill run x\n```\n"
    assert commands(text) == [["run", "a b", "--ipc", "1"], ["ls", "recipes"]]


def parsed(tokens: list[str]) -> dict[str, Any]:
    _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    groups = {name: vars(value) for name, value in bound.arguments.items() if is_dataclass(value)}
    return {**bound.arguments, **groups.get("choice", {}), **groups.get("evaluation", {})}


@pytest.mark.parametrize("tokens", FOUND, ids=" ".join)
def test_a_command_of_the_readme_parses(tokens: list[str]) -> None:
    parsed(tokens)


@pytest.mark.parametrize("tokens", FOUND, ids=" ".join)
def test_a_command_of_the_readme_names_what_exists(tokens: list[str]) -> None:
    given = parsed(tokens)
    if given.get("protocol"):
        load_protocol(given["protocol"])
    for name in [*(given.get("nets") or ()), given.get("net") or ""]:
        if name and ":" not in name:
            network_class(name)
    source, recipe = str(given.get("source", "")), given.get("recipe")
    if "/" not in source and source:
        assert source in DATASETS
    if tokens[0] in {"run", "train-experts", "distill", "tune"} and not str(recipe).endswith(".yaml"):
        shape = Shape(3, (32, 32), 10)
        changes = given.get("changes", ())
        recipes.resolve(recipe, source, shape, method=given.get("method"), ipc=given.get("ipc"), changes=changes)


def test_a_setting_that_does_not_exist_would_be_noticed() -> None:
    tokens = ["run", "digits", "--set", "distill.iteration=3"]
    with pytest.raises(ValueError, match="did you mean iterations"):
        test_a_command_of_the_readme_names_what_exists(tokens)
