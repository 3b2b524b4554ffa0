"""How far a run is: what is told about it, by whom, and how it adds up. Nothing here shows anything."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

# The expectation weighs as much against the pace so far as if this much of the run had passed as expected.
_TRUSTED_SECONDS, _TRUSTED_SHARE = 30.0, 0.1


class Reporter(Protocol):
    """Is told what happens during a run. It has no effect on any number."""

    def note(self, text: str) -> None:
        """Shows a message that should stay visible."""
        ...

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        """Shows that `done` of `total` parts of a stage are finished.

        Args:
            stage: name of the stage.
            done: parts that are finished, such as 2.5.
            total: all parts.
            detail: more about the stage, such as the current loss.
        """
        ...


class Expectation(NamedTuple):
    """What a stage is expected to take.

    Attributes:
        stage: its name, as in `Reporter.progress`.
        seconds: its time, all repetitions together.
        times: how often it is gone through, such as once for each set.
    """

    stage: str
    seconds: float
    times: int = 1


@runtime_checkable
class Expecting(Protocol):
    """A reporter that shows how far the whole run is."""

    def expect(self, stages: Sequence[Expectation]) -> None:
        """Is told the stages of the run, in order, before they begin."""
        ...


def expect(reporter: Reporter, stages: Sequence[Expectation]) -> None:
    """Tells a reporter what a run is expected to take, if it wants to know."""
    if isinstance(reporter, Expecting):
        reporter.expect(stages)


class Silent:
    """Shows nothing: the default of the Python functions."""

    def note(self, text: str) -> None:
        pass

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        pass


class Pieces:
    """Adds up the progress of several pieces of work, such as experts that are trained side by side, into that of one stage.

    Args:
        reporter: is told.
        stage: name of the stage.
        total: parts of all pieces together.
        before: parts that are finished already.

    Example:
        >>> class Printing(Silent):
        ...     def progress(self, stage, done, total, detail=""):
        ...         print(stage, done, "of", total, detail)
        >>> pieces = Pieces(Printing(), "experts", total=8, before=2)
        >>> pieces(0, 1.5, "expert 0"); pieces(1, 2)
        experts 3.5 of 8 expert 0
        experts 5.5 of 8 expert 0
    """

    def __init__(self, reporter: Reporter, stage: str, total: float, before: float = 0) -> None:
        self.reporter, self.stage, self.total, self.before = reporter, stage, total, before
        self._done: dict[Hashable, float] = {}
        self._detail = ""

    def __call__(self, piece: Hashable, done: float, detail: str = "") -> None:
        """Tells that `done` parts of a piece are finished. Without a detail, the last one stays."""
        self._done[piece], self._detail = done, detail or self._detail
        self.reporter.progress(self.stage, self.before + sum(self._done.values()), self.total, self._detail)


class Expected:
    """How far the whole run is, given what its stages were expected to take.

    Stages come in order, so that those before the present one count as finished, whatever was told of them. A stage that was
    not expected changes nothing.

    Example:
        >>> run = Expected([Expectation("experts", 60), Expectation("distilling", 40, times=2)])
        >>> run.share("experts", 5, 10), run.share("distilling", 10, 10), run.share("distilling", 1, 10)
        (0.3, 0.8, 0.82)
    """

    def __init__(self, stages: Sequence[Expectation]) -> None:
        self.stages = [one for one in stages if one.seconds > 0]
        self.whole = sum(one.seconds for one in self.stages)
        self._stage, self._done, self._rounds, self._share = "", 0.0, 0, 0.0

    def share(self, stage: str, done: float, total: float) -> float:
        """The share of the run that is finished, in [0, 1], once `done` of `total` parts of a stage are. It never falls."""
        if stage != self._stage:
            self._rounds = 0
        elif done < self._done:
            self._rounds += 1
        self._stage, self._done = stage, done
        before = 0.0
        for one in self.stages:
            if one.stage == stage:
                rounds = min(one.times, self._rounds + done / max(total, 1e-9))
                self._share = max(self._share, (before + one.seconds * rounds / one.times) / self.whole)
                break
            before += one.seconds
        return self._share

    def left(self, seconds: float) -> float:
        """The seconds left of the run, if it has taken so many.

        What was expected of the rest is corrected by the pace so far, which counts the more, the more of the run is finished.
        """
        trusted = max(_TRUSTED_SECONDS, _TRUSTED_SHARE * self.whole)
        pace = (seconds + trusted) / (self._share * self.whole + trusted)
        return (1 - self._share) * self.whole * pace
