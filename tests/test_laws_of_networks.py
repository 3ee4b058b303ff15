"""Networks that learn two modes under tanh x by three methods: each reaches its own law."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tiltflow.laws.forward_process import explicit_rounds, ram
from tiltflow.laws.law import Law
from tiltflow.laws.other_laws import best_of
from tiltflow.methods.tilt_matching import PRESETS
from tiltflow.problems.two_modes import TwoModes
from tiltflow.problems.verification.verify import read_verification, verify

BASE = TwoModes().law()
RUN = ["seed=0", "train_batch_size=8192", "regression_batch_size=1024", "neighbours=256", "num_inference_steps=15"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "law", "overrides"),
    [
        ("implicit", lambda: BASE.tilt(np.tanh(BASE.points)), ["iterations=400", "num_passes=200"]),
        (
            "explicit",
            lambda: explicit_rounds(BASE, np.tanh, 1.0, 1),
            ["iterations=400", "num_passes=400", "target_effective_sample_size=0"],
        ),
        ("ram", lambda: ram(BASE, np.tanh, 1.0, lowest=-0.9), ["iterations=800", "num_passes=8"]),
        ("raft", lambda: best_of(BASE, np.tanh, 4), ["iterations=400", "num_passes=400"]),
    ],
    ids=["implicit", "explicit", "ram", "raft"],
)
def test_a_network_reaches_the_law_of_its_method(method: str, law: Callable[[], Law], overrides: list[str]) -> None:
    """Two rounds, one, as many as it takes to settle, and one. Mean reward .617, .618, .459 and .814; P(x > 0) .848, .837,
    .766 and .938; variance 1.39, 1.62, 1.81 and .65."""
    own = law()
    preset = [f"preset={method}"] if method in PRESETS else []
    given = [*RUN, *preset, "learning_rate=0.005", *overrides]
    name = "tilt-matching" if preset else method
    found: dict[str, Any] = verify(read_verification("two-modes", name, given)).values["reached"]
    assert found["reward"] == pytest.approx(own.expectation(np.tanh), abs=0.03)
    assert found["positive"] == pytest.approx(own.positive, abs=0.02)
    assert found["variance"] == pytest.approx(own.variance, abs=0.08)
