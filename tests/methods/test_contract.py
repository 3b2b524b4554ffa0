"""What every registered method must do."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dstill.artifacts.distilled import DistilledSet
from dstill.artifacts.run_folder import RunFolder
from dstill.config import recipes
from dstill.config.registry import METHODS, methods
from dstill.config.settings import NetConfig, Protocol, Recipe, settings_class
from dstill.data.catalog import Shape
from dstill.data.real import RealSet, Split
from dstill.distillation.loop import Cadence, make_method, run_method
from dstill.evaluation.networks import evaluate_set, prepared
from dstill.jobs.job import Job, Workplace
from dstill.jobs.options import Choice, Machine
from dstill.methods.base import Problem, State

NAMES = sorted(methods())
STEPPING = [name for name in NAMES if methods()[name].family != "selection"]
# At one image a class these are determined by the trained networks alone.
DETERMINED = {"herding", "kmeans", "k-centre", "grand", "el2n"}
# Each method with images as they are, and with four in one if it can.
FORMS = [(name, parts) for name in STEPPING for parts in ((1, 2) if settings_class(name).optimises_images else (1,))]
CPU = torch.device("cpu")
PROTOCOL = Protocol(name="tiny", version=1, passes=40, batch_size=64, momentum=0.9, weight_decay=0.0, lr=0.05, networks=5)
# Step sizes for twenty steps on a toy set that starts from noise; all other settings are those of a smoke run.
TRAJECTORIES = (
    *("experts.lr=0.05", "experts.momentum=0.0", "experts.batch_size=20", "distill.batch_syn=null"),
    *("distill.lr_images=100.0", "distill.lr_alpha=1e-6", "distill.alpha_init=0.05", "distill.initialisation=noise"),
)
NOISE = ("distill.lr_images=1.0", "distill.initialisation=noise")
QUICK: dict[str, tuple[str, ...]] = {
    "dc": NOISE,
    "dsa": NOISE,
    "dm": NOISE,
    "cafe": (*NOISE, "distill.lr_images=0.1"),
    "frepo": ("distill.lr=0.3", "distill.initialisation=noise", "distill.net.width=32", "distill.batch_real=512"),
    "mtt": TRAJECTORIES,
    "ftd": (*TRAJECTORIES, "distill.image_ema=0.5"),
    # With labels constant in the gradient, as published, the images of a toy set lose their classes.
    "tesla": (*TRAJECTORIES, "distill.lr_images=300.0", "distill.soft_labels=expert-differentiated"),
    "datm": (*TRAJECTORIES, "distill.image_ema=0.5", "distill.skip_above=null", "distill.lr_labels=1.0"),
    "ast": (*TRAJECTORIES, "distill.alpha_init=0.01"),
    "bptt": ("distill.lr_images=0.05", "distill.alpha_init=0.1"),
    "rat-bptt": ("distill.lr_images=0.05", "distill.alpha_init=0.01", "distill.clip=null"),
}


def test_every_method_that_comes_with_dstill_is_found() -> None:
    assert len(METHODS) >= 12 and set(METHODS) <= set(NAMES)
    assert {"random", "dm", "mtt", "ast"} <= set(METHODS) and len(STEPPING) >= 9
    pages = {page.stem for page in (Path(__file__).parents[2] / "docs" / "methods").glob("*.md")} - {"index"}
    assert pages == set(METHODS), "each method has its page, and each page its method"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def grey(real: RealSet) -> RealSet:
    """The same set with one channel."""
    parts = (
        Split(split.images.float().mean(1, keepdim=True).to(torch.uint8), split.labels) for split in (real.train, real.test)
    )
    return RealSet("grey", *parts, real.class_names)


def unbalanced(real: RealSet) -> RealSet:
    """Classes of 3, 9 and 20 training images."""
    kept = torch.cat([rows[:count] for rows, count in zip(real.train.by_class(3), (3, 9, 20), strict=True)])
    return RealSet("unbalanced", real.train.take(kept), real.test, real.class_names)


def recipe_of(method: str, real: RealSet, ipc: int, iterations: int, parts: int = 1) -> Recipe:
    info = methods()[method]
    shape = Shape(real.channels, real.size, real.classes)
    settings = list(QUICK.get(method, ()))
    if info.family != "selection":
        settings += [f"distill.iterations={iterations}", f"distill.parts={parts}"]
    smoke, _ = recipes.resolve(
        "smoke", real.name, shape, method=method, ipc=ipc, changes=["augmentation=none", "preprocess=standardise", *settings]
    )
    return smoke.model_copy(update={"net": NetConfig(width=8, depth=2)})


@pytest.fixture
def problem_of(cache: Path) -> Callable[..., Problem]:
    """A problem for a method; whatever the method needs is trained once per session."""

    def make(method: str, real: RealSet, *, ipc: int = 1, iterations: int = 3, seed: int = 0, parts: int = 1) -> Problem:
        choice = Choice(recipe=recipe_of(method, real, ipc, iterations, parts))
        job = Job.resolve(real, choice, 0, Workplace.of(Machine(device="cpu", cache=cache), False))
        return replace(job.problem(seed, job.experts() if job.method.needs_experts else None), feature_expert=None)

    return make


def same(a: DistilledSet, b: DistilledSet) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and a.alpha == b.alpha


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("ipc", [1, 3])
@pytest.mark.parametrize("change", [lambda real: real, grey, unbalanced], ids=["colour", "grey", "unbalanced"])
def test_the_set_has_the_shape_of_the_task(
    method: str, ipc: int, change: Callable[[RealSet], RealSet], problem_of: Callable[..., Problem], tiny_real: RealSet
) -> None:
    real = change(tiny_real)
    found = run_method(problem_of(method, real, ipc=ipc, iterations=2))
    assert found.images.shape == (3 * ipc, real.channels, 8, 8) and found.images.dtype == torch.float32
    assert bool(torch.isfinite(found.images).all()) and bool(torch.isfinite(found.labels).all())
    if found.labels.is_floating_point():
        assert methods()[method].labels == "soft" and found.labels.shape == (3 * ipc, 3)
    else:
        assert found.labels.tolist() == [c for c in range(3) for _ in range(ipc)]
    if methods()[method].family == "selection":
        of_class = [real.train.images[rows] for rows in real.train.by_class(3)]
        pixels = (found.pixels() * 255).round().to(torch.uint8)
        copies = [
            [int((of_class[c] == image).flatten(1).all(1).sum()) for image in pixels[c * ipc : (c + 1) * ipc]] for c in range(3)
        ]
        assert all(count >= 1 for row in copies for count in row), "a selection consists of real images of its class"
        assert len({image.numpy().tobytes() for image in pixels}) == 3 * ipc, "and contains none of them twice"


@pytest.mark.parametrize("method", NAMES)
def test_the_seed_decides_everything(method: str, problem_of: Callable[..., Problem], tiny_real: RealSet) -> None:
    first, again, other = (run_method(problem_of(method, tiny_real, seed=seed)) for seed in (0, 0, 1))
    assert same(first, again)
    assert same(first, other) == (method in DETERMINED)


@pytest.mark.parametrize("method", [name for name, parts in FORMS if parts == 2])
def test_a_stored_image_may_hold_several(
    method: str, problem_of: Callable[..., Problem], tiny_real: RealSet, tmp_path: Path
) -> None:
    first, again, other = (run_method(problem_of(method, tiny_real, ipc=2, parts=2, seed=seed)) for seed in (0, 0, 1))
    assert same(first, again) and not same(first, other)
    assert first.images.shape == (6, 3, 8, 8) and (first.ipc, first.parts) == (2, 2)
    assert first.decoded.images.shape == (24, 3, 8, 8) and len(first.decoded.labels) == 24
    if first.labels.is_floating_point():
        assert first.labels.shape == (24, 3) and first.family == "parts and labels"
    else:
        assert first.labels.tolist() == [0, 0, 1, 1, 2, 2] and first.family == "parts"
        assert first.decoded.labels.tolist() == [c for c in range(3) for _ in range(8)]
    assert not torch.equal(first.images, run_method(problem_of(method, tiny_real, ipc=2)).images)
    loaded = DistilledSet.load(first.save(tmp_path))
    assert same(first, loaded) and loaded.parts == 2 and loaded.recipe == first.recipe


class _Stopped(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "parts", "stop"), [(*form, stop) for form in FORMS for stop in ((1, 3, 4) if form[1] == 1 else (3,))]
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    method: str, stop: int, parts: int, problem_of: Callable[..., Problem], tiny_real: RealSet, tmp_path: Path
) -> None:
    def interrupt(iteration: int, total: int, row: dict[str, float]) -> None:
        if iteration == stop:
            raise _Stopped

    problem = problem_of(method, tiny_real, iterations=5, ipc=2, parts=parts)
    whole = run_method(problem, RunFolder(tmp_path / "whole", {}), cadence=Cadence(checkpoint=2))
    broken = functools.partial(run_method, problem, cadence=Cadence(checkpoint=2))
    with pytest.raises(_Stopped):
        broken(RunFolder(tmp_path / "broken", {}), observer=interrupt)
    assert same(whole, broken(RunFolder(tmp_path / "broken", {})))
    rows = [
        [{key: value for key, value in row.items() if key != "seconds"} for row in RunFolder(tmp_path / name, {}).metrics()]
        for name in ("whole", "broken")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 5


@pytest.mark.parametrize("stop", [1, 2])
def test_a_signal_loses_no_step_not_even_the_last(
    stop: int, problem_of: Callable[..., Problem], tiny_real: RealSet, tmp_path: Path
) -> None:
    def interrupt(iteration: int, total: int, row: dict[str, float]) -> None:
        if iteration == stop:
            signal.raise_signal(signal.SIGINT)

    problem, folder = problem_of("dm", tiny_real, iterations=3), RunFolder(tmp_path, {})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_method(problem, folder, cadence=Cadence(checkpoint=0), observer=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    done, taken = folder.restore() or (0, {}), list[int]()
    assert done[0] == stop + 1
    assert same(run_method(problem, folder, observer=lambda i, *_: taken.append(i)), run_method(problem))
    assert taken == list(range(stop + 1, 3))


@pytest.mark.parametrize("method", NAMES)
def test_a_set_survives_being_saved_and_loaded(
    method: str, problem_of: Callable[..., Problem], tiny_real: RealSet, tmp_path: Path
) -> None:
    found = run_method(problem_of(method, tiny_real))
    loaded = DistilledSet.load(found.save(tmp_path))
    assert same(found, loaded) and loaded.recipe == found.recipe
    assert torch.equal(loaded.pixels(), found.pixels())


def score(problem: Problem, state: State) -> float:
    method = make_method(problem)
    test = prepared(problem.real.test, problem.preprocess, CPU)
    values = evaluate_set(method.result(state), test, PROTOCOL, seed=0, lr=PROTOCOL.lr)
    return sum(values) / len(values)


@pytest.mark.parametrize(("method", "parts"), FORMS)
def test_the_objective_falls_and_the_set_gets_better_than_its_start(
    method: str, parts: int, problem_of: Callable[..., Problem], hard_real: RealSet
) -> None:
    steps = 20
    problem = problem_of(method, hard_real, iterations=steps, parts=parts)
    running = make_method(problem)
    start = running.initialise(torch.Generator().manual_seed(0))
    state, losses = {name: tensor.clone() for name, tensor in start.items()}, list[float]()
    for iteration in range(steps):
        losses.append(running.step(state, iteration, torch.Generator().manual_seed(iteration))["loss"])
    assert sum(losses[-5:]) < sum(losses[:5])
    assert score(problem, state) > score(problem, start) + 0.02


@pytest.fixture
def hard_real(tiny_real: RealSet) -> RealSet:
    """The same patterns, with noise as strong as the patterns."""
    generator = torch.Generator().manual_seed(5)

    def noisy(split: Split) -> Split:
        noise = torch.randint(-80, 81, split.images.shape, generator=generator)
        return Split((split.images.int() + noise).clamp(0, 255).to(torch.uint8), split.labels)

    return RealSet("hard", noisy(tiny_real.train), noisy(tiny_real.test), tiny_real.class_names)


def test_a_method_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name, value = "mine", "other.package:INFO"

        def __init__(self, info: Any) -> None:
            self.info = info

        def load(self) -> Any:
            return self.info

    def registered(info: Any, name: str = "mine") -> dict[str, Any]:
        point = Point(info)
        point.name = name
        monkeypatch.setattr(
            "dstill.config.registry.metadata.entry_points", lambda group: [point] if group == "dstill.methods" else []
        )
        methods.cache_clear()
        return methods()

    try:
        assert registered(METHODS["dm"])["mine"] is METHODS["dm"]
        for info, name, message in ((3, "mine", "it is a int"), (METHODS["dm"], "ast", "the name is taken")):
            with pytest.raises(Exception, match=message):
                registered(info, name)
    finally:
        monkeypatch.undo()
        methods.cache_clear()
    assert "mine" not in methods()
