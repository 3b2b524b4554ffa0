"""Measures what it saves on an NVIDIA card to take the draws of an iteration side by side (`--streams`).

    python benchmarks/draws_cuda.py                      # some minutes
    python benchmarks/draws_cuda.py --draws 2,4 -o results/draws-cuda

Case a of `speed.py` with DSA: ConvNet of width 128, ten images, N = 50. A draw is one unrolled gradient. K draws are taken one
after another and side by side, in turns within one process, and compared by medians. One line of JSON for each K.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import CASES, Case, in_turns, problem
from torch import Tensor

from dstill.unrolling.student import Student
from dstill.unrolling.unroll import unroll

WARM = 3  # rounds to warm up: kernels are compiled and recorded in the first ones


def ways(case: Case, draws: int, device: str) -> dict[str, Callable[[], list[Tensor]]]:
    """Functions that compute the gradients of some draws; each way has a student, and so recordings, of its own."""
    net, _ = problem(case, 1, device=device)
    arguments = [problem(case, case.steps, seed, device=device)[1] for seed in range(draws)]

    def works(student: Student) -> list[Callable[[], Tensor]]:
        def gradient(given: tuple[Any, ...]) -> Tensor:
            return unroll(student, *given, memory="keep").grads.images

        return [functools.partial(gradient, given) for given in arguments]

    one, several = works(Student(net)), Student(net)
    return {
        "one after another": lambda: [work() for work in one],
        "side by side": lambda: several.side_by_side(works(several)),
    }


def measured(case: Case, draws: int, rounds: int, device: str, wait: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds of a draw, peak memory, and the difference between the two ways relative to the gradient."""
    work = ways(case, draws, device)
    seconds = in_turns(work, rounds, WARM, wait)
    plain, beside = (torch.stack(run()) for run in work.values())
    del work
    return {
        "draws": draws,
        "ms": {name: 1e3 * taken / draws for name, taken in seconds.items()},
        "speed": seconds["one after another"] / seconds["side by side"],
        "difference": float((plain - beside).norm() / plain.norm()),
        "peak_MiB": {name: peak(lambda name=name: ways(case, draws, device)[name]) / 2**20 for name in seconds},
    }


def peak(make: Callable[[], Callable[[], Any]]) -> int:
    """By how many bytes the memory of the card grows, with what recordings keep."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run = make()
    for _ in range(WARM):
        run()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, help="folder for draws.jsonl")
    parser.add_argument("--rounds", type=int, default=7, help="number of measurements per time")
    parser.add_argument("--draws", default="1,2,4,8,16", help="numbers of draws, joined by commas")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("draws side by side are for NVIDIA cards, and this machine has none: nothing is measured")
        return
    lines = [{"card": torch.cuda.get_device_name(), "torch": torch.__version__, "rounds": options.rounds}]
    print(json.dumps(lines[0]), flush=True)
    for draws in map(int, options.draws.split(",")):
        lines.append(measured(CASES["a, DSA"], draws, options.rounds, "cuda", torch.cuda.synchronize))
        print(json.dumps(lines[-1]), flush=True)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (options.out / "draws.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
