"""Measures how much faster several processes take the draws of an iteration than one process does.

    python benchmarks/processes.py -o results/processes

Real processes share real iterations on images of CIFAR-10's shape, ten stored ones. One run takes turns: the draws in one
process of one thread, in one process with the threads of all cores, and in one process per core. Each figure is a median. The
images are random, on which no time depends.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from dstill.artifacts import files
from dstill.config import recipes
from dstill.config.settings import Recipe
from dstill.data import preprocess as preprocessing
from dstill.data.catalog import Shape
from dstill.data.real import RealSet, Split
from dstill.distillation.loop import follow, make_method
from dstill.methods.base import Method, Problem, State
from dstill.support import seeding
from dstill.support.crew import ALONE, Crew, Parcel
from dstill.support.devices import processor
from dstill.support.mates import together
from dstill.support.workers import cores

_SHORT = ["distill.total_steps=40", "distill.window=20", "distill.batch_real=1024"]
# With a window that begins at random, draws differ in length, and each iteration waits for its longest.
_CASES = {
    "32, equal draws": ("rat-bptt", ["net.width=32", *_SHORT, "distill.window_start=last"]),
    "32": ("rat-bptt", ["net.width=32", *_SHORT]),
    "128, equal draws": ("rat-bptt", [*_SHORT, "distill.window_start=last"]),
}


def problem_of(method: str, changes: list[str], draws: int) -> Problem:
    """A problem on random images: 5,000 of ten classes."""
    images = torch.randint(256, (5000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    part = Split(images, torch.arange(5000) % 10)
    real = RealSet("random", part, Split(images[:100], part.labels[:100]), tuple(str(c) for c in range(10)))
    changes = [*changes, f"distill.draws={draws}", "preprocess=standardise"]
    recipe: Recipe = recipes.resolve(None, "cifar10", Shape(3, (32, 32), 10), method=method, ipc=1, changes=changes)[0]
    preprocess = preprocessing.fit("standardise", images)
    return Problem(real, preprocess, recipe, None, torch.device("cpu"), 0)


def seconds(method: Method, state: State, crew: Crew, threads: int, iteration: int) -> float:
    """Of one iteration, whose draws are shared by a crew of processes with so many threads each."""
    torch.set_num_threads(threads)
    method.crew = crew
    started = time.perf_counter()
    crew.call()
    method.step(state, iteration, seeding.generator(0, "step", iteration))
    return time.perf_counter() - started


def compared(name: str, several: int, rounds: int) -> dict[str, Any]:
    """Draws a second of one process, of one process with all threads, and of several processes."""
    method, changes = _CASES[name]
    problem = problem_of(method, changes, several)
    times: dict[str, list[float]] = {"one process": [], "one process, all threads": [], "several processes": []}
    with together(follow, problem, several, several) as crew:
        own = make_method(problem, crew)
        state = own.initialise(seeding.generator(0, "initialise"))
        crew.gathered({0: Parcel({"iteration": 0}, state)})
        for iteration in range(rounds + 1):
            turn = {
                "several processes": seconds(own, state, crew, 1, iteration),
                "one process": seconds(own, dict(state), ALONE, 1, iteration),
                "one process, all threads": seconds(own, dict(state), ALONE, several, iteration),
            }
            for kind, taken in turn.items() if iteration else ():  # the first one warms up
                times[kind].append(taken)
    medians = {kind: statistics.median(taken) for kind, taken in times.items()}
    draws = {kind: several / median for kind, median in medians.items()}
    return {
        "case": name,
        "processes": several,
        "rounds": rounds,
        "draws_per_second": draws,
        "times_one_process": {kind: pace / draws["one process"] for kind, pace in draws.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--processes", type=int, default=cores(), help="how many share the draws")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each kind")
    parser.add_argument("--cases", nargs="+", default=list(_CASES), choices=_CASES)
    options = parser.parse_args()
    found = []
    for name in options.cases:
        found.append(compared(name, options.processes, options.rounds))
        print(json.dumps(found[-1]), flush=True)
        report = {"processor": processor(), "cores": cores(), "cases": found}
        files.write_text(options.out / "processes.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
