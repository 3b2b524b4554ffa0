"""A plan covers what a run does: its stages, what is already cached, what remains on disk, and warnings."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.steady import Steady

import dstill
from dstill.config.registry import methods
from dstill.config.settings import NetConfig, Passes, settings_class
from dstill.data.catalog import DATASETS, Shape
from dstill.data.real import RealSet
from dstill.errors import DstillError
from dstill.evaluation.protocols import load_protocol
from dstill.jobs.job import Job, Task, Workplace
from dstill.jobs.options import Choice
from dstill.planning.clock import Clock
from dstill.planning.plan import plan_job, together
from dstill.planning.stages import Plan

SMALL: dict[str, Any] = {"recipe": "smoke", "changes": ["net.width=4"]}


def on(cache: Path) -> dstill.Machine:
    return dstill.Machine(device="cpu", cache=cache, workers=1)


def stage(plan: Plan, name: str) -> Any:
    return next(stage for stage in plan.stages if stage.name == name)


def test_cached_experts_cost_nothing_and_those_to_be_trained_have_the_size_of_their_files(
    tiny_real: RealSet, tmp_path: Path
) -> None:
    settings = {**SMALL, "method": "mtt", "machine": on(tmp_path), "changes": ["net.width=32"]}
    before = dstill.plan(tiny_real, **settings)
    trajectories = dstill.train_experts(tiny_real, **settings)
    after = dstill.plan(tiny_real, **settings)
    on_disk = sum(path.stat().st_size for path in trajectories.paths)
    assert stage(before, "experts").seconds > 0
    assert stage(before, "experts").disk_bytes == pytest.approx(on_disk, rel=0.2)
    assert (stage(after, "experts").seconds, stage(after, "experts").disk_bytes) == (0, 0)


@pytest.mark.parametrize("method", list(methods()))
def test_every_method_has_a_plan(tiny_real: RealSet, tmp_path: Path, method: str) -> None:
    plan = dstill.plan(tiny_real, method=method, machine=on(tmp_path), **SMALL)
    names = {stage.name for stage in plan.stages}
    assert {"evaluation", "random images"} <= names
    assert ("experts" in names) == methods()[method].needs_experts
    assert ("trained network" in names) == (methods()[method].needs == "trained network")
    assert ("distilling" in names) == (methods()[method].family != "selection")
    assert all(stage.seconds > 0 for stage in plan.stages)


def test_every_network_that_a_selection_asks_is_planned(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "training", lambda *given: 1.0)  # seconds per step; an epoch is a single step
    one, three = (
        stage(dstill.plan(tiny_real, method="el2n", distill={"networks": n}, machine=on(tmp_path), **SMALL), "trained network")
        for n in (1, 3)
    )
    assert (one.seconds, three.seconds) == (2.0, 6.0)
    assert three.disk_bytes == 3 * one.disk_bytes and three.note.startswith("3 of 2 epochs")


def test_what_is_left_out_is_neither_planned_nor_run(tiny_real: RealSet, tmp_path: Path) -> None:
    options = {"method": "random", "evaluation": dstill.Evaluation(random=False), "machine": on(tmp_path), **SMALL}
    assert [stage.name for stage in dstill.plan(tiny_real, **options).stages] == ["evaluation"]
    result = dstill.run(tiny_real, out=tmp_path / "run", **options)
    assert (result.random, result.whole) == (None, None)


def test_twice_the_work_takes_twice_as_long(tiny_real: RealSet, tmp_path: Path) -> None:
    real, device = tiny_real, torch.device("cpu")
    clock = Clock(Shape(real.channels, (8, 8), real.classes, len(real.train), len(real.test)), device)
    net = NetConfig(width=4, depth=1)
    once, twice = (clock.passes(net, Passes("gradient", times, 8)) for times in (1, 2))
    assert twice == 2 * once, "a batch is timed once"


def test_the_two_passes_of_gsam_are_timed_and_not_counted_again(tiny_real: RealSet, tmp_path: Path) -> None:
    place = Workplace.of(dstill.Machine(device="cpu", cache=tmp_path), False)
    seconds = list[float]()
    for gsam in ("experts.gsam=null", "experts.gsam.rho=0.01"):
        job = Job.resolve(tiny_real, Choice("mtt", recipe="smoke", changes=[gsam]), 0, place)
        stages = plan_job(job, Task(), Steady(job.shape, 1e-3), "experts").stages
        seconds.append(stages[0].seconds)
    assert seconds[0] == seconds[1] > 0, "this clock takes as long for either"


def test_draws_are_taken_in_rounds_of_as_many_as_there_are_processes(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = list[int | None]()
    monkeypatch.setattr(Clock, "passes", lambda self, net, passes, count=None: threads.append(count) or 1.0)
    monkeypatch.setattr("dstill.planning.plan.threads_each", lambda workers: 100 * workers)

    def distilling(draws: int, workers: int) -> Any:
        changes = ["net.width=4", f"distill.draws={draws}"]
        machine = dstill.Machine(device="cpu", cache=tmp_path, workers=workers)
        return stage(dstill.plan(tiny_real, method="dm", recipe="smoke", changes=changes, machine=machine), "distilling")

    one = distilling(1, 4)
    assert set(threads) == {None}, "a single draw takes all threads"
    for draws, workers, rounds, several in ((6, 1, 6, 1), (6, 4, 2, 4), (2, 4, 1, 2)):
        threads.clear()
        found = distilling(draws, workers)
        assert found.seconds == rounds * one.seconds
        assert found.peak_bytes == several * one.peak_bytes
        assert 100 * several in threads or several == 1
        assert found.note == f"5 iterations of {draws} draws" + (f" in {several} processes" if several > 1 else "")


def test_memory_is_that_of_the_draws_that_a_process_takes_side_by_side(tiny_real: RealSet, tmp_path: Path) -> None:
    place = Workplace.of(on(tmp_path), False)

    def memory(method: str, streams: int) -> Any:
        changes = ["net.width=4", "distill.draws=3", *(["distill.memory=keep"] if method == "bptt" else [])]
        job = Job.resolve(tiny_real, Choice(method, recipe="smoke", changes=changes), 0, replace(place, streams=streams))
        clock = Clock(job.shape, place.device)
        return stage(plan_job(job, Task(), clock, "distilling"), "distilling").peak_bytes

    one, two, three, four = (memory("bptt", streams) for streams in (1, 2, 3, 4))
    assert one < two and two - one == pytest.approx(three - two) and four == three, "at most as many as there are draws"
    assert memory("dm", 1) == memory("dm", 3), "it takes its draws one after another"


def test_an_evaluation_takes_the_training_and_the_judging_of_its_networks(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "training", lambda *given: 1.0)
    monkeypatch.setattr(Clock, "passes", lambda *given: 100.0)
    judged = dstill.Evaluation(networks=3, random=False)
    plan = dstill.plan(tiny_real, method="random", evaluation=judged, machine=on(tmp_path), **SMALL)
    epochs = load_protocol("quick").passes
    assert stage(plan, "evaluation").seconds == pytest.approx(3 * (epochs * 1.0 + 100.0))


def test_a_plan_counts_what_stored_images_hold_and_random_images_by_their_bytes(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "passes", lambda self, net, passes, threads=None: passes.times * passes.images)
    monkeypatch.setattr(Clock, "training", lambda self, net, images, *given: float(images))

    def planned(ipc: int, parts: int) -> Plan:
        changes, looks = ["net.width=4", f"distill.parts={parts}"], dstill.Recording(validate_every=1)
        options = {"recipe": "smoke", "method": "dm", "changes": changes, "recording": looks, "machine": on(tmp_path)}
        return dstill.plan(tiny_real, ipc=ipc, **options)  # type: ignore[arg-type]

    one, four, held = planned(1, 1), planned(4, 1), planned(1, 2)
    for name, like in (("distilling", four), ("validation", four), ("evaluation", four), ("random images", one)):
        assert stage(held, name).seconds == stage(like, name).seconds, name
    assert stage(held, "distilling").disk_bytes == stage(one, "distilling").disk_bytes
    with pytest.raises(DstillError, match="fewer than the 24 images per class"):
        planned(6, 2)
    with pytest.raises(DstillError, match="cannot hold 9x9 parts"):
        planned(1, 9)
    monkeypatch.setattr("dstill.jobs.job.load_real", lambda source: pytest.fail(f"{source} was loaded"))
    with pytest.raises(DstillError, match="5000 training images per class, fewer than 8000"):
        dstill.plan("cifar10", method="dm", ipc=2000, distill={"parts": 2}, machine=on(tmp_path))


def test_further_protocols_are_planned_with_their_own_passes(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "training", lambda *given: 1.0)
    monkeypatch.setattr(Clock, "passes", lambda *given: 0.0)
    judged = dstill.Evaluation(networks=2, random=False, also=["ast"])
    plan = dstill.plan(tiny_real, method="random", evaluation=judged, machine=on(tmp_path), **SMALL)
    passes = load_protocol("quick").passes + load_protocol("ast").passes
    assert stage(plan, "evaluation").seconds == pytest.approx(2 * passes)
    assert stage(plan, "evaluation").note == "4 networks"


def test_two_sets_are_distilled_one_after_the_other(
    tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clock, "passes", lambda *given: 1.0)
    options = {"method": "dm", "evaluation": dstill.Evaluation(random=False), "machine": on(tmp_path), **SMALL}
    one, two = (stage(dstill.plan(tiny_real, sets=sets, **options), "distilling").seconds for sets in (1, 2))
    assert two == 2 * one > 0


def test_large_batches_lie_on_the_line_through_two_small_ones() -> None:
    asked: list[int] = []

    def seconds(images: int) -> float:
        asked.append(images)
        return 0.5 + 0.25 * images

    clock = Clock(Shape(1, (8, 8), 2, 10, 10), torch.device("cpu"))
    assert clock._scaled(1000, seconds) == pytest.approx(250.5)
    assert asked == [4, 12], "nothing larger is timed"
    assert clock._scaled(4, seconds) == pytest.approx(1.5)


def test_a_busy_moment_does_not_make_large_batches_cheap() -> None:
    clock = Clock(Shape(1, (8, 8), 2, 10, 10), torch.device("cpu"))
    times = {4: 0.2, 12: 0.1}  # the machine was busy during the first of them
    assert clock._scaled(256, lambda images: times[images]) == pytest.approx(0.2 + 252 * 0.5 * 0.2 / 4)


@pytest.mark.usefixtures("no_calibration")
def test_a_published_set_is_planned_for_without_being_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstill.jobs.job.load_real", lambda source: pytest.fail(f"{source} was loaded"))
    plan = dstill.plan("cifar10", method="mtt", ipc=1, machine=dstill.Machine(device="cpu", cache=tmp_path))
    # 100 experts: the start, 3 epochs, and the network to resume from, 320,010 parameters each (ConvNet-3 on ten classes).
    assert stage(plan, "experts").disk_bytes == 100 * 5 * 320_010 * 4
    other = dstill.plan("cifar10", method="mtt", ipc=1, net="alexnet", machine=dstill.Machine(device="cpu", cache=tmp_path))
    assert stage(other, "experts").disk_bytes > stage(plan, "experts").disk_bytes, "the network is the one asked for"


def test_the_shapes_of_known_data_are_those_that_are_loaded() -> None:
    real, shape = dstill.load_real("digits"), DATASETS["digits"].shape
    assert shape == (real.channels, real.size, real.classes, len(real.train), len(real.test))


def test_too_little_disk_or_memory_is_said(tiny_real: RealSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dstill.plan(tiny_real, method="mtt", machine=on(tmp_path), **SMALL).warnings == ()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 0))
    monkeypatch.setattr("dstill.planning.plan.available_memory", lambda _: 10.0)
    disk, memory = dstill.plan(tiny_real, method="mtt", machine=on(tmp_path), **SMALL).warnings
    assert "of disk are needed" in disk and str(tmp_path) in disk
    assert "of memory are needed" in memory


def test_runs_that_share_experts_count_them_once(tiny_real: RealSet, tmp_path: Path) -> None:
    plans = [
        dstill.plan(tiny_real, method="mtt", machine=on(tmp_path), **{**SMALL, "changes": ["net.width=4", change]})
        for change in ("distill.lr_images=1.0", "distill.lr_images=2.0", "experts.lr=0.5")
    ]
    first, second, third = together(plans, "all").stages
    experts = stage(plans[0], "experts").disk_bytes
    assert first.disk_bytes - second.disk_bytes == experts
    assert third.disk_bytes == first.disk_bytes


def test_the_work_of_matching_is_n_steps_of_the_batch() -> None:
    settings = settings_class("mtt")(student_steps=7, batch_syn=20)  # type: ignore[call-arg]
    assert settings.work(ipc=10, classes=10) == [Passes("gradient", 7, 20), Passes("tangent", 7, 20)]
    assert settings.work(ipc=1, classes=10) == [Passes("gradient", 7, 10), Passes("tangent", 7, 10)]
