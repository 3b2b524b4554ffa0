"""What users see while something runs: a progress line on a terminal, plain lines elsewhere; nothing from Python functions."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

from rich.console import Console

_PLAIN_SECONDS = 15.0


class Reporter(Protocol):
    """Is told what happens during a run. It has no effect on any number."""

    def note(self, text: str) -> None:
        """Shows a message that should stay visible."""
        ...

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        """Shows that `done` of `total` parts of a stage are finished.

        Args:
            stage: name of the stage.
            done: parts that are finished.
            total: all parts.
            detail: more about the stage, such as the current loss.
        """
        ...


class Silent:
    """Shows nothing: the default of the Python functions."""

    def note(self, text: str) -> None:
        pass

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        pass


Progress = bool | Reporter | None
"""Whether progress is shown, or what receives it; None: it is shown where somebody can see it."""


def reporter_of(progress: Progress = None) -> Reporter:
    """What receives the progress of a public function.

    Args:
        progress: True to show it, False for silence, or a `Reporter` of your own. None shows it on a terminal and in a
            notebook, and nowhere else.

    Example:
        >>> type(reporter_of(False)).__name__
        'Silent'
    """
    if progress is None:
        progress = in_notebook() or sys.stderr.isatty()
    if not isinstance(progress, bool):
        return progress
    if not progress:
        return Silent()
    return NotebookReporter() if in_notebook() else ConsoleReporter(sys.stderr)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process."""
    shell = sys.modules.get("IPython")
    return shell is not None and type(shell.get_ipython()).__name__ == "ZMQInteractiveShell"


class NotebookReporter:
    """A bar for each stage, by tqdm, which draws it in the notebook; notes are printed between the bars."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def note(self, text: str) -> None:
        self._close()
        print(printable(text))

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        from tqdm.auto import tqdm

        if self._bar is None or stage != self._stage or done < self._bar.n:
            self._close()
            self._bar, self._stage = tqdm(total=total, desc=stage), stage
        self._bar.set_postfix_str(printable(detail), refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class ConsoleReporter:
    """Shows progress: on a terminal one line that is rewritten, elsewhere a line every 15 seconds and at the end of a stage.

    Args:
        stream: where to write.
        quiet: write nothing.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self.console = Console(file=stream, quiet=quiet, highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal and not quiet
        self._stage = ""
        self._begun = self._last = 0.0
        self._first = self._done = 0
        self._line_open = False

    def note(self, text: str) -> None:
        self._close_line()
        self.console.print(printable(text), markup=False)

    def progress(self, stage: str, done: int, total: int, detail: str = "") -> None:
        now = time.monotonic()
        if stage != self._stage or done < self._done:  # another stage, or the same stage again
            self._close_line()
            self._stage, self._begun, self._last, self._first = stage, now, -1e9, done
        self._done = done
        left = self._left(done, total, now)
        line = printable(f"{stage} {done}/{total}{'  ' + detail if detail else ''}{left}")
        if self._live:
            self.console.file.write("\r\x1b[2K" + line[: max(20, self.console.width - 1)])
            self.console.file.flush()
            self._line_open = True
            if done >= total:
                self._close_line()
        elif now - self._last >= _PLAIN_SECONDS or done >= total:
            self.console.print(line, markup=False)
            self._last = now

    def _left(self, done: int, total: int, now: float) -> str:
        worked = done - self._first
        if worked < 1 or done >= total:
            return ""
        return f"  {duration((now - self._begun) / worked * (total - done))} left"

    def _close_line(self) -> None:
        if self._line_open:
            self.console.file.write("\n")
            self._line_open = False


def printable(text: str) -> str:
    """The text with control characters spelled out, so that a name from a file cannot control the terminal.

    Example:
        >>> print(printable("grey\\x1b[2J"))
        grey\\x1b[2J
    """
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text)


def duration(seconds: float) -> str:
    """A duration in seconds as people read it.

    Example:
        >>> duration(42.4), duration(61), duration(7260)
        ('42 s', '1 min 1 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def set_sizes(stored: int, file: int | None) -> str:
    """The size of a distilled set: what it stores, and its file if that is known; in bytes.

    Example:
        >>> set_sizes(650, 5000), set_sizes(650, None)
        ('0.6 KiB of 8-bit pixels and labels, 4.9 KiB as a file', '0.6 KiB of 8-bit pixels and labels')
    """
    return f"{stored / 1024:.1f} KiB of 8-bit pixels and labels" + (f", {file / 1024:.1f} KiB as a file" if file else "")


def size(count: float) -> str:
    """A number of bytes as people read it.

    Example:
        >>> size(0), size(300_000), size(5 * 2**30)
        ('–', '293 KiB', '5.0 GiB')
    """
    if not count:
        return "–"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"
