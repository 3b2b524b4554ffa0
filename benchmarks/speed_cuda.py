"""Measures speed on an NVIDIA card: every engine of the unrolled gradient, and expert training.

    python benchmarks/speed_cuda.py -o results/speed-cuda            # some minutes, mostly for torch.compile

As in `speed.py`, whatever is compared is measured in turns within one process, by medians. The reference is plain autograd.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import CASES, DSA, Case, Engines, in_turns, runner
from torch import Tensor, nn

from dstill.data import siamese
from dstill.derivatives.engine import Precision
from dstill.experts.smooth import gradient_penalty, smooth_objective
from dstill.nets.convnet import ConvNet
from dstill.training.fit import Batch, Objective, cross_entropy_objective

# How the student of each engine is made, and the options of `unroll`. The compiled one runs only in the cases of --compiled.
ENGINES: Engines = {
    "graph": ({}, {"gradient": "graph"}),
    "double backward": ({"generic": True}, {}),
    "launched, keep": ({"replayed": False}, {"memory": "keep"}),
    "replayed, keep": ({}, {"memory": "keep"}),
    "replayed, recompute": ({}, {"memory": "recompute"}),
    "replayed, bfloat16-backward": ({"precision": "bfloat16-backward"}, {"memory": "keep"}),
    "replayed, bfloat16": ({"precision": "bfloat16"}, {"memory": "keep"}),
    "tensor operations, replayed": ({"native": False}, {"memory": "keep"}),
    "tensor operations, replayed, compiled": ({"native": False, "compiled": True}, {"memory": "keep"}),
}
WARM = 2  # rounds to warm up: kernels are compiled and recorded in the first two
HERE = {
    "a": CASES["a"],
    "a, DSA": CASES["a, DSA"],
    "b": CASES["b"],
    "b, width 32": dataclasses.replace(CASES["b"], width=32, dsa=True),
}


def gradients(case: Case, compiled: bool, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Milliseconds of an unrolled gradient, speed relative to `graph`, and peak memory."""
    engines = [engine for engine in ENGINES if compiled or "compiled" not in engine]
    work = {engine: runner(engine, case, case.steps, ENGINES, device) for engine in engines}
    seconds, found = in_turns(work, rounds, WARM, torch.cuda.synchronize), dict[str, dict[str, float]]()
    for engine, run in work.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        grown = (torch.cuda.max_memory_allocated() - before) / 2**20
        found[engine] = {"ms": 1e3 * seconds[engine], "speed": seconds["graph"] / seconds[engine], "MiB": grown}
    return found


def experts(width: int, rounds: int, device: str) -> dict[str, float]:
    """Images per second of one training step of 256: torch's autograd and ours, with and without the gradient penalty."""
    torch.manual_seed(0)
    net = ConvNet(3, 10, (32, 32), width=width).to(device)
    raw, labels = torch.randn(256, 3, 32, 32, device=device), torch.randint(10, (256,), device=device)
    generator = torch.Generator().manual_seed(0)
    sgd = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

    def train(objective: Objective) -> None:
        for _ in range(25):
            sgd.zero_grad()
            augmented = siamese.apply(raw, siamese.sample(DSA, len(raw), generator))
            objective(net, Batch(augmented, raw, labels, torch.arange(len(raw)), 0))
            sgd.step()

    def penalised(net: nn.Module, batch: Batch) -> Tensor:
        loss = nn.functional.cross_entropy(net(batch.images), batch.labels) + gradient_penalty(net, batch.raw, "paper")
        loss.backward()
        return loss.detach()

    ways = {"eager": cross_entropy_objective(None), "eager, penalty": penalised}
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    for precision in precisions:
        ways[f"ours, {precision}"] = smooth_objective(net, "off", "off", precision=precision)
        ways[f"ours, penalty, {precision}"] = smooth_objective(net, "off", "paper", precision=precision)
    work = {name: functools.partial(train, way) for name, way in ways.items()}
    seconds = in_turns(work, rounds, WARM, torch.cuda.synchronize)
    return {name: 25 * len(raw) / taken for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for speed.json")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements per time")
    parser.add_argument("--cases", default=";".join(HERE), help="joined by semicolons")
    parser.add_argument("--compiled", default="a", help="cases that are also measured compiled, joined by semicolons")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": {"card": torch.cuda.get_device_name(), "torch": torch.__version__}}
    report["options"] = {key: value for key, value in vars(options).items() if key != "out"}
    compiled = options.compiled.split(";")
    work: dict[tuple[str, str], Callable[[], Any]] = {
        ("experts", str(width)): functools.partial(experts, width, options.rounds, "cuda") for width in (32, 128)
    }
    for name in options.cases.split(";"):
        work["cases", name] = functools.partial(gradients, HERE[name], name in compiled, options.rounds, "cuda")
    for (part, name), measure in work.items():
        report.setdefault(part, {})[name] = found = measure()
        print(part, name, json.dumps(found), flush=True)
        (options.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
