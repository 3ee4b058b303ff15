"""Networks that learn two modes under tanh x by two methods: each reaches its own law."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tiltflow.laws.forward_process import explicit_rounds
from tiltflow.laws.law import Law
from tiltflow.problems.two_modes import TwoModes
from tiltflow.problems.verification.verify import read_verification, verify

BASE = TwoModes().law()
RUN = ["seed=0", "train_batch_size=8192", "regression_batch_size=1024", "neighbours=256", "num_inference_steps=15"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "law", "overrides"),
    [
        ("implicit", BASE.tilt(np.tanh(BASE.points)), ["num_passes=200"]),
        ("explicit", None, ["num_passes=400", "target_effective_sample_size=0"]),
    ],
)
def test_a_network_reaches_the_law_of_its_method(preset: str, law: Law | None, overrides: list[str]) -> None:
    """Two rounds and one. Mean reward .617 and .618, P(x > 0) .848 and .837: the laws differ in the variance, 1.39 and 1.62."""
    law = law or explicit_rounds(BASE, np.tanh, 1.0, 1)
    given = [*RUN, f"preset={preset}", "learning_rate=0.005", "iterations=400", *overrides]
    found: dict[str, Any] = verify(read_verification("two-modes", "tilt-matching", given)).values["reached"]
    assert found["reward"] == pytest.approx(law.expectation(np.tanh), abs=0.03)
    assert found["positive"] == pytest.approx(law.positive, abs=0.02)
    assert found["variance"] == pytest.approx(law.variance, abs=0.08)
