"""What all tests share: one thread, no network, float64 on request, a generator of one's own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tiltflow.streams import stream

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported: nothing is asked of the hub
torch.set_num_threads(1)  # the problems are small: threads cost more than they bring
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # in the background of a shell it is ignored, here and in all processes that tests start: their Ctrl-C would be lost
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def plain_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves of reports without matplotlib's search for the best margins, which takes longer than many a run of a test; the
    tests of the report itself have it."""
    if request.path.stem != "test_report":
        monkeypatch.setattr("tiltflow.reports.plots.LAYOUT", None)


@pytest.fixture(autouse=True)
def few_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trajectories of 50 steps for the path KL of a pipeline instead of 32, which are most of the time of a run of three
    updates."""
    monkeypatch.setattr("tiltflow.runs.evaluate.PATHS_OF_PROMPTS", 2)


@pytest.fixture(autouse=True)
def no_wait_for_the_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are not flushed onto the disk, which takes milliseconds each, thousands of times: no test cuts the power. The tests
    of what is on the disk when have the real thing."""
    if request.path.stem not in ("test_checkpoint", "test_survival"):
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def parted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run whose tuned weights are far from those of its base; whoever changes it copies it first."""
    from parted import parted  # where it is needed: this file is read before every test

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tiltflow.reports.plots.LAYOUT", None)
        return parted(tmp_path_factory.mktemp("parted"))


@pytest.fixture
def double() -> Iterator[None]:
    """float64 by default, so that rounding stays far below every tolerance."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator seeded by the name of the test."""
    return stream(0, request.node.name)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the evaluation out."""
    monkeypatch.setattr("tiltflow.runs.run.evaluate", lambda *arguments, **options: {"iterations": 0})
