"""A protocol of a few passes, for tests that need an evaluation and not its accuracy."""

from __future__ import annotations

from pathlib import Path

SHORT = str(Path(__file__).with_name("short.yaml"))
