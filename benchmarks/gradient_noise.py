"""Measures how much of a gradient of back-propagation through training is noise, at the images of a distilled set.

    python benchmarks/gradient_noise.py runs/…/set-0 cifar10 -o results/gradient-noise/width-32.json

For each setting, some trainings are drawn, each with a fresh network, window and real batch. If g is the gradient of one,
then g = s + noise with the same s for all. The mean product of two different ones estimates |s|², and |s|² / E|g|² is the
cosine that one can expect between two of them. Gradients longer than the median are cut to it first, as `distill.clip` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import dstill
from dstill.config.recipes import changed
from dstill.methods.base import Problem
from dstill.methods.bptt import Bptt
from dstill.support import seeding
from dstill.support.devices import processor

SETTINGS: dict[str, list[str]] = {
    "as distilled": [],
    "batch_real 256": ["distill.batch_real=256"],
    "batch_real 4096": ["distill.batch_real=4096"],
    "W = 10": ["distill.window=10"],
    "T = W = 20": ["distill.total_steps=20", "distill.window=20"],
    "T = 100, W = 40": ["distill.total_steps=100", "distill.window=40"],
}


def noise(problem: Problem, draws: int) -> dict[str, float]:
    """Cosine between two gradients, the norm of one, how far the longest exceeds it, and the seconds that one takes."""
    method = Bptt()
    method.start(problem)
    state = method.initialise(seeding.generator(0, "initialise"))
    gradients, seconds = [], []
    for k in range(draws):
        started = time.perf_counter()
        gradients.append(next(method.draw(state, 0, 0, seeding.generator(k, "noise"))).gradients["images"].flatten().double())
        seconds.append(time.perf_counter() - started)
    g = torch.stack(gradients)
    norms = g.norm(dim=1)
    g = g * (norms.median() / norms).clamp_max(1).unsqueeze(1)
    products = g @ g.t()
    total = float(products.diag().mean())
    signal = (float(products.sum()) - total * draws) / (draws * (draws - 1))
    return {
        "cosine": signal / total,
        "median_norm": float(norms.median()),
        "longest": float(norms.max() / norms.median()),
        "seconds": statistics.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", help="a set of bptt or rat-bptt")
    parser.add_argument("source", help="the real data")
    parser.add_argument("-o", "--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--draws", type=int, default=40, help="trainings per setting")
    options = parser.parse_args()
    torch.set_num_threads(1)
    distilled, real = dstill.DistilledSet.load(options.set), dstill.load_real(options.source)
    assert distilled.recipe is not None
    report: dict[str, Any] = {"draws": options.draws, "processor": processor(), "settings": {}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name, changes in SETTINGS.items():
        recipe = changed(distilled.recipe, changes, name)
        problem = Problem(real, distilled.preprocess, recipe, None, torch.device("cpu"), 0)
        report["settings"][name] = noise(replace(problem, initial=distilled), options.draws)
        print(name, json.dumps(report["settings"][name]), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
