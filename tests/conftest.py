"""Shared by all tests: one thread, no network, nothing left behind, and a tiny real data set."""

from __future__ import annotations

import os
import re
import signal
import tempfile

import pytest
import torch
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

from dstill.data.real import RealSet, Split
from dstill.evaluation import protocols
from dstill.planning.clock import Clock

torch.set_num_threads(1)

# A shell starts commands in the background with Ctrl-C ignored, and whatever a test starts would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Hugging Face `datasets` reads these when it is first imported, which dstill does inside functions. The folder is
# removed when the interpreter exits.
_SCRATCH = tempfile.TemporaryDirectory(prefix="dstill-tests-")
os.environ["HF_HOME"] = _SCRATCH.name
os.environ["HF_HUB_OFFLINE"] = "1"

set_hypothesis_home_dir(_SCRATCH.name)
settings.register_profile("dstill", deadline=None, database=None, derandomize=True, max_examples=50)
settings.load_profile("dstill")

CLASSES = ("stripes", "columns", "checks")


def _split(per_class: int, seed: int) -> Split:
    """Each class has its own pattern and colour, with noise that leaves the classes easy to distinguish."""
    generator = torch.Generator().manual_seed(seed)
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    patterns = torch.stack([row % 2, column % 2, (row + column) % 2])
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200]])
    clean = patterns[:, None] * colours[:, :, None, None] // 2 + colours[:, :, None, None] // 2
    labels = torch.arange(len(CLASSES)).repeat(per_class)
    noise = torch.randint(-25, 26, (len(labels), 3, 8, 8), generator=generator)
    return Split((clean[labels] + noise).clamp(0, 255).to(torch.uint8), labels)


@pytest.fixture(scope="session")
def tiny_real() -> RealSet:
    """Three classes of 8x8 colour images, 20 training and 10 test images each."""
    return RealSet("tiny", _split(20, 0), _split(10, 1), CLASSES)


@pytest.fixture
def short_protocols(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocols with a dozen passes, for tests in this process that need an evaluation and not its accuracy."""
    folder = tmp_path_factory.mktemp("protocols")
    for path in protocols._FOLDER.glob("*.yaml"):
        shortened, times = re.subn(r"(?m)^passes: \d+$", "passes: 12", path.read_text(encoding="utf-8"))
        assert times == 1
        (folder / path.name).write_text(shortened, encoding="utf-8")
    monkeypatch.setattr(protocols, "_FOLDER", folder)


@pytest.fixture
def no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans whose times mean nothing: measuring how fast this machine is takes seconds for every kind of run."""
    monkeypatch.setattr(Clock, "_time", lambda *_: 1e-3)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a process takes three seconds; `tests/api/test_compare.py` tests that part."""
    monkeypatch.setattr("dstill.api.apart.apart", lambda work, item, progress: work(item, lambda told: progress(item, told)))
