"""The linear-quadratic toy: its field, its value by simulation and its laws by quadrature, and Adjoint Matching on it."""

from __future__ import annotations

import pytest
import torch

from tiltflow.errors import InputError
from tiltflow.problems.linear_quadratic import Feedback, LinearQuadratic
from tiltflow.problems.verification.verify import read_verification, verify
from tiltflow.streams import stream

LINE = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]


def test_the_field_is_that_of_the_gaussian_at_each_state() -> None:
    problem, x = LinearQuadratic(), torch.randn(9, 1, generator=stream(0), dtype=torch.float64)
    for s in (-1.5, 0.3):
        for number in (0.1, 0.7):
            time = torch.full((9,), number, dtype=torch.float64)
            found = Feedback(problem.feedback, problem.scale)(x, time, torch.full_like(x, s))
            assert torch.allclose(found, problem.behaviour(s).velocity_and_responsibilities(x, time)[0], atol=1e-12)


def test_the_value_is_that_of_simulated_returns() -> None:
    """Q(s, a) - Q(s, 0) of an episode from (s, a) on, under the behaviour with the same noise for both: its noise cancels in
    part, and after 120 steps nothing is left to count."""
    problem, n = LinearQuadratic(), 40_000
    noise = torch.randn(120, n, generator=stream(1), dtype=torch.float64)

    def returned(s: float, a: float) -> torch.Tensor:
        state, action, total = torch.full((n,), s, dtype=torch.float64), torch.full((n,), a, dtype=torch.float64), 0.0
        for k in range(len(noise)):
            cost = (problem.state_cost * state**2 + problem.action_cost * action**2) / 2
            total = total - problem.discount**k * cost
            state = problem.drift * state + problem.gain * action
            action = -problem.feedback * state + problem.scale * noise[k]
        return torch.as_tensor(total)

    for s, a in ((1.0, -0.8), (-0.5, 1.2)):
        gain = returned(s, a) - returned(s, 0.0)
        exact = problem.value(s)(torch.tensor([[a]], dtype=torch.float64)).item()
        assert gain.mean().item() == pytest.approx(exact, abs=5 * gain.std().item() / n**0.5 + 1e-4)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_exact_law_by_quadrature(beta: float) -> None:
    problem, s = LinearQuadratic(), -0.7
    density = torch.exp(-((LINE + problem.feedback * s) ** 2) / (2 * problem.scale**2))
    weights = (density[:, 0] * torch.exp(problem.value(s)(LINE) / beta)).double()
    weights = weights / weights.sum()
    law, mean = problem.behaviour(s).tilt(problem.value(s), beta), (weights * LINE[:, 0]).sum()
    assert law.mean.item() == pytest.approx(mean.item(), abs=1e-9)
    variance = (weights * (LINE[:, 0] - mean) ** 2).sum()
    assert law.variances.item() == pytest.approx(variance.item(), abs=1e-9)


def test_a_policy_whose_cost_has_no_end_is_refused() -> None:
    with pytest.raises(InputError, match="the behaviour's state grows faster than its cost is discounted"):
        LinearQuadratic(drift=1.5, feedback=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adjoint-matching", "rwr"])
def test_the_policy_is_near_the_floor_at_each_state(method: str) -> None:
    found = verify(read_verification("linear-quadratic", overrides=[f"method={method}"])).values
    assert found["worst_distance_over_floor"] < 1.5
