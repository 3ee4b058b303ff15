"""Adjoint Matching in few steps: exact fixed points on a Gaussian, as its chain samples them and as ODE solvers do.

Of N(0.7, 0.25) under 1.7 x - 1.5 x^2 at beta = 1, whose tilt is N(0.642857, 0.142857). The achieved tilt is the slope, under
the law that is reached, of its log density over that of the untuned sampler on the reward: 1 for a tilt.
"""

from __future__ import annotations

from collections.abc import Callable

import affine
import pytest
import torch
from affine import on_gaussian, riccati
from torch import Tensor

from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.rollout import solve
from tiltflow.samplers.solvers.heun import heun
from tiltflow.samplers.solvers.memoryless import memoryless
from tiltflow.samplers.solvers.memoryless_offset import memoryless_offset

pytestmark = pytest.mark.usefixtures("double")

Law = tuple[Tensor, Tensor]


def jump(times: Tensor) -> Chain:
    return memoryless(times, denoise=False)


def euler(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor) -> list[Tensor]:
    states = [x]
    for t, h in zip(times, times.diff(), strict=False):
        states.append(states[-1] + h * velocity(states[-1], t))
    return states


def by_ode(solver: Callable[..., list[Tensor]], chain: Chain, slope: Tensor, shift: Tensor) -> Law:
    """The law that a solver makes of N(0, 1) with the velocity of the base under the controls w_k = slope_k x + shift_k."""
    at = chain.times[:-1].tolist()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        k = at.index(float(t))
        return affine.velocity(x, t) + (slope[k] * x + shift[k]) / chain.control_scale[k]

    zero, one = (solve(solver, velocity, torch.tensor([[x]]), chain.times)[-1].flatten() for x in (0.0, 1.0))
    return zero[0], (one - zero)[0] ** 2


def achieved_tilt(law: Law, base: Law) -> float:
    """In closed form: log ratio and reward are quadratic, and E (x - m)^3 = 0, E (x - m)^4 = 3 s^2."""
    (m, s), (m_base, s_base) = law, base
    # in powers of y = x - m
    ratio = torch.stack([-(m - m_base) / s_base, (1 / s_base - 1 / s) / 2]) * torch.tensor([-1.0, 1.0])
    reward = torch.stack([affine.LINEAR - affine.QUADRATIC * m, torch.tensor(-affine.QUADRATIC / 2)])
    variances = torch.stack([s, 2 * s**2])
    return float((ratio * reward * variances).sum() / (reward**2 * variances).sum())


def test_the_achieved_tilt_of_a_tilt_is_its_strength() -> None:
    base = torch.tensor(affine.MEAN), torch.tensor(affine.VARIANCE)
    assert achieved_tilt((torch.tensor(affine.TILTED_MEAN), torch.tensor(affine.TILTED_VARIANCE)), base) == pytest.approx(1)
    variance = 1 / (1 / affine.VARIANCE + 0.4 * affine.QUADRATIC)
    weaker = torch.tensor(variance * (affine.MEAN / affine.VARIANCE + 0.4 * affine.LINEAR)), torch.tensor(variance)
    assert achieved_tilt(weaker, base) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("make", "steps", "mean", "variance", "by_chain", "by_euler", "by_heun"),
    [
        (memoryless_offset, 10, 0.6559, 0.1905, 0.765, 1.318, 1.048),
        (memoryless_offset, 20, 0.6506, 0.1657, 0.889, 1.181, 1.016),
        (memoryless_offset, 40, 0.6471, 0.1543, 0.946, 1.095, 1.006),
        (jump, 5, 0.6398, 0.1966, 0.506, 0.820, 0.642),
        (jump, 10, 0.6423, 0.1615, 0.770, 0.965, 0.745),
        (jump, 20, 0.6427, 0.1509, 0.889, 0.990, 0.842),
        (jump, 40, 0.6428, 0.1466, 0.946, 0.997, 0.912),
    ],
)
def test_what_few_steps_reach(
    make: Callable[[Tensor], Chain],
    steps: int,
    mean: float,
    variance: float,
    by_chain: float,
    by_euler: float,
    by_heun: float,
) -> None:
    """By its chain the mean is right and the tilt too weak. Euler's method narrows the law about as much as Gaussian steps
    widen it, so it looks better than Heun's, whose tilt is that of the control itself."""
    chain = make(time_grid(steps))
    base, controls, none = on_gaussian(chain), riccati(on_gaussian(chain)), (torch.zeros(steps), torch.zeros(steps))
    law = base.controlled(*controls).law()
    assert (law[0].item(), law[1].item()) == pytest.approx((mean, variance), abs=5.1e-5)
    assert achieved_tilt(law, base.law()) == pytest.approx(by_chain, abs=5.1e-4)
    for solver, expected in ((euler, by_euler), (heun, by_heun)):
        found = achieved_tilt(by_ode(solver, chain, *controls), by_ode(solver, chain, *none))
        assert found == pytest.approx(expected, abs=5.1e-4)


@pytest.mark.parametrize(("steps", "error"), [(10, 0.230), (20, 0.111), (40, 0.054), (160, 0.013)])
def test_what_is_missing_falls_as_one_over_the_steps(steps: int, error: float) -> None:
    chain = jump(time_grid(steps))
    base = on_gaussian(chain)
    missing = 1 - achieved_tilt(base.controlled(*riccati(base)).law(), base.law())
    assert missing == pytest.approx(error, abs=6e-4)
    assert missing * steps == pytest.approx(2.2, abs=0.11)


def test_a_linear_tilt_is_exact_in_any_number_of_steps() -> None:
    """On a single Gaussian, relative to the chain's own base law."""
    for make in (jump, memoryless):
        for steps in (5, 12):
            base = on_gaussian(make(time_grid(steps)))
            (m_base, s_base), (m, s) = base.law(), base.controlled(*riccati(base, affine.LINEAR, 0.0)).law()
            assert (m - m_base).item() == pytest.approx(affine.LINEAR * s_base.item())
            assert s.item() == pytest.approx(s_base.item())
