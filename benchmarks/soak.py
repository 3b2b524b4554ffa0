"""Tests for leaks: memory and open files over the iterations of a long run, and memory over the number of experts.

python benchmarks/soak.py -o results/reliability     # ten minutes on one core
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch

from dstill.artifacts.run_folder import RunFolder
from dstill.data.real import RealSet, load_real
from dstill.derivatives import build as native
from dstill.distillation.loop import make_method, run_method
from dstill.experts.trajectory import Trajectories, save_expert
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Choice, Machine
from dstill.methods.base import Metrics, Problem
from dstill.nets import networks as nets
from dstill.support.devices import resident_memory

WIDTH, EPOCHS, EVERY = 32, 20, 50
MIB = 2**20


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def job(real: RealSet, iterations: int, cache: Path) -> Job:
    """AST with all its parts except the initialisation, which needs trained experts."""
    changes = [f"net.width={WIDTH}", f"distill.iterations={iterations}", "distill.student_steps=6", "distill.memory=keep"]
    changes += ["distill.initialisation=random", f"distill.max_start_epoch={EPOCHS - 2}"]
    place = Workplace.of(Machine(device="cpu", cache=cache, threads=1), progress=False)
    return Job.resolve(real, Choice("ast", 1, changes=changes), 0, place)


def problem(real: RealSet, iterations: int, experts: Path) -> Problem:
    """The problem with synthetic trajectories, whose content does not affect memory."""
    one = job(real, iterations, experts.parent / "cache")
    return Problem(real, one.preprocess(), one.recipe, Trajectories(experts), torch.device("cpu"), 0)


def write_experts(folder: Path, count: int, numel: int) -> Path:
    """Writes experts that are random walks from a small initialisation, one file each."""
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        walk = 0.02 * torch.randn(EPOCHS + 1, numel, generator=generator).cumsum(0)
        record = {"accuracy": [0.0] * EPOCHS, "step_lengths": [1.0] * EPOCHS}
        save_expert(folder, index, walk, {"index": index, "record": record})
    return folder


def soak(real: RealSet, iterations: int, experts: Path, out: Path) -> dict[str, list[float]]:
    """Resident MiB and open files at regular intervals of a run with checkpoints and metrics."""
    seen: dict[str, list[float]] = {"iteration": [], "resident_mib": [], "open_files": []}

    def watch(iteration: int, _total: int, _metrics: Metrics) -> None:
        if iteration % EVERY == 0:
            for key, value in zip(seen, (iteration, (resident_memory() or 0) / MIB, open_files()), strict=True):
                seen[key].append(float(value))

    run_method(problem(real, iterations, experts), RunFolder(out, {}), observer=watch)
    return seen


def slope(seen: dict[str, list[float]], key: str) -> float:
    """Growth per 1,000 iterations, by least squares over the last three quarters of the run."""
    begin = len(seen["iteration"]) // 4
    return float(np.polyfit(seen["iteration"][begin:], seen[key][begin:], 1)[0] * 1000)


def growth_with_experts(real: RealSet, experts: Path) -> float:
    """Growth of resident memory in MiB over 60 iterations, each of which reads one of the experts."""
    one = problem(real, 60, experts)
    method = make_method(one)
    state = method.initialise(torch.Generator().manual_seed(0))
    before = 0
    for iteration in range(60):
        method.step(state, iteration, torch.Generator().manual_seed(iteration))
        before = before or resident_memory() or 0
    return ((resident_memory() or 0) - before) / MIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=2500)
    arguments = parser.parse_args()
    real = load_real("digits")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        few = folder / "few"
        net = nets.build(job(real, 1, folder).recipe.net, real.channels, real.classes, real.size, torch.Generator())
        numel = sum(parameter.numel() for parameter in net.parameters())
        write_experts(few, 5, numel)
        many = write_experts(folder / "many", 200, numel)
        grown = {"5": growth_with_experts(real, few), "200": growth_with_experts(real, many)}
        size = sum(path.stat().st_size for path in many.iterdir()) / MIB
        seen = soak(real, arguments.iterations, few, folder / "out")
    found = {
        "what": "AST on the digits, ConvNet of width 32, 6 student steps; a checkpoint every 25 iterations",
        "iterations": arguments.iterations,
        "resident_mib_by_1000_iterations": slope(seen, "resident_mib"),
        "open_files_by_1000_iterations": slope(seen, "open_files"),
        "grown_mib_over_60_iterations_by_number_of_experts": grown,
        "mib_of_200_experts_on_disk": size,
        "engine": native.describe(torch.device("cpu")),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        **seen,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print({key: value for key, value in found.items() if not isinstance(value, list)})


if __name__ == "__main__":
    main()
