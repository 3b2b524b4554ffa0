"""Measures what averaging K draws buys: matching loss, spread between looks, and accuracy, for each K and rule of step sizes.

    python benchmarks/draws.py benchmarks/draws/mtt-cifar10-ipc1.yaml 'data/cifar10-*.parquet' -o results/draws

The file names the runs. They share their experts, and a run goes on where it was interrupted. A look trains a network on the
set so far and measures it on the validation part of the training images. The accuracy is measured once, at the end, on the test
images.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

import dstill
from dstill.artifacts import files
from dstill.artifacts.run_folder import METRICS_NAME, read_metrics
from dstill.support.devices import processor

_LAST = 2 / 3  # looks and losses count from this share of the run on


class Run(BaseModel):
    """One setting, run with every seed.

    Attributes:
        draws: K.
        scaling: the rule of the step sizes, `distill.draw_scaling`.
        iterations: updates.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    draws: int
    scaling: Literal["none", "root", "linear"]
    iterations: int


class Plan(BaseModel):
    """What is measured.

    Attributes:
        method, recipe, ipc, changes: as for `dstill run`; common to all runs.
        looks: looks of a run.
        networks: networks of the final accuracy.
        seeds: seeds of images and draws; the experts are those of seed 0.
        runs: the settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str
    recipe: str
    ipc: int
    changes: tuple[str, ...]
    looks: int
    networks: int
    seeds: tuple[int, ...]
    runs: tuple[Run, ...]


def measured(real: dstill.RealSet, plan: Plan, run: Run, seed: int, folder: Path, workers: int) -> dict[str, Any]:
    """One run with one seed, or the record of one that is finished."""
    record = folder / "cell.json"
    if record.exists():
        return dict(json.loads(record.read_text(encoding="utf-8")))
    machine = dstill.Machine(device="cpu", threads=1, cache=folder.parent / "cache", workers=workers)
    settings = {"draws": run.draws, "draw_scaling": run.scaling, "iterations": run.iterations}
    result = dstill.run(
        real,
        method=plan.method,
        recipe=plan.recipe,
        ipc=plan.ipc,
        changes=list(plan.changes),
        distill=settings,
        seed=dstill.Seeds(seed, 0),
        out=folder,
        evaluation=dstill.Evaluation(networks=plan.networks, random=False),
        recording=dstill.Recording(validate_every=max(1, run.iterations // plan.looks)),
        machine=machine,
        progress=True,
    )
    rows = read_metrics(folder / "set-0" / METRICS_NAME)
    late = [row for row in rows if row["iteration"] + 1 > _LAST * run.iterations]
    looks = [row["validation_accuracy"] for row in late if "validation_accuracy" in row]
    found = {
        **run.model_dump(),
        "seed": seed,
        "loss": statistics.fmean(row["loss"] for row in late),
        "looks": looks,
        "alpha": rows[-1].get("alpha"),
        "skipped": rows[-1].get("skipped"),
        "distilling_seconds": sum(row["seconds"] for row in rows),
        "accuracy": result.accuracy.model_dump(include={"mean", "std", "n"}),
    }
    files.write_text(record, json.dumps(found) + "\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file of what is measured")
    parser.add_argument("source", help="the real data")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("-w", "--work", type=Path, default=Path("runs/draws"), help="folder of the runs")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the draws")
    options = parser.parse_args()
    plan = Plan.model_validate(yaml.safe_load(options.plan.read_text(encoding="utf-8")))
    name, real, cells = options.plan.stem, dstill.load_real(options.source), list[dict[str, Any]]()
    for seed in plan.seeds:
        for run in plan.runs:
            folder = options.work / name / f"k{run.draws}-{run.scaling}-{run.iterations}-seed{seed}"
            cells.append(measured(real, plan, run, seed, folder, options.workers))
            report = {**plan.model_dump(exclude={"runs"}), "data": real.name, "processor": processor(), "cells": cells}
            files.write_text(options.out / f"{name}.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
