"""What users see while something runs: a progress line on a terminal, plain lines elsewhere; nothing from Python functions."""

from __future__ import annotations

import math
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from dstill.support.progress import Expectation, Expected, Reporter, Silent

_PLAIN_SECONDS = 9.0


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
        self._expected: Expected | None = None

    def expect(self, stages: Sequence[Expectation]) -> None:
        self._expected = Expected(stages)

    def note(self, text: str) -> None:
        self._close()
        print(printable(text))

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        from tqdm.auto import tqdm

        if self._bar is None or stage != self._stage or done < self._bar.n:
            self._close()
            self._bar, self._stage = tqdm(total=total, desc=stage), stage
        if self._expected is not None:
            detail = f"{detail}, {self._expected.share(stage, done, total):.0%} of the whole run"
        self._bar.set_postfix_str(printable(detail), refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class ConsoleReporter:
    """Shows progress: on a terminal one line that is rewritten, elsewhere a line every ten seconds and at the end of a stage.

    The line has a bar and the time left: of the whole run if `expect` was told what it takes, else of the stage.

    Args:
        stream: where to write.
        quiet: write nothing.
        patience: if nothing is told for so many seconds within a stage, the time since then is shown, so that a long step does
            not look like a process that hangs. None for never, where the process may go on to do other things.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False, patience: float | None = None) -> None:
        self.console = Console(file=stream, quiet=quiet, highlight=False, soft_wrap=True)
        self._live = self.console.is_terminal and not quiet
        self._expected: Expected | None = None
        self._begun = time.monotonic()  # of the stage, or of the run if its stages are known
        self._first = 0.0  # share of it that was finished then
        self._stage, self._done, self._total = "", 0.0, 0.0
        self._line, self._line_open = "", False
        self._told = self._shown = time.monotonic()
        self._lock = threading.RLock()
        if patience is not None and not quiet:
            threading.Thread(target=_keep_waiting, args=(weakref.ref(self), patience), daemon=True).start()

    def expect(self, stages: Sequence[Expectation]) -> None:
        with self._lock:
            self._expected, self._begun, self._first = Expected(stages), time.monotonic(), 0.0

    def note(self, text: str) -> None:
        with self._lock:
            self._close_line()
            self.console.print(printable(text), markup=False)

    def progress(self, stage: str, done: float, total: float, detail: str = "") -> None:
        with self._lock:
            now, share = time.monotonic(), done / max(total, 1e-9)
            if stage != self._stage or done < self._done:  # another stage, or the same stage again
                self._close_line()
                self._shown = -math.inf
                if self._expected is None:
                    self._begun, self._first = now, share
            if self._expected is not None:
                share = self._expected.share(stage, done, total)
            self._stage, self._done, self._total, self._told = stage, done, total, now
            text = f"{stage} {math.floor(done)}/{math.ceil(total)}{'  ' + detail if detail else ''}{self._left(share, now)}"
            self._line = printable(f"{_bar(share)} {text}" if self._live else text)
            if self._live or done >= total or now - self._shown >= _PLAIN_SECONDS:
                self._show(self._line, now)

    def wait(self, patience: float) -> None:
        """Shows how long nothing has been told, if that is long and a stage is under way."""
        with self._lock:
            now = time.monotonic()
            if self._done < self._total and now - max(self._told, 0 if self._live else self._shown) >= patience:
                self._show(f"{self._line}  (for {duration(now - self._told)})", now)

    def _show(self, line: str, now: float) -> None:
        self._shown = now
        if not self._live:
            self.console.print(line, markup=False)
            return
        self.console.file.write("\r\x1b[2K" + line[: max(20, self.console.width - 1)])
        self.console.file.flush()
        self._line_open = True
        if self._done >= self._total:
            self._close_line()

    def _left(self, share: float, now: float) -> str:
        worked, taken = share - self._first, now - self._begun
        if worked <= 0 or share >= 1:
            return ""
        left = taken / worked * (1 - share) if self._expected is None else self._expected.left(taken)
        return f"  {duration(left)} left"

    def _close_line(self) -> None:
        if self._line_open:
            self.console.file.write("\n")
            self._line_open = False


def _keep_waiting(reporter: weakref.ref[ConsoleReporter], patience: float) -> None:
    while (alive := reporter()) is not None:
        alive.wait(patience)
        del alive
        time.sleep(min(1.0, patience / 3))


def _bar(share: float) -> str:
    """A bar of ten parts, and the share in percent.

    Example:
        >>> _bar(0.25)
        '██▌        25 %'
    """
    eighths = " ▏▎▍▌▋▊▉"
    whole, part = divmod(round(80 * share), 8)
    return f"{('█' * whole + eighths[part] * (whole < 10)).ljust(10)} {int(100 * share)} %"


def printable(text: str) -> str:
    """The text with control characters spelled out, so that a name from a file cannot control the terminal.

    Example:
        >>> print(printable("grey\\x1b[2J"))
        grey\\x1b[2J
    """
    return "".join(letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text)


def from_home(path: str) -> str:
    """A path with `~` for the user's home folder, so that what is stored does not name the user.

    Example:
        >>> from_home(f"{Path.home()}/photos"), from_home("photos/*.parquet")
        ('~/photos', 'photos/*.parquet')
    """
    home = str(Path.home())
    return f"~{path[len(home) :]}" if path == home or path.startswith(f"{home}/") else path


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
