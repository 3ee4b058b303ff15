"""The benchmark of speed: it counts every network call, and sees a method that got slower."""

from __future__ import annotations

import importlib
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tiltflow.networks.unet import Unet
from tiltflow.plugins import names

SMALL = Unet(channels=(8, 8), blocks=(1, 1))


@pytest.fixture(scope="module")
def speed() -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("speed")
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("method", names("methods"))
def test_the_calls_that_are_counted_are_those_that_the_training_loop_counts(speed: ModuleType, method: str) -> None:
    iterate = speed.Iterations(SMALL, speed.settings_of(method, steps=4), batch=8, side=8)
    iterate()
    before = iterate.record.network_evaluations
    calls: Counter[tuple[str, torch.nn.Module, int]] = iterate.count()
    own = (iterate.tuned.network, iterate.base.network)  # not a critic
    counted = sum(size * n for (_, network, size), n in calls.items() if network in own)
    assert counted == iterate.record.network_evaluations - before > 0


def test_a_method_that_takes_a_fifth_more_is_seen(speed: ModuleType) -> None:
    stored = {"fast": 10.0, "draft": 20.0, "gone": 5.0}
    assert speed.slower(stored, {"fast": 11.9, "draft": 19.0, "new": 99.0}) == []
    assert [line.split(":")[0] for line in speed.slower(stored, {"fast": 12.1, "draft": 20.0})] == ["fast"]


def test_the_turns_of_a_slow_and_a_fast_function(speed: ModuleType) -> None:
    def spin(seconds: float) -> None:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass

    slow, fast = speed.in_turn((lambda: spin(0.03), lambda: spin(0.02)), 4)
    assert speed.ratio(slow, fast)["ratio"] == pytest.approx(1.5, abs=0.1)
