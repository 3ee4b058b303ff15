"""RAM, AWM and ADRPO against closed forms: the fixed points of their own gradients among affine fields, and their loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from perfect_fit import BASE, CPU, Affine, after, bowl, first_gradient, fitted_round, slope
from scipy.optimize import brentq
from scipy.special import lambertw
from tiny import iterate
from torch import Tensor, nn

import tiltflow
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.methods.adrpo import Adrpo
from tiltflow.methods.awm import Awm
from tiltflow.methods.ram import Ram
from tiltflow.methods.regressions.drawn_samples import Rounds
from tiltflow.problems.two_modes import TwoModes
from tiltflow.streams import stream

SEVERAL: tuple[Any, ...] = (Ram, Awm, Adrpo)


def test_a_linear_reward_is_tilted_exactly_by_a_round_of_adrpo() -> None:
    """N(0, 1) exp(x / 2) is N(1/2, 1)."""
    mean, variance = after(Adrpo(beta=2.0, neighbours=64), slope, 1)
    assert (mean, variance) == (pytest.approx(0.5, abs=0.015), pytest.approx(1, abs=0.03))


def round_of_ram(mean: float, variance: float, beta: float) -> tuple[float, float]:
    """Mean and variance after a round of RAM under x, from N(mean, variance), on its way from N(0, 1), by quadrature. With
    d = v_base - v + C (u - v), v = gamma x + a + b x, E[d] = 0 and E[d x_t] = 0 are linear in a and b."""
    z = np.linspace(-9, 9, 4001)
    x, density = mean + math.sqrt(variance) * z, np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    c = np.maximum((x - mean) / beta, -0.9) * density
    c0, c1, c2 = c.sum(), float(c @ x), float(c @ x**2)
    nodes, lengths = np.polynomial.legendre.leggauss(128)
    t, lengths = (nodes + 1) / 2, lengths / 2
    v = t**2 + (1 - t) ** 2
    gamma, cxx = (2 * t - 1) / v, t**2 * c2 + (1 - t) ** 2 * c0
    of_x = t * (mean + c1)
    matrix = np.array([[np.full_like(t, 1 + c0), of_x], [of_x, t**2 * (variance + mean**2) + (1 - t) ** 2 + cxx]])
    right = np.array([c1 - gamma * t * c1, t * c2 - (1 - t) * c0 - gamma * cxx])
    a, b = np.linalg.solve(matrix.transpose(2, 0, 1), right.T[..., None])[..., 0].T
    left = lengths @ b - (np.cumsum(lengths * b) - lengths * b / 2)  # the integral of b from t on
    return float(lengths @ (a * np.exp(left) / np.sqrt(v))), math.exp(2 * float(lengths @ b))


def test_rounds_of_ram_under_a_linear_reward() -> None:
    """Advantages below -.9 are clipped, and rounds overshoot: (.479, .810), (.386, 1.064), (.512, .984), .. (.495, 1.046)."""
    tuned, state, expected = Affine(), Rounds(CPU), (0.0, 1.0)
    for i in range(3):
        fitted_round(Ram(beta=2.0, neighbours=64), tuned, slope, state, i)
        expected = round_of_ram(*expected, beta=2.0)
        assert tuned.law == pytest.approx(expected, abs=0.025)
    for _ in range(40):
        expected = round_of_ram(*expected, beta=2.0)
    assert expected == pytest.approx((0.495, 1.046), abs=1e-3)


def settled_variance(coefficient: Callable[[np.ndarray, float], np.ndarray], residual: str) -> float:
    """The fixed point among affine fields of v = v_base + E[C (u - v_residual)]: with c_k = E[C x_1^k], V = t^2 S + (1 - t)^2,
    E[C u x] = t c_2 - (1 - t) c_0 and E[C x^2] = t^2 c_2 + (1 - t)^2 c_0, S = exp(2 int gamma)."""
    nodes, lengths = np.polynomial.legendre.leggauss(64)
    t, z = (nodes + 1) / 2, np.linspace(-9, 9, 4001)
    density = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()

    def excess(variance: float) -> float:
        c = coefficient(math.sqrt(variance) * z, variance) * density
        c0, c2 = c.sum(), float(c @ z**2) * variance
        gamma_base, v = (2 * t - 1) / (t**2 + (1 - t) ** 2), t**2 * variance + (1 - t) ** 2
        pull, weight = t * c2 - (1 - t) * c0, t**2 * c2 + (1 - t) ** 2 * c0
        gamma = (
            (gamma_base * v + pull) / (v + weight) if residual == "network" else gamma_base + (pull - gamma_base * weight) / v
        )
        return math.exp(float(gamma @ lengths)) - variance  # lengths sum to 2

    return float(brentq(excess, 0.05, 0.99999))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "residual"), [(Ram, "network"), (Awm, "network"), (Adrpo, "base")])
def test_linear_advantages_settle_short_of_the_tilt(method: Any, residual: str) -> None:
    """Not at 1/2: and their own fixed point is that of the quadrature, with the clip that keeps the regression convex."""

    def coefficient(x: np.ndarray, variance: float) -> np.ndarray:
        c = (variance - x**2) / 2
        return np.maximum(c, -0.9) if residual == "network" else c

    expected = settled_variance(coefficient, residual)
    assert expected > 0.53
    tuned, state, found = Affine(), Rounds(CPU), []
    for i in range(20):
        fitted_round(method(num_inference_steps=20), tuned, bowl, state, i)
        found.append(tuned.law[1])
    # rounds overshoot by turns, less and less; then each has the noise of its own samples
    assert np.mean(found[-12:]) == pytest.approx(expected, abs=0.005)  # over seeds its deviation is .001


def test_the_covariance_form_would_settle_at_lamberts_function() -> None:
    """A check of the quadrature above: with E[u | x_t] for a residual the fixed point is W(1) = .567143."""
    variance = lambertw(1).real
    t = np.linspace(0, 1, 20001)
    v = t**2 * variance + (1 - t) ** 2
    gamma = (2 * t - 1) / (t**2 + (1 - t) ** 2) - t * variance**2 * (1 - t) / v**2
    assert math.exp(2 * np.trapezoid(gamma, t)) == pytest.approx(variance, abs=1e-6)
    small = settled_variance(lambda x, s: 1e-3 * (s - x**2) / 2, "base")
    assert 1 - small == pytest.approx(1e-3, rel=5e-3)  # they agree to first order


@pytest.mark.parametrize("method", SEVERAL)
def test_the_gradient_is_that_of_the_published_loss(method: Any) -> None:
    """A |v - u|^2 + beta |v - v_base|^2, over beta; of ADRPO the second has the weight beta - A. By the sample's own sum over
    many noises, of a linear network: a weight w for x and one for t."""
    beta, tuned = 2.0, Affine()
    tuned.offset.data += 0.3
    tuned.slope.data += 0.5
    settings = {"beta": beta, "solver": "euler", "num_inference_steps": 5, "regression_batch_size": 100_000}
    x = torch.randn(64, 1, generator=stream(0, "x")) * 0.3
    steps = iterate(
        method(**settings), Flow(tuned), Flow(BASE), slope, x, stream(0), Rounds(CPU), parameters=(tuned.offset, tuned.slope)
    )
    next(iter(steps))
    found = torch.stack([p.grad.sum() for p in (tuned.offset, tuned.slope)])  # type: ignore[union-attr]
    tuned.zero_grad()
    x1 = sampled(tuned, x)
    a = slope(x1) - slope(x1).mean()
    assert float(a.min()) > -0.9 * beta  # nothing is clipped
    t = torch.rand(100_000, generator=stream(1))
    which, x0 = torch.arange(100_000) % 64, torch.randn(100_000, 1, generator=stream(2))
    xt, u = t[:, None] * x1[which] + (1 - t[:, None]) * x0, x1[which] - x0
    v, base, some = tuned(xt, t), BASE(xt, t), a[which]
    price = beta - some if method is Adrpo else torch.full_like(some, beta)
    loss = (some * (v - u).square()[:, 0] + price * (v - base).square()[:, 0]).mean() / beta
    loss.backward()
    expected = torch.stack([p.grad.sum() for p in (tuned.offset, tuned.slope)])  # type: ignore[union-attr]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # over seeds .006
    assert expected.abs().max() > 0.2


def sampled(tuned: Any, x: Tensor) -> Tensor:
    """Euler's method in 5 steps."""
    with torch.no_grad():
        for k in range(5):
            x = x + tuned(x, torch.full((len(x),), k / 5)) / 5
    return x


@pytest.mark.parametrize("method", SEVERAL)
def test_a_constant_reward_teaches_nothing_sample_by_sample(method: Any) -> None:
    one = method(num_inference_steps=5)
    assert (first_gradient(one, lambda x: torch.full((len(x),), 0.3)) == 0).all()
    assert not (first_gradient(one, slope) == 0).all()


@pytest.mark.parametrize("method", SEVERAL)
def test_the_offset_of_the_reward_does_not_matter(method: Any) -> None:
    one, other = (first_gradient(method(num_inference_steps=5), lambda x, c=c: x[:, 0].double() + c) for c in (0.0, 1000.0))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_largest_weight_of_linear_advantages() -> None:
    """1 + (mean r - r(0)) / beta, at the middle of the bowl; E x^2 / 2 = 1/2."""
    levels = (torch.arange(401) + 0.5).double() / 401
    x = torch.special.ndtri(levels).float()[:, None]
    steps = iterate(Ram(beta=4.0), Flow(Affine()), Flow(BASE), bowl, x, stream(0), Rounds(CPU))
    assert next(steps)["largest_weight"] == pytest.approx(1 + 0.5 / 4, abs=0.005)


@pytest.mark.parametrize(
    ("method", "reward"), [(Ram, 0.27944), pytest.param(Awm, 0.27944, marks=pytest.mark.slow), (Adrpo, 0.27591)]
)
def test_the_law_at_which_rounds_around_the_base_settle(method: Any, reward: float) -> None:
    """On two modes under tanh x, at beta = 2.5: see test_forward_process.py."""
    problem, target = TwoModes(), method(beta=2.5).target(100)
    assert target.law(problem.law(), problem.reward_at).expectation(np.tanh) == pytest.approx(reward, abs=2e-5)
    assert (target.reaches, target.temperature) == ("first-order", 2.5)
    said = "in the first round alone" if method is Adrpo else "Advantages below -0.9 beta are clipped"
    assert said in target.caveats[0]


def test_published_settings_and_refusals() -> None:
    assert (Ram().num_passes, Awm().num_inference_steps, Awm().optimizer_defaults) == (8, 14, {"learning_rate": 3e-4})
    x = torch.linspace(-1, 1, 8)[:, None]
    with pytest.raises(InputError, match="the reward is 2 for all 8 samples: there is nothing to learn from it"):
        next(iterate(Ram(), Flow(Affine()), Flow(BASE), lambda x: torch.full((len(x),), 2.0), x, stream(0), Rounds(CPU)))
    assert "a single one has no other" in str(Ram().learns_nothing(1))


class Corrected(nn.Module):
    """The velocity of N(0, 1), and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1))
        nn.init.zeros_(self.body[2].weight)
        nn.init.zeros_(self.body[2].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = t[:, None].to(x)
        out: Tensor = (2 * time - 1) / (time**2 + (1 - time) ** 2) * x + self.body(torch.cat([x, time], 1))
        return out


def test_awm_trains_near_a_weak_tilt() -> None:
    """N(0, 1) exp(x / 4) is N(1/4, 1); by its own rounds with a network."""
    method = Awm(beta=4.0, num_passes=8, neighbours=64, regression_batch_size=512, num_inference_steps=10)
    training = tiltflow.Training(max_train_steps=320, train_batch_size=1024, ema_decay=0.97)
    optimizer = tiltflow.Optimizer(learning_rate=5e-3)
    tuned = tiltflow.tune(tiltflow.Model(Flow(Corrected()), (1,)), slope, method, training, optimizer=optimizer)
    x = tuned.sample(8000, sampling=tiltflow.Sampling(solver="heun", num_inference_steps=10))
    assert x.mean().item() == pytest.approx(0.25, abs=0.04)
    assert x.var().item() == pytest.approx(1, abs=0.06)
