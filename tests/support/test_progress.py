"""How far a run is: stages that were expected, pieces that add up, and what a person sees of it."""

from __future__ import annotations

import io
import time

import pytest

from dstill.support.console import ConsoleReporter
from dstill.support.progress import Expectation, Expected, Pieces, Silent, expect


class Recorder(Silent):
    def __init__(self) -> None:
        self.told: list[tuple[str, float, float, str]] = []

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        self.told.append((stage, done, total, detail))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STAGES = [Expectation("experts", 60.0), Expectation("distilling", 20.0, times=2), Expectation("evaluation", 20.0)]


def test_the_share_of_the_run_follows_the_expected_seconds() -> None:
    run = Expected(STAGES)
    told = [("experts", 0, 4), ("experts", 2, 4), ("experts", 4, 4), ("distilling", 5, 10), ("distilling", 10, 10)]
    told += [("distilling", 5, 10), ("distilling", 10, 10), ("evaluation", 1, 2), ("evaluation", 2, 2)]
    assert [run.share(*one) for one in told] == pytest.approx([0.0, 0.3, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9, 1.0])


def test_a_stage_that_never_came_counts_as_finished_and_the_share_never_falls() -> None:
    run = Expected(STAGES)
    assert run.share("distilling", 1, 10) == pytest.approx(0.61)
    assert run.share("something else", 1, 2) == pytest.approx(0.61)
    assert run.share("experts", 1, 4) == pytest.approx(0.61)
    assert run.share("evaluation", 2, 2) == pytest.approx(1.0)


def test_the_time_left_begins_as_expected_and_follows_the_pace() -> None:
    run = Expected([Expectation("experts", 1000.0)])
    assert run.left(0.0) == pytest.approx(1000.0)
    run.share("experts", 1, 100)
    assert run.left(20.0) == pytest.approx(990 * 120 / 110)  # a slow start says little
    run.share("experts", 90, 100)
    assert run.left(1800.0) == pytest.approx(100 * 1900 / 1000)  # twice as slow for long
    run.share("experts", 1, 1)
    assert run.left(2000.0) == 0.0


def test_more_rounds_of_a_stage_than_expected_do_not_reach_into_the_next_one() -> None:
    run = Expected(STAGES)
    for _ in range(5):
        last = run.share("distilling", 1, 10), run.share("distilling", 10, 10)
    assert last == pytest.approx((0.8, 0.8))


def test_a_reporter_that_does_not_ask_is_not_told_what_to_expect() -> None:
    expect(Recorder(), STAGES)  # it has no such function


def test_pieces_side_by_side_are_one_stage() -> None:
    reporter = Recorder()
    pieces = Pieces(reporter, "epochs", 10, before=4)
    pieces("a", 0.5)
    pieces("b", 1.0, "loss 2")
    pieces("a", 3.0)
    assert reporter.told == [("epochs", 4.5, 10, ""), ("epochs", 5.5, 10, "loss 2"), ("epochs", 8.0, 10, "loss 2")]


def test_the_bar_and_the_time_left_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dstill.support.console.time.monotonic", lambda: now[0])
    stream = Terminal()
    reporter = ConsoleReporter(stream)
    expect(reporter, STAGES)
    now[0] += 30.0
    reporter.progress("experts", 1, 4)  # 15 s of work in 30 s, and 85 s of work are left
    assert stream.getvalue().endswith("█▌         15 % experts 1/4  1 min 53 s left")  # 85 s (30 + 30) / (15 + 30)
    now[0] += 130.0
    reporter.progress("distilling", 10, 10)
    reporter.progress("distilling", 1, 10)  # 71 s of work in 160 s
    assert stream.getvalue().endswith("71 % distilling 1/10  55 s left")  # 29 s (160 + 30) / (71 + 30)


def test_without_expectations_the_time_left_is_that_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("dstill.support.console.time.monotonic", lambda: now[0])
    stream = Terminal()
    reporter = ConsoleReporter(stream)
    reporter.progress("experts", 1, 4)
    now[0] += 30.0
    reporter.progress("experts", 2.5, 4)
    assert stream.getvalue().endswith("██████▎    62 % experts 2/4  30 s left")


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_long_step_shows_how_long_nothing_was_told(stream: io.StringIO) -> None:
    reporter = ConsoleReporter(stream, patience=0.15)
    reporter.progress("fitting", 0, 1)
    for _ in range(100):
        if "fitting 0/1  (for 0 s)" in stream.getvalue():
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"nothing was shown: {stream.getvalue()!r}")
    reporter.progress("fitting", 1, 1)
    finished = stream.getvalue()
    time.sleep(0.5)
    assert stream.getvalue() == finished, "nothing is under way"


def test_a_reporter_without_patience_starts_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstill.support.console.threading.Thread", lambda **_: pytest.fail("a thread"))
    ConsoleReporter(io.StringIO())
    ConsoleReporter(io.StringIO(), quiet=True, patience=1.0)
