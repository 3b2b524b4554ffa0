"""Measures accuracy over core-minutes: what each method reaches in how much time, the training of its experts counted.

    python benchmarks/frontier.py benchmarks/frontier/cifar10-ipc1-width-32.yaml 'data/cifar10-*.parquet' -o results/frontier

The file names the entries: settings as for `dstill run`, and the minutes at which the set so far is measured beside the last
one. All entries take turns on one core, the one that has worked least first, so that a busy moment of the machine hits all of
them. Minutes are processor time of this single-threaded process; measuring a set does not count. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from dstill.api.evaluate import measure_sets
from dstill.artifacts import files
from dstill.artifacts.distilled import DistilledSet
from dstill.data.real import load_real
from dstill.distillation.loop import make_method
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Choice, Evaluation, Machine
from dstill.reporting import figures
from dstill.support import seeding
from dstill.support.devices import processor

_SLICE = 15.0  # seconds of work before another entry takes its turn
_MARKERS = {"raw": "o", "labels": "s", "parts": "^", "parts and labels": "D"}


class Entry(BaseModel):
    """One line of the picture.

    Attributes:
        name: what it is called.
        method, recipe, changes: as for `dstill run`.
        minutes: when the set so far is measured; that of the last iteration is measured as well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    method: str
    recipe: str | None = None
    changes: tuple[str, ...] = ()
    minutes: tuple[float, ...] = ()


class Plan(BaseModel):
    """All entries, and what they share.

    Attributes:
        ipc: images per class.
        changes: changes to the recipe of every entry, before its own.
        networks: networks that measure a set.
        also: protocols that the last set of an entry is measured under, beside its own.
        seed: seed of all.
        entries: the lines.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ipc: int
    changes: tuple[str, ...] = ()
    networks: int = 3
    also: tuple[str, ...] = ()
    seed: int = 0
    entries: tuple[Entry, ...]


class Run:
    """An entry at work, a slice at a time.

    Args:
        entry: what is run.
        plan: what it shares with the others.
        job: the resolved command.
        folder: where it keeps its state.
    """

    def __init__(self, entry: Entry, plan: Plan, job: Job, folder: Path) -> None:
        self.entry, self.plan, self.job, self.folder = entry, plan, job, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.paid: dict[str, float] = json.loads(self._read("paid.json", "{}"))  # seconds of each expert, and of the rest
        self.rows: list[dict[str, Any]] = json.loads(self._read("rows.json", "[]"))
        self.state: dict[str, torch.Tensor] = {}
        self.iteration, self.finished, self.loaded = 0, any(row["last"] for row in self.rows), False

    def _read(self, name: str, otherwise: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.exists() else otherwise

    @property
    def seconds(self) -> float:
        return sum(self.paid.values())

    def advance(self) -> None:
        """Trains one expert that is missing, or takes some iterations."""
        experts = self.job.recipe.experts.count if self.job.method.needs_experts and self.job.recipe.experts else 0
        missing = [k for k in range(experts) if f"expert {k}" not in self.paid]
        if missing:
            self._expert(missing[0])
        elif not self.loaded:
            self._charge("start", self._start)
        else:
            self._charge("distilling", self._iterate)
            self._store()
            self._measure_if_due()
        files.write_text(self.folder / "paid.json", json.dumps(self.paid))

    def _charge(self, what: str, work: Callable[[], object]) -> None:
        started = time.process_time()
        work()
        self.paid[what] = self.paid.get(what, 0.0) + time.process_time() - started

    def _expert(self, index: int) -> None:
        """Trains an expert. If another entry had it trained, its price is the same."""
        started, ledger = time.process_time(), self.job.place.cache / "paid.json"
        paid: dict[str, float] = json.loads(ledger.read_text(encoding="utf-8")) if ledger.exists() else {}
        name = f"{self.job.experts(only=[index], describing=False).folder.name} {index}"
        if name not in paid:
            paid[name] = time.process_time() - started
            files.write_text(ledger, json.dumps(paid))
        self.paid[f"expert {index}"] = paid[name]

    def _start(self) -> None:
        job, seed = self.job, self.plan.seed
        experts = job.experts() if job.method.needs_experts else None
        self.method = make_method(job.problem(seed, experts))
        stored = self.folder / "state.pt"
        if stored.exists():
            self.iteration, self.state = torch.load(stored, weights_only=True)
        else:
            self.state = self.method.initialise(seeding.generator(seed, "initialise"))
        self.loaded = True

    def _iterate(self) -> None:
        started = time.process_time()
        while self.iteration < self.method.iterations() and time.process_time() - started < _SLICE:
            self.method.step(self.state, self.iteration, seeding.generator(self.plan.seed, "step", self.iteration))
            self.iteration += 1

    def _store(self) -> None:
        written = self.folder / "state.new"
        torch.save((self.iteration, self.state), written)
        written.replace(self.folder / "state.pt")

    def _measure_if_due(self) -> None:
        last, minutes = self.iteration >= self.method.iterations(), self.seconds / 60
        due = [m for m in self.entry.minutes if m <= minutes]
        if not last and len(due) <= len(self.rows):
            return
        distilled = self.method.result(self.state)
        self.rows.append({**self._row(distilled, last), "minutes": minutes, "iterations": self.iteration, "last": last})
        distilled.save(self.folder / f"{self.iteration:07d}.safetensors")
        files.write_text(self.folder / "rows.json", json.dumps(self.rows))
        self.finished = last

    def _row(self, distilled: DistilledSet, last: bool) -> dict[str, Any]:
        """The accuracy of a set: networks are trained once, and measured once on the test images."""
        evaluation = Evaluation(networks=self.plan.networks, random=False, also=self.plan.also if last else ())
        result = measure_sets([distilled], self.job.real, self.job.place, evaluation, self.plan.seed)
        scores = {result.protocol.name: result.accuracy, **{name.split()[0]: one for name, one in result.also.items()}}
        accuracy = {name: {"mean": one.mean, "std": one.std, "n": one.n} for name, one in scores.items()}
        return {"family": result.family, "protocol": result.protocol.name, "accuracy": accuracy}

    def report(self) -> dict[str, Any]:
        """What is kept of the run."""
        experts = [seconds for name, seconds in self.paid.items() if name.startswith("expert")]
        iterations = self.rows[-1]["iterations"] if self.finished else self.iteration
        return {
            **self.entry.model_dump(mode="json", exclude={"minutes"}),
            "expert_minutes": sum(experts) / 60,
            "experts": len(experts),
            "seconds_per_iteration": self.paid.get("distilling", 0.0) / max(1, iterations),
            "rows": self.rows,
        }


def drawn(reports: Sequence[dict[str, Any]], title: str) -> Figure:
    """Accuracy over minutes, a line for each method; a marker for each family."""
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes, methods = figure.subplots(), sorted({report["method"] for report in reports})
    colours = dict(zip(methods, figures.COLOURS, strict=False))
    for report in reports:
        rows = report["rows"]
        scores = [row["accuracy"][row["protocol"]] for row in rows]
        axes.errorbar(
            [row["minutes"] for row in rows],
            [100 * score["mean"] for score in scores],
            [100 * score["std"] for score in scores],
            color=colours[report["method"]],
            marker=_MARKERS[rows[0]["family"]] if rows else "o",
            markersize=4,
            capsize=2,
            linewidth=1.2,
            label=report["name"],
        )
    axes.set(xscale="log", xlabel="minutes of one core, experts counted", ylabel="test accuracy %", title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=7, ncols=3)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="YAML file of the entries")
    parser.add_argument("source", help="the real data")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("-w", "--work", type=Path, default=Path("runs/frontier"), help="folder of states and experts")
    options = parser.parse_args()
    plan = Plan.model_validate(yaml.safe_load(options.plan.read_text(encoding="utf-8")))
    name, real = options.plan.stem, load_real(options.source)
    place = Workplace.of(Machine(device="cpu", threads=1, cache=options.work / "cache"))
    runs = []
    for entry in plan.entries:
        choice = Choice(entry.method, plan.ipc, entry.recipe, None, [*plan.changes, *entry.changes], None, None)
        job = Job.resolve(real, choice, plan.seed, place)
        runs.append(Run(entry, plan, job, options.work / name / entry.name.replace(" ", "-")))
    while unfinished := [run for run in runs if not run.finished]:
        run = min(unfinished, key=lambda one: one.seconds)
        known = len(run.rows)
        run.advance()
        if len(run.rows) > known:
            print(run.entry.name, json.dumps(run.rows[-1]), flush=True)
            reports = [one.report() for one in runs]
            report = {"data": real.name, **plan.model_dump(mode="json", exclude={"entries"}), "entries": reports}
            files.write_text(options.out / f"{name}.json", json.dumps({**report, "processor": processor()}, indent=1) + "\n")
            figures.save(drawn(reports, f"{real.name}, IPC {plan.ipc}"), options.out / f"{name}.png")


if __name__ == "__main__":
    main()
