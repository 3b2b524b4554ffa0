"""Measures speed, memory and error of every engine of the unrolled gradient, of expert training, and of evaluation.

    python benchmarks/speed.py -o results/speed            # everything; a quarter of an hour on two cores
    python benchmarks/speed.py --only cases,memory -o ...

Whatever is compared is measured in turns within one process, and compared by medians, because machines are shared.
Memory is the growth of a fresh process's peak. The cost of plain autograd is linear in N, so it is timed on a few steps.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dstill.config.recipes import load_recipe
from dstill.data import preprocess, siamese
from dstill.data.real import RealSet, Split
from dstill.derivatives import build as native
from dstill.derivatives.engine import Precision
from dstill.distillation.loop import make_method
from dstill.experts.smooth import gradient_penalty, smooth_objective
from dstill.experts.trajectory import Trajectories, save_expert
from dstill.methods import trajectory_matching
from dstill.methods.base import Problem
from dstill.methods.matching_config import MatchingConfig
from dstill.nets.convnet import ConvNet
from dstill.reporting import figures
from dstill.support.devices import processor
from dstill.training.fit import Batch, predictions
from dstill.unrolling.optimisers import Adam
from dstill.unrolling.student import Student
from dstill.unrolling.types import Step
from dstill.unrolling.unroll import unroll

DSA = "colour_crop_cutout_flip_scale_rotate"


@dataclass(frozen=True)
class Case:
    """`batch` of `images` per step, N = `steps`; ConvNet of `width` on `side` x `side`."""

    images: int
    batch: int
    steps: int
    classes: int = 10
    width: int = 128
    side: int = 32
    dsa: bool = False


CASES = {
    "a": Case(10, 10, 50),
    "b": Case(100, 100, 30),
    "c": Case(1000, 100, 20, classes=100),
    "a, DSA": Case(10, 10, 50, dsa=True),
}
# How the student of each engine is made, and the options of `unroll`.
Engines = dict[str, tuple[dict[str, Any], dict[str, Any]]]
ENGINES: Engines = {
    "graph": ({}, {"gradient": "graph"}),
    "double backward": ({"generic": True}, {}),
    "tensor operations": ({"native": False}, {"memory": "recompute"}),
    "native, keep": ({}, {"memory": "keep"}),
    "native, recompute": ({}, {"memory": "recompute"}),
    "native, bfloat16-backward": ({"precision": "bfloat16-backward"}, {"memory": "keep"}),
    "native, bfloat16": ({"precision": "bfloat16"}, {"memory": "keep"}),
}


def problem(
    case: Case, steps: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[ConvNet, tuple[Any, ...]]:
    """A network and the arguments of `unroll` after the student, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    net = ConvNet(3, case.classes, (case.side, case.side), width=case.width).to(dtype)
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    images = torch.randn(case.images, 3, case.side, case.side, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.arange(case.images) % case.classes
    strategy = DSA if case.dsa else "none"
    draws = [
        Step(torch.randperm(case.images, generator=generator)[: case.batch], siamese.sample(strategy, case.batch, generator))
        for _ in range(steps)
    ]
    target = theta + 0.02 * torch.randn(len(theta), generator=generator, dtype=torch.float64).to(dtype)
    draws = [step._replace(rows=step.rows.to(device)) for step in draws]
    alpha, targets = torch.tensor(0.02, dtype=dtype, device=device), {steps: (target.to(device), 1.0)}
    return net.to(device), (theta.to(device), images.to(device), labels.to(device), draws, alpha, targets)


class Plain(ConvNet):
    """The same network, unknown to the hand-written derivatives."""


def runner(
    engine: str,
    case: Case,
    steps: int,
    engines: Engines = ENGINES,
    device: str = "cpu",
) -> Callable[[], Tensor]:
    """Returns a function that computes one unrolled gradient, by the images."""
    net, arguments = problem(case, steps, device=device)
    if engine == "torchopt":
        return lambda: through_torchopt(net, *arguments)
    made, options = engines[engine]
    made = dict(made)
    if made.pop("generic", False):
        net.__class__ = Plain
    student = Student(net, **made)
    return lambda: unroll(student, *arguments, **options).grads.images


def through_torchopt(
    net: ConvNet, theta: Tensor, images: Tensor, labels: Tensor, steps: list[Step], alpha: Tensor, targets: Any
) -> Tensor:
    """The same gradient with a common differentiable optimiser: torchopt's functional SGD."""
    import torchopt  # type: ignore[import-untyped]

    student, images = Student(net), images.clone().requires_grad_()
    sgd = torchopt.sgd(lr=float(alpha))
    weights = (theta.clone().requires_grad_(),)
    state = sgd.init(weights)
    for rows, params in steps:
        loss = student.loss(weights[0], siamese.apply(images[rows], params), labels[rows])
        gradients = torch.autograd.grad(loss, weights, create_graph=True)
        updates, state = sgd.update(gradients, state, inplace=False)
        weights = torchopt.apply_updates(weights, updates, inplace=False)
    target, weight = targets[len(steps)]
    (gradient,) = torch.autograd.grad(weight * (weights[0] - target).square().sum(), images)
    return gradient


def in_turns(
    work: dict[str, Callable[[], Any]], rounds: int, warm: int = 1, wait: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median seconds of each function, after rounds to warm up; `wait` returns when the device has finished."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(rounds + warm):
        for name, function in work.items():
            wait()
            started = time.perf_counter()
            function()
            wait()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def gemm() -> float:
    """GFLOP/s of a float32 matrix product of side 1024, the best of twenty."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best / 1e9


def arithmetic(case: Case) -> float:
    """Floating-point operations per image and step of an unrolled gradient without recomputation: 8.8 forward passes."""
    net = ConvNet(3, case.classes, (case.side, case.side), width=case.width)
    forward = sum(9 * channels * case.width * height * width for channels, (height, width) in net.geometry)
    return 2 * 8.8 * (forward + net.classifier.weight.numel())


def peers() -> list[str]:
    """Other libraries to compare with; one that is not installed is left out, and a note says so."""
    if importlib.util.find_spec("torchopt") is not None:
        return ["torchopt"]
    print("torchopt is left out: it is not installed", flush=True)
    return []


def cases(rounds: int) -> dict[str, Any]:
    """Milliseconds per image and step of every engine, speed relative to `graph`, and share of a matrix product's rate."""
    found: dict[str, Any] = {}
    rate = gemm()
    for name, case in CASES.items():
        steps = max(2, min(case.steps, 200 // case.batch))
        engines = [*ENGINES, *peers()] if not case.dsa else ["graph", "native, keep", "native, recompute"]
        seconds = in_turns({engine: runner(engine, case, steps) for engine in engines}, rounds)
        found[name] = {
            engine: {
                "ms": 1e3 * s / steps / case.batch,
                "speed": seconds["graph"] / s,
                "of_gemm": arithmetic(case) * steps * case.batch / s / rate / 1e9,
            }
            for engine, s in seconds.items()
        }
        print(name, json.dumps(found[name]), flush=True)
    return {"gemm_gflops": rate, "engines": found}


def _peak(connection: Any, engine: str, case: Case, steps: int) -> None:
    torch.set_num_threads(1)
    if engine != "graph" and engine != "torchopt":
        native.kernels()
    runner(engine, Case(2, 2, 1, case.classes, case.width, case.side), 1)()
    run = runner(engine, case, steps)
    before = _highest()
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    connection.send(((_highest() - before) / 1024, seconds))


def _highest() -> float:
    """The peak of this process's memory in KiB. What `getrusage` calls the peak, a process inherits from its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def peak(engine: str, case: Case, steps: int) -> dict[str, float]:
    """Growth of the peak in MiB, and the seconds, of one gradient in its own process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_peak, args=(there, engine, case, steps))
    process.start()
    mebibytes, seconds = here.recv()
    process.join()
    return {"MiB": mebibytes, "seconds": seconds}


def memory() -> dict[str, Any]:
    """Peak memory at full N. Beyond case a, plain autograd is measured at N / 8, since its memory is linear in N."""
    found: dict[str, Any] = {}
    for name in ("a", "b", "c"):
        case = CASES[name]
        share = 1 if name == "a" else 8
        graph = peak("graph", case, case.steps // share)
        found[name] = {"graph": {"MiB": graph["MiB"] * share, "measured_at_N": case.steps // share}}
        for engine in ("native, keep", "native, recompute"):
            found[name][engine] = peak(engine, case, case.steps)
        print(name, json.dumps(found[name]), flush=True)
    return found


def growth() -> dict[str, Any]:
    """Time and memory of recompute mode as one size grows at a time."""
    axes = {
        "N": [(Case(10, 10, n, width=64), n) for n in (5, 50, 200)],
        "IPC": [(Case(10 * ipc, min(100, 10 * ipc), 5), ipc) for ipc in (1, 10, 50)],
        "width": [(Case(10, 10, 10, width=width), width) for width in (32, 64, 128, 256)],
        "side": [(Case(10, 10, 5, width=64, side=side), side) for side in (32, 64, 128)],
    }
    found: dict[str, Any] = {}
    for axis, points in axes.items():
        found[axis] = {str(at): peak("native, recompute", case, case.steps) for case, at in points}
        print(axis, json.dumps(found[axis]), flush=True)
    return found


def error(draws: int, steps: int) -> dict[str, Any]:
    """Relative error of the images' gradient against plain autograd in float64: the median over draws, case a, N = `steps`."""
    engines = [engine for engine in ENGINES if engine != "double backward"]
    errors: dict[str, list[float]] = {engine: [] for engine in engines}
    for seed in range(draws):
        net, exact = problem(CASES["a"], steps, seed, torch.float64)
        truth = unroll(Student(net), *exact, gradient="graph").grads.images
        net, rounded = problem(CASES["a"], steps, seed)
        for engine in engines:
            made, options = ENGINES[engine]
            found = unroll(Student(net, **made), *rounded, **options).grads.images.double()
            errors[engine].append(float((found - truth).norm() / truth.norm()))
    return {"draws": draws, "N": steps, "median": {name: statistics.median(values) for name, values in errors.items()}}


def experts(rounds: int) -> dict[str, Any]:
    """Images per second of one training step of 256: torch's autograd and ours, with and without the gradient penalty."""
    found: dict[str, Any] = {}
    for width in (32, 128):
        torch.manual_seed(0)
        net = ConvNet(3, 10, (32, 32), width=width)
        raw, labels = torch.randn(256, 3, 32, 32), torch.randint(10, (256,))
        generator = torch.Generator().manual_seed(0)
        sgd = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9)

        def batch(raw: Tensor = raw, labels: Tensor = labels, generator: torch.Generator = generator) -> Batch:
            augmented = siamese.apply(raw, siamese.sample(DSA, len(raw), generator))
            return Batch(augmented, raw, labels, torch.arange(len(raw)), 0)

        def eager(penalty: bool, net: ConvNet = net, sgd: torch.optim.SGD = sgd, batch: Any = batch) -> None:
            sgd.zero_grad()
            b = batch()
            loss = torch.nn.functional.cross_entropy(net(b.images), b.labels)
            (loss + gradient_penalty(net, b.raw, "paper") if penalty else loss).backward()
            sgd.step()

        def ours(
            penalty: bool,
            precision: Precision = "float32",
            net: ConvNet = net,
            sgd: torch.optim.SGD = sgd,
            batch: Any = batch,
        ) -> None:
            smooth_objective(net, "off", "paper" if penalty else "off", precision=precision)(net, batch())
            sgd.step()

        test = torch.randn(1000, 3, 32, 32)
        seconds = in_turns(
            {
                "eager": lambda eager=eager: eager(False),
                "native": lambda ours=ours: ours(False),
                "native, bfloat16": lambda ours=ours: ours(False, "bfloat16"),
                "eager, penalty": lambda eager=eager: eager(True),
                "native, penalty": lambda ours=ours: ours(True),
                "native, penalty, bfloat16": lambda ours=ours: ours(True, "bfloat16"),
                "test pass, eager": lambda net=net, test=test: torch.no_grad()(net)(test),
                "test pass, native": lambda net=net, test=test: predictions(net, test),
            },
            rounds,
        )
        found[str(width)] = {name: (1000 if "test" in name else 256) / s for name, s in seconds.items()}
        print(width, json.dumps(found[str(width)]), flush=True)
    return found


def optimisers(rounds: int) -> dict[str, Any]:
    """Share of an unrolled gradient of case a that Adam's steps and pullbacks take, in native kernels and without them."""
    found: dict[str, Any] = {}
    for width in (32, 128):
        case, adam, steps = replace(CASES["a"], width=width), Adam(), 10
        net, arguments = problem(case, steps)
        student, theta, alpha = Student(net), arguments[0], arguments[4]
        zero = adam.start(theta)

        @torch.no_grad()
        def elementwise(adam: Adam = adam, theta: Tensor = theta, alpha: Tensor = alpha, zero: Any = zero) -> None:
            for n in range(1, 11):
                kept = adam.step(theta, zero, theta, alpha, n).kept
                adam.pullback(theta, kept, alpha, n, theta, zero)

        def plain(elementwise: Callable[[], None] = elementwise) -> None:
            with patch("dstill.unrolling.optimisers.kernels", lambda: None):
                elementwise()

        sweep = functools.partial(unroll, student, *arguments, optimiser=adam)
        seconds = in_turns({"sweep": sweep, "native": elementwise, "tensor operations": plain}, rounds)
        found[str(width)] = {name: seconds[name] / seconds["sweep"] for name in ("native", "tensor operations")}
        print("optimisers", width, json.dumps(found[str(width)]), flush=True)
    return found


def iteration(rounds: int) -> dict[str, Any]:
    """Median milliseconds of each part of one AST iteration (CIFAR-10, IPC 1, experts read from disk)."""
    recipe = load_recipe("cifar10/ast-ipc1")
    assert isinstance(recipe.distill, MatchingConfig)
    images = torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(100) % 10)
    real = RealSet("random", split, split, tuple("abcdefghij"))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        net = ConvNet(3, 10, (32, 32))
        start = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
        walk = start + 0.02 * torch.randn(4, len(start)).cumsum(0)
        save_expert(Path(folder), 0, walk, {"index": 0})
        for gradient in ("graph", "adjoint"):
            distill = recipe.distill.model_copy(update={"initialisation": "random", "gradient": gradient})
            chosen = recipe.model_copy(update={"distill": distill, "preprocess": "standardise"})
            fitted = preprocess.fit("standardise", images)
            method = make_method(Problem(real, fitted, chosen, Trajectories(Path(folder)), torch.device("cpu"), 0))
            state = method.initialise(torch.Generator().manual_seed(0))
            spent: dict[str, list[float]] = {}
            parts = [(method, "_draw_segment"), (method, "_perturbed_start"), (method, "_draw_steps"), (method, "_update")]
            parts += [(trajectory_matching, "unroll"), (siamese, "apply"), (method, "step")]
            with contextlib.ExitStack() as stack:
                for owner, name in parts:
                    stack.enter_context(_timed(owner, name, spent))
                for turn in range(rounds + 1):
                    before = {name: len(values) for name, values in spent.items()}
                    method.step(state, turn, torch.Generator().manual_seed(turn))
                    for name, values in spent.items():  # a part that runs at every student step is summed
                        values[before.get(name, 0) :] = [sum(values[before.get(name, 0) :])]
            found[gradient] = {name: 1e3 * statistics.median(values[1:]) for name, values in spent.items()}
    print("iteration", json.dumps(found), flush=True)
    return found


@contextlib.contextmanager
def _timed(owner: Any, name: str, spent: dict[str, list[float]]) -> Iterator[None]:
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = original(*args, **kwargs)
        spent.setdefault(name, []).append(time.perf_counter() - started)
        return result

    setattr(owner, name, timed)
    yield
    setattr(owner, name, original)


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws speed relative to plain autograd, and the growth of memory and time in recompute mode."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    speed, *axes = figure.subplot_mosaic("AAAA;BCDE").values()
    engines = list(ENGINES)
    for i, (name, found) in enumerate((name, report["cases"]["engines"][name]) for name in ("a", "b", "c")):
        speed.bar(
            [x + 0.27 * (i - 1) for x in range(len(engines))], [found[e]["speed"] for e in engines], 0.25, label=f"case {name}"
        )
    speed.set_xticks(range(len(engines)), [engine.replace(", ", ",\n") for engine in engines])
    speed.set_ylabel("speed, plain autograd = 1")
    speed.legend(frameon=False)
    for axis, (name, points) in zip(axes, report["growth"].items(), strict=True):
        at = [float(key) for key in points]
        axis.plot(at, [point["MiB"] for point in points.values()], "o-", color="tab:blue")
        axis.set(xlabel=name, ylabel="MiB", ylim=(0, None))
        seconds = axis.twinx()
        seconds.plot(at, [point["seconds"] for point in points.values()], "s--", color="tab:orange")
        seconds.set(ylabel="seconds", ylim=(0, None))
    figures.save(figure, path)


def main() -> None:
    parts: dict[str, Callable[[argparse.Namespace], Any]] = {
        "cases": lambda options: cases(options.rounds),
        "memory": lambda options: memory(),
        "growth": lambda options: growth(),
        "error": lambda options: error(options.draws, options.steps),
        "experts": lambda options: experts(options.rounds),
        "optimisers": lambda options: optimisers(options.rounds),
        "iteration": lambda options: iteration(options.rounds),
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for speed.json")
    parser.add_argument("--only", default=",".join(parts), help="parts, joined by commas")
    parser.add_argument("--rounds", type=int, default=5, help="number of measurements per time")
    parser.add_argument("--draws", type=int, default=24, help="number of random problems for the error")
    parser.add_argument("--steps", type=int, default=30, help="N of the problems for the error")
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "speed.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        report[name] = parts[name](options)
        report["machine"] = {"processor": processor(), "torch": torch.__version__}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if {"cases", "growth"} <= set(report):
        draw(report, options.out / "speed.png")


if __name__ == "__main__":
    main()
