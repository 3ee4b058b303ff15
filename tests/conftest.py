"""What all tests share: one thread, no network, float64 on request, a generator of one's own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tiltflow.streams import stream

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported: nothing is asked of the hub
torch.set_num_threads(1)  # the problems are small: threads cost more than they bring


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
