"""A reporter that remembers what it is told."""

from __future__ import annotations

from collections.abc import Sequence

from dstill.support.progress import Expectation, Silent


class Listener(Silent):
    """Remembers notes, expected stages, and progress as (stage, done, total)."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.expected: list[Expectation] = []
        self.told: list[tuple[str, float, float]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def expect(self, stages: Sequence[Expectation]) -> None:
        self.expected = list(stages)

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        self.told.append((stage, done, total))

    def have(self, text: str) -> bool:
        """Whether a note has this text."""
        return any(text in note for note in self.notes)

    @property
    def came(self) -> list[str]:
        """The stages in their order; one that comes twice in a row counts once."""
        stages = [stage for stage, _, _ in self.told]
        return [stage for i, stage in enumerate(stages) if stages[i - 1 : i] != [stage]]

    @property
    def stages(self) -> set[str]:
        """The stages that came."""
        return set(self.came)
