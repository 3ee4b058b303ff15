"""Problems with known answers, against known digits, quadrature, finite differences and the equations they solve."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.testing import assert_close

from tiltflow.errors import SettingsError
from tiltflow.laws.gaussian_mixture import (
    CorrectedVelocity,
    ExactVelocity,
    GaussianMixture,
    QuadraticReward,
    lean_propagator,
    mixture,
    optimal_control,
    span_of_tilt,
)
from tiltflow.problems.gaussian import Gaussian
from tiltflow.problems.mixture import Mixture
from tiltflow.problems.verification.quadratic_tilt import QuadraticTilt
from tiltflow.problems.verification.tuned_mixture import TunedMixture
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")


def standard() -> tuple[GaussianMixture, QuadraticReward]:
    """N(0.7, 0.25) under 1.7 x - 3 x^2 / 2."""
    problem = Gaussian(dimension=1, mean=0.7, scale=0.5, linear=1.7, quadratic=3.0)
    return problem.base(), problem.reward()


def fixture_2d() -> tuple[GaussianMixture, QuadraticReward]:
    base = GaussianMixture(torch.tensor([0.6, 0.4]).log(), torch.tensor([[-1.5, 0.0], [1.5, 0.5]]), torch.tensor([0.15, 0.3]))
    return base, QuadraticReward(torch.tensor([0.8, -0.5]), 0.7)


def fixture_1d() -> tuple[GaussianMixture, QuadraticReward]:
    base = GaussianMixture(
        torch.tensor([0.3, 0.5, 0.2]).log(), torch.tensor([[-2.0], [0.5], [2.5]]), torch.tensor([0.04, 0.09, 0.01])
    )
    return base, QuadraticReward(torch.tensor([0.8]), 0.7)


def density(law: GaussianMixture, x: Tensor) -> Tensor:
    """At points [n, dimension]."""
    squares = (x[:, None] - law.means).square().sum(2)
    normal = torch.exp(-squares / (2 * law.variances)) / (2 * math.pi * law.variances) ** (x.shape[1] / 2)
    return normal @ law.log_weights.exp()


def grid(dimension: int) -> tuple[Tensor, float]:
    """Points [n, dimension] and the volume of each. The trapezoidal rule on a Gaussian is exact to rounding."""
    axis = torch.linspace(-8, 8, 1601 if dimension == 1 else 401)
    points = axis[:, None] if dimension == 1 else torch.cartesian_prod(axis, axis)
    return points, (axis[1] - axis[0]).item() ** dimension


# ---- the reward and its tilt ----


def test_reward_is_linear_minus_half_the_square() -> None:
    reward = QuadraticReward(torch.tensor([2.0, -1.0]), 3.0)
    assert reward(torch.tensor([[1.0, 2.0], [0.0, 0.0]])).tolist() == [2 - 2 - 1.5 * 5, 0]


@pytest.mark.parametrize("make", [standard, fixture_1d, fixture_2d])
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_tilt_is_the_density_times_exp_reward(make: Callable[[], tuple[GaussianMixture, QuadraticReward]], beta: float) -> None:
    """Everywhere, by quadrature of the normalisation; and with it the partition function and expectations."""
    base, reward = make()
    points, volume = grid(base.means.shape[1])
    weight = density(base, points) * torch.exp(reward(points) / beta)
    partition = weight.sum() * volume
    target = base.tilt(reward, beta)
    assert_close(density(target, points), weight / partition, rtol=1e-9, atol=1e-12)
    assert base.log_partition(reward, beta) == pytest.approx(math.log(partition), abs=1e-10)
    for law in (base, target):
        mass = density(law, points) * volume
        assert_close(law.mean, mass @ points, rtol=0, atol=1e-10)
        assert law.expectation(reward) == pytest.approx((mass @ reward(points)).item(), abs=1e-9)
    assert_close(target.log_weights.exp().sum(), torch.ones(()))


def test_standard_problem_has_its_known_tilt() -> None:
    base, reward = standard()
    target = base.tilt(reward, 1.0)
    assert (target.mean.item(), target.variances.item()) == pytest.approx((0.642857, 0.142857), abs=5e-7)
    assert target.expectation(reward) == pytest.approx(0.258673, abs=5e-7)
    assert base.log_partition(reward, 1.0) == pytest.approx(0.186621, abs=5e-7)
    # KL(p* | p) = E* r - log E exp r
    assert target.expectation(reward) - base.log_partition(reward, 1.0) == pytest.approx(0.072053, abs=1e-6)


def test_2d_fixture_has_its_known_tilt() -> None:
    base, reward = fixture_2d()
    target = base.tilt(reward, 1.0)
    assert target.log_weights.exp().tolist() == pytest.approx([0.1956, 0.8044], abs=5e-5)
    assert target.means.flatten().tolist() == pytest.approx([-1.2489, -0.0679, 1.4380, 0.2893], abs=5e-5)
    assert target.variances.tolist() == pytest.approx([0.1357, 0.2479], abs=5e-5)
    assert target.mean.tolist() == pytest.approx([0.9126, 0.2194], abs=5e-5)
    assert base.log_partition(reward, 1.0) == pytest.approx(-0.7170, abs=5e-5)
    right = torch.special.ndtr(target.means[:, 0] / target.variances.sqrt())
    assert (target.log_weights.exp() @ right).item() == pytest.approx(0.8030, abs=5e-5)  # .80295; the reference prints .8029


def test_ring_has_its_known_mean_reward() -> None:
    """Under the default reward x + y / 2, the tilted ring of eight has mean reward 2.0887."""
    problem = Mixture()
    target = problem.base().tilt(problem.reward(), 1.0)
    assert target.expectation(problem.reward()) == pytest.approx(2.0887, abs=5e-5)


def test_beta_and_the_size_of_the_reward_are_one_number() -> None:
    base, reward = fixture_2d()
    once, again = base.tilt(reward, 0.5), base.tilt(QuadraticReward(2 * reward.linear, 2 * reward.quadratic), 1.0)
    for name in ("log_weights", "means", "variances"):
        assert_close(getattr(once, name), getattr(again, name))


# ---- along the path ----


def test_standard_problem_has_its_known_fields() -> None:
    """At x = 1.3, t = 0.3."""
    base, reward = standard()
    target = base.tilt(reward, 1.0)
    x, t = torch.tensor([[1.3]]), torch.tensor(0.3)
    log_responsibility, mean, variance = base.posterior(x, t)
    assert log_responsibility.item() == 0
    digits = {
        -0.629268: base.velocity(x, t),
        -2.126829: base.score(x, t),
        0.859512: mean,
        1.488780: x - t * base.velocity(x, t),  # the noise in x
        -0.803977: target.velocity(x, t),
        -0.161749: optimal_control(base, target, x, t),
        0.146341: lean_propagator(0.25, t),
        0.239024: variance,
        -0.136439: base.value(x, t, reward, 1.0),
    }
    for expected, result in digits.items():
        assert result.item() == pytest.approx(expected, abs=5.1e-7)
    start = base.value(torch.tensor([[-1.0], [2.0]]), torch.tensor(0.0), reward, 1.0)
    assert start.tolist() == pytest.approx([-0.186621] * 2, abs=5.1e-7)  # memoryless: it does not depend on x


@pytest.mark.parametrize(
    ("variance", "digits"),
    [
        (0.25, [0.0138, 0.031, 0.077, 0.146, 0.400, 0.824, 1.059]),
        (1.0, [0.055, 0.122, 0.294, 0.517, 1.000, 1.207, 1.098]),
        (4.0, [0.219, 0.471, 1.000, 1.412, 1.600, 1.366, 1.108]),
        (0.01, [0.001, 0.001, 0.003, 0.006, 0.020, 0.074, 0.497]),
    ],
)
def test_lean_propagator_has_its_known_values(variance: float, digits: list[float]) -> None:
    t = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
    assert lean_propagator(variance, t).tolist() == pytest.approx(digits, abs=5.1e-4)
    assert lean_propagator(variance, torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_posterior_is_bayes_rule_by_quadrature() -> None:
    """p(x_1 | x_t) is proportional to p(x_1) N(x_t; t x_1, (1 - t)^2)."""
    base, _ = fixture_1d()
    points, _ = grid(1)
    x, t = torch.tensor([[-0.4], [0.9]]), torch.tensor([0.3, 0.7])
    log_responsibility, means, variances = base.posterior(x, t)
    for i in range(2):
        likelihood = torch.exp(-((x[i] - t[i] * points[:, 0]) ** 2) / (2 * (1 - t[i]) ** 2))
        for j in range(3):
            part = GaussianMixture(torch.zeros(1), base.means[j : j + 1], base.variances[j : j + 1])
            mass = density(part, points) * likelihood
            mean = (mass @ points[:, 0]) / mass.sum()
            assert_close(means[i, j, 0], mean)
            assert_close(variances[i, j], (mass @ (points[:, 0] - mean) ** 2) / mass.sum())
            whole = density(base, points) * likelihood
            assert_close(log_responsibility[i, j].exp(), base.log_weights[j].exp() * mass.sum() / whole.sum())


@pytest.mark.parametrize("make", [standard, fixture_1d, fixture_2d])
def test_velocity_is_the_posterior_mean_of_data_minus_noise(
    make: Callable[[], tuple[GaussianMixture, QuadraticReward]], generator: torch.Generator
) -> None:
    """x_1 = x + (1 - t) v, and the score is that of the density of x_t and (t v - x) / (1 - t)."""
    base, _ = make()
    dimension = base.means.shape[1]
    x, t = torch.randn(6, dimension, generator=generator), torch.linspace(0, 0.9, 6)
    v = base.velocity(x, t)
    log_responsibility, means, _ = base.posterior(x, t)
    denoised = (log_responsibility.exp()[:, :, None] * means).sum(1)
    assert_close(x + (1 - t[:, None]) * v, denoised)
    assert_close(base.score(x, t), (t[:, None] * v - x) / (1 - t[:, None]))
    for i in range(6):
        at_t = GaussianMixture(base.log_weights, t[i] * base.means, t[i] ** 2 * base.variances + (1 - t[i]) ** 2)
        y = x[i : i + 1].clone().requires_grad_()
        (score,) = torch.autograd.grad(density(at_t, y).log().sum(), y)
        assert_close(base.score(x[i : i + 1], t[i]), score)
        assert_close(base.velocity(x[i : i + 1], t[i]), v[i : i + 1])


def test_velocity_at_the_data_end() -> None:
    """At t = 1 the noise is unknown: v = x - E[x_0] = x."""
    base, _ = fixture_2d()
    x = torch.tensor([[0.3, -2.0], [1.5, 0.5]])
    assert_close(base.velocity(x, torch.tensor(1.0)), x)
    assert base.score(x, torch.tensor(1.0)).isfinite().all()


@pytest.mark.parametrize("make", [standard, fixture_1d, fixture_2d])
@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_optimal_control_is_minus_sigma_times_the_slope_of_the_value(
    make: Callable[[], tuple[GaussianMixture, QuadraticReward]], beta: float, generator: torch.Generator
) -> None:
    """u* = (2 / sigma)(v* - v) from the tilted law, against central differences of V, of error size^2."""
    base, reward = make()
    target, size = base.tilt(reward, beta), 1e-4
    x, t = torch.randn(5, base.means.shape[1], generator=generator), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    slope = torch.zeros_like(x)
    for j in range(x.shape[1]):
        step = torch.zeros_like(x)
        step[:, j] = size
        slope[:, j] = (base.value(x + step, t, reward, beta) - base.value(x - step, t, reward, beta)) / (2 * size)
    sigma = torch.sqrt(2 * (1 - t) / t)[:, None]
    # third derivatives of V are up to 1e3 here, times size^2 / 6
    assert_close(optimal_control(base, target, x, t), -sigma * slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [standard, fixture_1d, fixture_2d])
def test_value_solves_the_hamilton_jacobi_bellman_equation(
    make: Callable[[], tuple[GaussianMixture, QuadraticReward]], generator: torch.Generator
) -> None:
    """V_t + (2 v - x / t) . grad V + (sigma^2 / 2) laplacian V - sigma^2 |grad V|^2 / 2 = 0, with V = -r / beta at the end."""
    base, reward = make()
    beta, dimension = 0.7, base.means.shape[1]
    for time in (0.2, 0.5, 0.8):
        x = torch.randn(1, dimension, generator=generator).requires_grad_()
        t = torch.tensor(time, requires_grad=True)
        value = base.value(x, t, reward, beta).sum()
        slope, in_time = torch.autograd.grad(value, (x, t), create_graph=True)
        laplacian = sum(torch.autograd.grad(slope[0, j], x, retain_graph=True)[0][0, j] for j in range(dimension))
        drift, variance = 2 * base.velocity(x, t) - x / t, 2 * (1 - t) / t
        rest = in_time + (drift * slope).sum() + variance / 2 * (laplacian - slope.square().sum())
        assert abs(rest.item()) < 1e-9 * max(1, abs(in_time.item()))
    x = torch.randn(4, dimension, generator=generator)
    assert_close(base.value(x, torch.tensor(1.0), reward, beta), -reward(x) / beta)


# ---- samples and networks ----


def test_samples_follow_the_mixture(generator: torch.Generator) -> None:
    base, _ = fixture_2d()
    n = 20_000
    x = base.sample(n, generator)
    assert (x.shape, x.dtype) == ((n, 2), torch.float64)
    # exact moments by quadrature
    points, volume = grid(2)
    mass = density(base, points) * volume
    features = [lambda x: x[:, 0], lambda x: x[:, 1], lambda x: x[:, 0] ** 2, lambda x: x[:, 1] ** 2, lambda x: x.prod(1)]
    features += [lambda x: torch.tanh(2 * x[:, 0]), lambda x: x[:, 0] ** 3]
    for f in features:
        mean = mass @ f(points)
        variance = mass @ (f(points) - mean) ** 2
        assert abs(f(x).mean() - mean) < 4 * (variance / n) ** 0.5


def test_a_float32_state_gives_float32_fields() -> None:
    base, _ = fixture_2d()
    x, t = torch.zeros(3, 2, dtype=torch.float32), torch.tensor(0.3)
    assert base.velocity(x, t).dtype == base.score(x, t).dtype == torch.float32
    assert_close(base.velocity(x, t).double(), base.velocity(x.double(), t), rtol=1e-5, atol=1e-5)


def test_networks_are_the_exact_velocity_and_the_sum() -> None:
    base, _ = fixture_2d()
    x, t = torch.tensor([[0.5, -0.5], [1.0, 2.0]]), torch.tensor([0.2, 0.6])
    exact = ExactVelocity(base)
    assert torch.equal(exact(x, t), base.velocity(x, t))
    assert list(exact.parameters()) == []

    class Shift(torch.nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return 3 * x + time[:, None]

    assert_close(CorrectedVelocity(exact, Shift())(x, t), base.velocity(x, t) + 3 * x + t[:, None])


def test_a_tuned_mixture_is_the_base_and_then_sees_modes_norm_and_velocity() -> None:
    """Zero at the start; its last layer answers with a vector, a multiple of x and one of the base's velocity; its inputs are
    x, the responsibilities and the norm, those few scaled up to the weight of all inputs."""
    base = mixture(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]), (0.3, 0.7), (0.4, 0.9))
    tuned = TunedMixture(base, hidden=4, layers=1, seed=3)
    x, t = torch.tensor([[0.5, -0.5, 1.0], [1.0, 2.0, 0.0]]), torch.tensor([0.2, 0.6])
    velocity = base.velocity(x, t)
    assert torch.equal(tuned(x, t), velocity)
    tuned.correction.head.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0, 10.0, 100.0]))
    assert_close(tuned(x, t), velocity * 101 + x * 10 + torch.tensor([1.0, 2.0, 3.0]))
    seen = []
    tuned.correction.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tuned(x, t)
    marginal = [base.log_weights[i] + Normal(t[:, None] * base.means[i], total(base, i, t)).log_prob(x).sum(1) for i in (0, 1)]
    responsibilities = torch.stack(marginal, 1).softmax(1)
    norm = 3**0.5 * ((1 + torch.tensor([1.5, 5.0]) / 3) / 2).log()
    assert_close(seen[0], torch.cat([x, 2**0.5 * responsibilities, 2**0.5 * norm[:, None]], 1))


def total(law: GaussianMixture, component: int, t: Tensor) -> Tensor:
    """The standard deviation of x_t in one component [batch, 1]."""
    return (t**2 * law.variances[component] + (1 - t) ** 2).sqrt()[:, None]


# ---- problems by number ----


def test_gaussian_by_number() -> None:
    problem = Gaussian(dimension=3, mean=(1.0, 2.0, 3.0), scale=0.5, linear=0.5, quadratic=2.0)
    base, reward = problem.base(), problem.reward()
    assert base.means.tolist() == [[1, 2, 3]]
    assert base.variances.tolist() == [0.25]
    assert base.log_weights.tolist() == [0]
    assert (reward.linear.tolist(), reward.quadratic) == ([0.5] * 3, 2)


def test_ring_by_number() -> None:
    base = Mixture(dimension=3, modes=4, radius=2.0, scale=0.5, linear=1.0).base()
    expected = torch.tensor([[2.0, 0, 0], [0, 2, 0], [-2, 0, 0], [0, -2, 0]])
    assert_close(base.means, expected)
    assert base.variances.tolist() == [0.25] * 4
    assert_close(base.log_weights.exp(), torch.full((4,), 0.25))


def test_mixture_by_number() -> None:
    """The fixture, with weights of any sum; missing numbers are 0."""
    problem = Mixture(
        means=((-1.5,), (1.5, 0.5)),
        weights=(3.0, 2.0),
        scale=(math.sqrt(0.15), math.sqrt(0.3)),
        linear=(0.8, -0.5),
        quadratic=0.7,
    )
    (base, reward), result = fixture_2d(), problem.base()
    for name in ("log_weights", "means", "variances"):
        assert_close(getattr(result, name), getattr(base, name))
    assert torch.equal(problem.reward().linear, reward.linear)
    assert Mixture(dimension=3).reward().linear.tolist() == [1, 0.5, 0]


@pytest.mark.parametrize(
    ("problem", "settings", "message"),
    [
        (Gaussian, {"dimension": 1, "mean": (1.0, 2.0)}, "mean has 2 numbers, dimension is 1"),
        (Gaussian, {"linear": (1.0, 2.0, 3.0)}, "linear has 3 numbers, dimension is 2"),
        (Gaussian, {"scale": 0.0}, "greater than 0"),
        (Mixture, {"dimension": 1, "linear": 1.0}, "a ring needs dimension 2 or more"),
        (Mixture, {"means": ((1.0, 2.0, 3.0),)}, "a mean has more numbers than dimension 2"),
        (Mixture, {"means": ()}, "at least 1 of them"),
        (Mixture, {"weights": (1.0, 2.0)}, "weights has 2 numbers for 8 modes"),
        (Mixture, {"means": ((1.0,), (2.0,)), "scale": (1.0,)}, "scale has 1 numbers for 2 modes"),
    ],
)
def test_impossible_problems_are_refused(problem: type[QuadraticTilt], settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        problem(**settings)


# ---- where a tilt shows ----


def test_the_span_of_a_tilt_holds_all_that_it_moves() -> None:
    base, reward = fixture_2d()
    turn = torch.linalg.qr(torch.randn(7, 7, generator=stream(1)))[0][:2]  # into a plane of seven dimensions
    lifted, lifted_reward = replace(base, means=base.means @ turn), replace(reward, linear=reward.linear @ turn)
    target = lifted.tilt(lifted_reward, 0.4)
    span = span_of_tilt(lifted, target, lifted_reward)
    assert span.shape == (7, 2)
    assert_close(span.T @ span, torch.eye(2))
    for vectors in (lifted.means, target.means, lifted_reward.linear[None]):
        assert_close(vectors @ span @ span.T, vectors)
    # the law of the coordinates in it: components of the same weights and widths, about the projected means
    inside = target.projected(span)
    assert_close((inside.log_weights, inside.variances), (target.log_weights, target.variances))
    assert_close(inside.means @ span.T, target.means)
    x = target.sample(20_000, stream(2)) @ span
    for function in (
        lambda x: x[:, 0],
        lambda x: x[:, 1],
        lambda x: x.square().sum(1),
        lambda x: torch.tanh(x[:, 0] * x[:, 1]),
    ):
        there, exact = function(x), function(inside.sample(20_000, stream(3)))
        z = (there.mean() - exact.mean()) / ((there.var() + exact.var()) / 20_000) ** 0.5
        assert abs(z) < 4


def test_a_span_of_nothing_is_one_axis() -> None:
    law, reward = GaussianMixture(torch.zeros(1), torch.zeros(1, 4), torch.ones(1)), QuadraticReward(torch.zeros(4), 2.0)
    span = span_of_tilt(law, law.tilt(reward, 1.0), reward)
    assert_close(span.norm(), torch.tensor(1.0))
    assert span.shape == (4, 1)
    assert span_of_tilt(
        law, law, QuadraticReward(torch.tensor([0.0, 3.0, 0.0, 4.0]))
    ).flatten().abs().tolist() == pytest.approx([0, 0.6, 0, 0.8])
