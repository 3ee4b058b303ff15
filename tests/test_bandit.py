"""A bandit at several observations: its field, its value and its laws a second time, and Adjoint Matching at each of them."""

from __future__ import annotations

import pytest
import torch

from tiltflow.problems.bandit import Arms, Bandit, upper_arm
from tiltflow.problems.verification.at_observations import Value
from tiltflow.problems.verification.verify import read_verification, verify
from tiltflow.streams import stream

LINE = torch.linspace(-6, 6, 20_001, dtype=torch.float64)[:, None]


def test_the_field_is_that_of_the_mixture_at_each_observation() -> None:
    problem = Bandit(arm=0.8)
    x = torch.randn(9, 1, generator=stream(0), dtype=torch.float64)
    for s in (-1.0, 0.4):
        for number in (0.1, 0.7):
            time = torch.full((9,), number, dtype=torch.float64)
            velocity, responsibilities = problem.behaviour(s).velocity_and_responsibilities(x, time)
            found, upper = Arms(0.8, problem.scale).velocity_and_upper(x, time, torch.full((9, 1), s, dtype=torch.float64))
            assert torch.allclose(found, velocity, atol=1e-12)
            assert torch.allclose(upper[:, 0], responsibilities[:, 1], atol=1e-12)


@pytest.mark.parametrize("s", [-1.0, 0.25])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_exact_law_by_quadrature(s: float, beta: float) -> None:
    """p(a | s) exp(Q(s, a) / beta) on a line."""
    problem = Bandit()
    below, above = (torch.exp(-((LINE - m) ** 2) / (2 * problem.scale**2)) for m in (-problem.arm, problem.arm))
    density = below + torch.exp(torch.tensor(-s, dtype=torch.float64)) * above  # behaviour leans to the worse arm
    value = problem.slope * s * LINE - problem.quadratic * LINE**2 / 2
    weights = density * torch.exp(value / beta)
    weights = weights / weights.sum()
    law = problem.behaviour(s).tilt(problem.value(s), beta)
    assert float((weights * value).sum()) == pytest.approx(law.expectation(problem.value(s)), abs=1e-9)
    share = float(weights[LINE > 1e-9].sum() + weights[LINE.abs() < 1e-9].sum() / 2)
    assert share == pytest.approx(upper_arm(law), abs=1e-6)
    seen = torch.full_like(LINE, s)
    assert torch.allclose(Value(problem.slope, problem.quadratic, seen)(LINE), value[:, 0])


def test_observations_come_in_turn_with_their_values() -> None:
    problem = Bandit(observations=(-1.0, 0.5))
    drawn = problem.draw(5, stream(0))
    assert drawn.bind(problem.base_flow()).condition[:, 0].tolist() == [-1, 0.5, -1, 0.5, -1]
    assert isinstance(drawn.reward, Value)
    x = torch.ones(2, 1)
    assert drawn.reward.select(torch.tensor([0, 3]))(x).tolist() == [-1.5 - 0.25, 0.75 - 0.25]


def test_adjoint_matching_moves_toward_the_law_at_each_observation() -> None:
    few = ["iterations=40", "train_batch_size=96", "ema_decay=0.8", "sampling.num_inference_steps=10"]
    found = verify(read_verification("bandit", overrides=[*few, "method.num_inference_steps=10", "num_samples=1000"])).values
    assert [each["observation"] for each in found["per_observation"]] == [-1, 0.25, 1]
    assert all(each["distance"] < 0.75 * each["distance_base"] for each in found["per_observation"])
    assert all(each["distance_of_chain"] < 0.1 for each in found["per_observation"])


@pytest.mark.slow
def test_adjoint_matching_is_near_the_floor_at_each_observation() -> None:
    found = verify(read_verification("bandit")).values
    assert found["worst_distance_over_floor"] < 1.5
