"""Measures what `--minutes` gives: for each data set, IPC and budget the run that chooses by itself, beside named methods.

    python benchmarks/budget.py benchmarks/budget/tiny-imagenet20.yaml 'data/tiny_imagenet20-*.parquet' -o results/budget

The file names IPCs, minutes and methods. Every cell is a run of its own, with one thread, and all its time counts, so pin it to
a core (`taskset -c 1`). The same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

import dstill
from dstill.api.budgeted import NAME
from dstill.artifacts import files
from dstill.reporting import figures
from dstill.support.devices import processor

BUDGET = "budget"  # the run that chooses its method


class Plan(BaseModel):
    """What is measured.

    Attributes:
        ipc: images per class.
        minutes: budgets.
        methods: named methods; `budget` for the run that names none.
        changes: changes to the recipes of all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ipc: tuple[int, ...]
    minutes: tuple[float, ...]
    methods: tuple[str, ...]
    changes: tuple[str, ...] = ()


def cell(real: dstill.RealSet, method: str, ipc: int, minutes: float, plan: Plan, folder: Path, cache: Path) -> dict[str, Any]:
    """One run, or the record of one that is finished."""
    record = folder / "cell.json"
    if record.exists():
        return dict(json.loads(record.read_text(encoding="utf-8")))
    result = dstill.run(
        real,
        method=None if method == BUDGET else method,
        ipc=ipc,
        minutes=minutes,
        changes=list(plan.changes),
        out=folder,
        machine=dstill.Machine(device="cpu", threads=1, cache=cache),
        progress=True,
    )
    offer = json.loads((folder / NAME).read_text(encoding="utf-8"))["offer"]
    recipe = offer["recipe"]
    found = {
        "method": method,
        "ipc": ipc,
        "minutes": minutes,
        "taken": result.seconds / 60,
        "handed_out": result.method,
        "width": recipe["net"]["width"],
        "iterations": recipe["distill"]["iterations"],
        "protocol": result.protocol.name,
        "accuracy": result.accuracy.model_dump(include={"mean", "std", "n"}),
    }
    files.write_text(record, json.dumps(found) + "\n")
    return found


def drawn(cells: Sequence[dict[str, Any]], title: str) -> Figure:
    """Accuracy over minutes, a line for each method; one picture for each IPC."""
    ipcs = sorted({one["ipc"] for one in cells})
    figure = Figure(figsize=(4.6 * len(ipcs), 3.8), layout="constrained")
    methods = list(dict.fromkeys(one["method"] for one in cells))
    colours = dict(zip(methods, figures.COLOURS, strict=False))
    for axes, ipc in zip(figure.subplots(1, len(ipcs), squeeze=False)[0], ipcs, strict=True):
        for method in methods:
            own = [one for one in cells if (one["ipc"], one["method"]) == (ipc, method)]
            scores = [one["accuracy"] for one in own]
            style = {"color": colours[method], "marker": "o", "markersize": 4, "capsize": 2}
            style |= {"linewidth": 2.4 if method == BUDGET else 1.0, "label": method if ipc == ipcs[0] else None}
            means, spreads = [100 * one["mean"] for one in scores], [100 * one["std"] for one in scores]
            axes.errorbar([one["taken"] for one in own], means, spreads, **style)
        axes.set(xlabel="minutes of one core, evaluation included", ylabel="test accuracy %", title=f"{title}, IPC {ipc}")
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=7, ncols=6)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file of what is measured")
    parser.add_argument("source", help="the real data")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("-w", "--work", type=Path, default=Path("runs/budget"), help="folder of the runs")
    options = parser.parse_args()
    plan = Plan.model_validate(yaml.safe_load(options.plan.read_text(encoding="utf-8")))
    name, real, cells = options.plan.stem, dstill.load_real(options.source), list[dict[str, Any]]()
    for minutes, ipc, method in itertools.product(plan.minutes, plan.ipc, plan.methods):
        folder = options.work / name / f"{method}-ipc{ipc}-{minutes:g}min"
        # Each cell has a cache of its own: what another cell has trained must not be free.
        try:
            cells.append(cell(real, method, ipc, minutes, plan, folder, folder / "cache"))
        except dstill.DstillError as error:
            print(f"{method}, IPC {ipc}, {minutes:g} min: {error}", flush=True)
            continue
        report = {"data": real.name, "changes": plan.changes, "processor": processor(), "cells": cells}
        files.write_text(options.out / f"{name}.json", json.dumps(report, indent=1) + "\n")
        figures.save(drawn(cells, real.name), options.out / f"{name}.png")


if __name__ == "__main__":
    main()
