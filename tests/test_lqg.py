"""The LQG problem: against known digits, its closed forms at unit variance, and derivatives of its own objective."""

from __future__ import annotations

import math
from itertools import pairwise

import mpmath
import numpy as np
import pytest
import torch

from tiltflow.control.objective import Objective
from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.laws.lqg import Lqg, chain_optimum, evaluate_chain, evaluate_policy, optimum
from tiltflow.plugins import find
from tiltflow.problems.lqg import Lqg as Posed
from tiltflow.problems.verification.policy_gradients import check_gradients
from tiltflow.problems.verification.verify import read_verification, verify
from tiltflow.samplers.rollout import rollout
from tiltflow.streams import stream

UNIT, BETA = Lqg(), 0.5
Q, q, T, K, k = UNIT.Q, UNIT.q, UNIT.T, UNIT.K, UNIT.k


def constant(steps: int, K: float = K, k: float = k) -> tuple[np.ndarray, np.ndarray]:
    return np.full(steps, K), np.full(steps, k)


# ---- continuous time ----


def test_the_tabled_point() -> None:
    exact = evaluate_policy(UNIT, BETA)
    assert exact.objective == pytest.approx(-1.1051919302489641, abs=1e-11)
    assert exact.gradient == pytest.approx((-2.4235285867, 1.4833724342), abs=1e-9)
    assert exact.value(0.0) == pytest.approx([0.4148460018, 0.5087705405, -0.8977689294], abs=1e-9)
    assert exact.value(1.0) == pytest.approx([0.7284947391, 0.6111613915, -0.5612286571], abs=1e-9)
    assert exact.value(T) == pytest.approx([Q, q, 0])


@pytest.mark.parametrize("point", [(0.2, -0.1), (-0.7, 0.9), (0.49, 0.0)])
def test_constant_policies_have_closed_forms(point: tuple[float, float]) -> None:
    """At m = 0, S = 1 the base is stationary and F = K - 1/2 is constant."""
    K, k = point
    exact = evaluate_policy(Lqg(K=K, k=k), BETA)
    for tau in (T, 1.0, 0.3):
        F, ratio = K - 0.5, BETA * K**2 / (2 * (K - 0.5))
        grown = math.exp(F * tau)
        P = Q * grown**2 + ratio * (grown**2 - 1)
        p = q * grown - k * ((Q + ratio) * grown * (grown - 1) / F + (BETA * K - ratio) * (grown - 1) / F)
        assert exact.value(T - tau)[:2] == pytest.approx([P, p], abs=1e-10)
    assert exact.mean == pytest.approx(k * (math.exp(F * T) - 1) / F, abs=1e-11)
    assert exact.variance == pytest.approx(math.exp(2 * F * T) + (math.exp(2 * F * T) - 1) / (2 * F), abs=1e-11)


def test_gradient_of_the_base() -> None:
    exact = evaluate_policy(Lqg(K=0, k=0), BETA)
    assert exact.objective == pytest.approx(-Q / 2, abs=1e-11)
    assert exact.gradient == pytest.approx((-Q * (1 - math.exp(-T)), 2 * q * (1 - math.exp(-T / 2))), abs=1e-11)
    assert exact.gradient == pytest.approx((-1.1240641318, 0.8849687824), abs=1e-9)


@pytest.mark.parametrize(
    ("eta", "objective", "gradient"),
    [(0.5, -1.121647, (-2.547190, 1.276693)), (0.2, -1.267531, (-3.905354, 1.795351))],
)
def test_less_noise(eta: float, objective: float, gradient: tuple[float, float]) -> None:
    exact = evaluate_policy(Lqg(eta=eta), BETA)
    assert exact.objective == pytest.approx(objective, abs=1e-6)
    assert exact.gradient == pytest.approx(gradient, abs=1e-6)


def test_a_policy_of_time_on_another_schedule_is_the_same_in_another_clock() -> None:
    """The noise rate .2 + 2.8 s for 2 units of time: .2 s + 1.4 s^2 has passed at a time s before the data, 6 in all."""
    problem = Lqg(mean=0.8, variance=0.35, T=6)

    def time(tau: float) -> float:
        return 2 - (math.sqrt(0.04 + 5.6 * (6 - tau)) - 0.2) / 2.8

    exact = evaluate_policy(problem, BETA, lambda tau: 0.3 * math.sin(3 * time(tau)) - 0.2, lambda tau: 0.1 + 0.2 * time(tau))
    assert exact.objective == pytest.approx(-0.144207789258, abs=1e-10)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_gradient_is_the_derivative_of_the_objective(eta: float) -> None:
    problem, h = Lqg(mean=0.4, variance=0.6, T=1.3, eta=eta), 1e-4

    def objective(K: float, k: float) -> float:
        return evaluate_policy(problem, BETA, lambda tau: K, lambda tau: k).objective

    exact = evaluate_policy(problem, BETA).gradient
    assert exact[0] == pytest.approx((objective(K + h, k) - objective(K - h, k)) / (2 * h), abs=1e-6)
    assert exact[1] == pytest.approx((objective(K, k + h) - objective(K, k - h)) / (2 * h), abs=1e-6)


def test_the_optimum_of_the_tabled_problem() -> None:
    best = optimum(UNIT, BETA)
    assert best.objective == pytest.approx(-0.1911624249, abs=1e-9)
    assert best.gradient == pytest.approx((0, 0), abs=1e-9)
    assert (best.mean, best.variance) == pytest.approx((0.3726855916, 0.2790315729), abs=1e-9)
    assert best.path_kl == pytest.approx(0.3607807180, abs=1e-9)
    assert UNIT.tilted(BETA) == pytest.approx((0.3888888889, 0.2777777778), abs=1e-9)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_optimum_has_a_closed_form(beta: float) -> None:
    """V* = beta log E[exp(r / beta) | x_tau], Gaussian integrals."""
    problem = Lqg(mean=0.8, variance=0.35, T=3.2)
    best = optimum(problem, beta)
    for tau in (0.0, 1.4, 3.0):
        a, v = problem.marginal(tau)
        A, C = a * problem.variance / v, problem.variance * (1 - a**2) / v
        b, spread = problem.mean - A * a * problem.mean, 1 + C * Q / beta
        for x in (-0.5, 1.2):
            m = A * x + b
            value = -beta / 2 * math.log(spread) + (-Q * m**2 / 2 + q * m + q**2 * C / (2 * beta)) / spread
            P, p, c = best.value(tau)
            assert -P * x**2 / 2 + p * x + c == pytest.approx(value, abs=1e-10)
            slope, intercept = best.policy(tau)
            assert slope * x + intercept == pytest.approx(A * (q - Q * m) / (beta + C * Q), abs=1e-10)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_optimum_is_one_of_the_policies_and_none_is_better(eta: float) -> None:
    problem = Lqg(mean=0.4, variance=0.6, T=1.3, eta=eta)
    best = optimum(problem, BETA)
    same = evaluate_policy(problem, BETA, lambda tau: best.policy(tau)[0], lambda tau: best.policy(tau)[1])
    assert same.objective == pytest.approx(best.objective, abs=1e-10)
    assert same.gradient == pytest.approx((0, 0), abs=1e-10)
    for bump in (0.05, -0.05):
        moved = evaluate_policy(problem, BETA, lambda tau, d=bump: best.policy(tau)[0] + d, lambda tau: best.policy(tau)[1])
        assert moved.objective < best.objective - 1e-5


def test_the_initial_value_bias_shrinks_with_what_is_left_of_the_data() -> None:
    gaps = []
    for horizon in (4.0, 5.0, 6.0):
        problem = Lqg(T=horizon)
        gaps.append(abs(optimum(problem, BETA).mean - problem.tilted(BETA)[0]))
    ratios = [before / after for before, after in pairwise(gaps)]
    assert ratios == pytest.approx([math.e, math.e], rel=0.05)


# ---- the chain ----


@pytest.mark.parametrize(
    ("steps", "objective", "dK", "dk"),
    [
        (5, -1.170981, -2.363067, 1.555415),
        (10, -1.136740, -2.398865, 1.518052),
        (20, -1.120648, -2.412461, 1.500398),
        (50, -1.111300, -2.419390, 1.490109),
        (100, -1.108234, -2.421506, 1.486729),
        (1000, -1.105495, -2.423331, 1.483707),
    ],
)
def test_the_tabled_chains(steps: int, objective: float, dK: float, dk: float) -> None:
    chain = evaluate_chain(UNIT, BETA, *constant(steps))
    assert chain.objective == pytest.approx(objective, abs=1e-6)
    assert chain.gradient == pytest.approx((dK, dk), abs=1e-6)


def test_the_chain_by_hand() -> None:
    """Two steps of N(0, 1) data, moments written out."""
    D, a, b = 1.0, 1 + (K - 0.5), k
    mean1, square1 = b, a**2 + b**2 + D
    mean2, square2 = a * mean1 + b, a**2 * square1 + 2 * a * b * mean1 + b**2 + D
    cost = (K**2 + k**2) + (K**2 * square1 + 2 * K * k * mean1 + k**2)
    chain = evaluate_chain(UNIT, BETA, *constant(2))
    assert chain.objective == pytest.approx(q * mean2 - Q * square2 / 2 - BETA * cost / 2, abs=1e-12)
    assert chain.path_kl == pytest.approx(cost / 2)
    assert (chain.mean, chain.variance) == pytest.approx((mean2, square2 - mean2**2))


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_chain_tends_to_the_continuous_process_at_order_one(eta: float) -> None:
    problem = Lqg(mean=0.4, variance=0.6, T=1.3, eta=eta)
    for solve, exact in (
        (lambda n: evaluate_chain(problem, BETA, *constant(n)), evaluate_policy(problem, BETA)),
        (lambda n: chain_optimum(problem, BETA, n), optimum(problem, BETA)),
    ):
        chains = [solve(n) for n in (1000, 2000)]
        for part in ("objective", "mean", "variance", "path_kl"):
            errors = [getattr(chain, part) - getattr(exact, part) for chain in chains]
            assert errors[0] / errors[1] == pytest.approx(2, rel=0.03), part


def test_gradient_of_the_chain_is_the_derivative_of_its_objective() -> None:
    problem, steps, h = Lqg(mean=0.4, variance=0.6, T=1.3, eta=0.6), 7, 1e-5

    def objective(K: float, k: float) -> float:
        return evaluate_chain(problem, BETA, *constant(steps, K, k)).objective

    exact = evaluate_chain(problem, BETA, *constant(steps)).gradient
    assert exact[0] == pytest.approx((objective(K + h, k) - objective(K - h, k)) / (2 * h), abs=1e-8)
    assert exact[1] == pytest.approx((objective(K, k + h) - objective(K, k - h)) / (2 * h), abs=1e-8)


def test_no_step_of_the_best_chain_can_be_improved() -> None:
    problem, steps = Lqg(mean=0.4, variance=0.6, T=1.3, eta=0.6), 6
    best = chain_optimum(problem, BETA, steps)
    K, k = np.array([best.policy(n) for n in range(steps)]).T
    assert evaluate_chain(problem, BETA, K, k).objective == pytest.approx(best.objective, abs=1e-12)
    for n in range(steps):
        for moved in (K, k):
            for bump in (0.01, -0.01):
                moved[n] += bump
                assert evaluate_chain(problem, BETA, K, k).objective < best.objective
                moved[n] -= bump


def test_greedy_rounds_of_policy_iteration_go_as_known() -> None:
    """Each round is optimal against the value function of the last policy."""
    steps = 2000
    D, (K, k), found = T / steps, constant(steps, 0.0, 0.0), []
    for _ in range(5):
        chain = evaluate_chain(UNIT, BETA, K, k)
        found.append(chain.objective)
        P, p, _ = np.array([chain.value(n + 1) for n in range(steps)]).T
        K, k = -P * (1 - D / 2) / (BETA + P * D), p / (BETA + P * D)
    assert found == pytest.approx([-0.650141, -0.294144, -0.198193, -0.191376, -0.191351], abs=1e-6)


def test_coordinates_add_up() -> None:
    one, three = evaluate_policy(UNIT, BETA), evaluate_policy(Lqg(dimension=3), BETA)
    assert (three.objective, three.path_kl) == pytest.approx((3 * one.objective, 3 * one.path_kl))
    assert three.gradient == pytest.approx([3 * part for part in one.gradient])
    chain, chains = evaluate_chain(UNIT, BETA, *constant(4)), evaluate_chain(Lqg(dimension=3), BETA, *constant(4))
    assert (chains.objective, chains.path_kl) == pytest.approx((3 * chain.objective, 3 * chain.path_kl))
    assert chains.gradient == pytest.approx([3 * part for part in chain.gradient])


# ---- a cost of the state ----

STATES = Lqg(state_cost=1.7)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_value_with_a_cost_of_the_state_has_a_closed_form(beta: float) -> None:
    """At m = 0, S = 1 Riccati's equation has constant coefficients, and (P - P+) / (P - P-) falls exponentially."""
    root = math.sqrt(1 + 4 * STATES.state_cost / beta)
    above, below = beta * (root - 1) / 2, -beta * (root + 1) / 2
    for tau in (0.0, 1.3, T):
        ratio = (Q - above) / (Q - below) * math.exp(-root * (T - tau))
        assert optimum(STATES, beta).value(tau)[0] == pytest.approx((above - below * ratio) / (1 - ratio), abs=1e-10)


def test_the_spans_are_the_steps_of_the_diffusion() -> None:
    """Of the linear path, by the pace at their beginnings: they add up to T, and the error falls as log(N) / N."""
    errors = [STATES.spans(steps).sum() - T for steps in (500, 1000, 2000)]
    assert 0 < errors[2] < 0.004
    assert all(1.7 < before / after < 2 for before, after in pairwise(errors))
    assert STATES.spans(2000)[:1500] == pytest.approx(np.full(1500, T / 2000), rel=0.002)


def test_a_chain_with_a_cost_of_the_state_by_hand_and_in_the_limit() -> None:
    c0, c1 = STATES.spans(2)
    square1 = (0.5 + K) ** 2 + k**2 + 1  # of X_1, from X_0 ~ N(0, 1), in a step of length 1
    without, found = (evaluate_chain(each, BETA, *constant(2)) for each in (UNIT, STATES))
    assert found.objective == pytest.approx(without.objective - STATES.state_cost / 2 * (c0 + c1 * square1), abs=1e-12)
    assert (found.mean, found.variance, found.path_kl) == (without.mean, without.variance, without.path_kl)
    chains = [(evaluate_chain(STATES, BETA, *constant(n)), chain_optimum(STATES, BETA, n)) for n in (500, 1000, 2000)]
    for each, exact in zip(zip(*chains, strict=True), (evaluate_policy(STATES, BETA), optimum(STATES, BETA)), strict=True):
        errors = [abs(chain.objective - exact.objective) for chain in each]
        assert errors[2] < 0.006  # R times that of the spans
        assert all(1.6 < before / after < 2.1 for before, after in pairwise(errors))


def test_no_step_of_the_best_chain_with_a_cost_of_the_state_can_be_improved() -> None:
    problem, steps, bump = Lqg(mean=0.4, variance=0.6, T=1.3, eta=0.6, state_cost=2.0), 5, 0.01
    best = chain_optimum(problem, BETA, steps)
    K, k = np.array([best.policy(n) for n in range(steps)]).T
    assert evaluate_chain(problem, BETA, K, k).objective == pytest.approx(best.objective, abs=1e-12)
    for n in range(steps):
        for sign in (bump, -bump):
            one = sign * np.eye(steps)[n]
            for moved in ((K + one, k), (K, k + one)):
                assert evaluate_chain(problem, BETA, *moved).objective < best.objective
    assert best.variance < chain_optimum(problem.model_copy(update={"state_cost": 0.0}), BETA, steps).variance


def test_the_running_reward_of_a_path_is_the_cost_that_the_chain_knows() -> None:
    """By the program's own objective, along paths of the base, beside the exact expectation."""
    problem, steps = Posed(state_cost=1.7, mean=0.8, variance=0.35, dimension=2, num_inference_steps=6), 6
    flow, generator = problem.base_flow(), stream(0, "paths")
    chain = problem.sampling.chain(flow.noise_time)
    with torch.no_grad():
        path = rollout(chain, flow, problem.draw(20_000, generator), generator)
    gains = Objective(problem.reward(), problem.running_reward()).gains(path.states, chain.times)
    assert gains is not None
    found = mean_estimate(gains.sum(0) + problem.reward()(path.states[-1]))
    exact = evaluate_chain(problem, BETA, *constant(steps, 0.0, 0.0)).objective
    assert abs(found.value - exact) < 4 * found.standard_error
    assert abs(exact - evaluate_chain(UNIT, BETA, *constant(steps, 0.0, 0.0)).objective) > 40 * found.standard_error


def test_policy_gradients_with_a_cost_of_the_state_are_those_of_the_chain() -> None:
    problem, method = Posed(state_cost=1.7, mean=0.5), find("methods", "score-as-action")
    settings = method(beta=BETA, num_inference_steps=5, solver="euler-maruyama")
    for name, row in check_gradients(problem, settings, 4000, seed=1).items():
        if name != "closed-form":  # of the continuous process
            assert max(abs(check.z) for check in row.checks) < 4, name
    free = problem.model_copy(update={"state_cost": 0.0})
    (slope, _), exact = (
        check_gradients(free, settings, 4000, seed=1)["return"].checks,
        evaluate_chain(problem, BETA, *constant(5)),
    )
    assert abs(slope.value - exact.gradient[0]) > 10 * (slope.error or 0)


# ---- a second derivation, to thirty digits ----

POINTS = {
    "strong": "Q=2.7 q=0.2 lambda=0.15 T=3.1 K=0.6 k=0.3 N=23 mean=0 variance=1 eta=1 dimension=1",
    "off-centre": "Q=0.9 q=-0.5 lambda=0.3 T=1.8 K=0.15 k=-0.4 N=12 mean=-1.3 variance=2.2 eta=0.6 dimension=1",
    "little-noise": "Q=1.7 q=0.9 lambda=0.45 T=2 K=-0.4 k=0.2 N=17 mean=0.5 variance=0.6 eta=0.35 dimension=3",
    "plane": "Q=1.3 q=0.7 lambda=0.5 T=2 K=0.5 k=0.1 N=40 mean=0 variance=1 eta=1 dimension=2",
}


class Precise:
    """The problem in mpmath, written from its definition: moments forward for a policy, no value function; quadratics about
    their peak for the best chain; and Gaussian integrals for the best continuous policy, E exp(r / lambda) under the base."""

    def __init__(self, point: str):
        numbers = dict(part.split("=") for part in point.split())
        self.N, self.d = int(numbers.pop("N")), int(numbers.pop("dimension"))
        self.Q, self.q, self.cost, self.T, self.K, self.k, self.m, self.S, self.eta = map(mpmath.mpf, numbers.values())
        self.e, self.D = (1 + self.eta**2) / 2, self.T / self.N

    def base(self, tau: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf]:
        """(F, h) of the drift X / 2 - e (X - a m) / v."""
        a = mpmath.exp((tau - self.T) / 2)
        v = a**2 * self.S + 1 - a**2
        return mpmath.mpf(1) / 2 - self.e / v, self.e * a * self.m / v

    def start(self) -> tuple[mpmath.mpf, mpmath.mpf]:
        a = mpmath.exp(-self.T / 2)
        return a * self.m, a**2 * self.S + 1 - a**2

    def objective(self, K: mpmath.mpf, k: mpmath.mpf) -> mpmath.mpf:
        first, variance = self.start()
        second, paid = first**2 + variance, mpmath.mpf(0)
        for n in range(self.N):
            F, h = self.base(n * self.D)
            u_square = K**2 * second + 2 * K * k * first + k**2
            paid += self.cost / 2 * (self.e / self.eta) ** 2 * u_square * self.D
            A, B = 1 + (F + self.e * K) * self.D, (h + self.e * k) * self.D
            first, second = A * first + B, A**2 * second + 2 * A * B * first + B**2 + self.eta**2 * self.D
        return self.d * (self.q * first - self.Q / 2 * second - paid)

    def gradient(self) -> list[mpmath.mpf]:
        at = (self.K, self.k)
        return [mpmath.diff(self.objective, at, order) for order in ((1, 0), (0, 1))]

    def best_chain(self) -> mpmath.mpf:
        """V = height - P (x - peak)^2 / 2. A step's noise lowers the height; the best shift of its mean, at the price of
        lambda / (2 eta^2 D) a unit squared, adds eta^2 D / lambda to 1 / P; and the base's affine map moves the peak."""
        P, peak, height = self.Q, self.q / self.Q, self.q**2 / (2 * self.Q)
        for n in range(self.N - 1, -1, -1):
            F, h = self.base(n * self.D)
            height -= P * self.eta**2 * self.D / 2
            P = 1 / (1 / P + self.eta**2 * self.D / self.cost)
            A, B = 1 + F * self.D, h * self.D
            P, peak = A**2 * P, (peak - B) / A
        mean, variance = self.start()
        return self.d * (height - P * ((mean - peak) ** 2 + variance) / 2)

    def best_value(self) -> list[mpmath.mpf]:
        """(P, p, c) at tau = 0: X_T given X_0 = x is N(grown x + shift, spread) under the base."""

        def grown(tau: mpmath.mpf) -> mpmath.mpf:  # exp of the integral of F to the end, as d(tau - log v) / dtau = 1 / v
            v = 1 + (self.S - 1) * mpmath.exp(tau - self.T)
            whole = self.T - mpmath.log(self.S) - (tau - mpmath.log(v))
            return mpmath.exp((self.T - tau) / 2 - self.e * whole)

        shift = mpmath.quad(lambda tau: grown(tau) * self.base(tau)[1], [0, self.T / 2, self.T])
        spread = mpmath.quad(lambda tau: (self.eta * grown(tau)) ** 2, [0, self.T / 2, self.T])
        widened, gain = 1 + self.Q * spread / self.cost, grown(mpmath.mpf(0))
        P = gain**2 * self.Q / widened
        p = gain * (self.q - self.Q * shift) / widened
        c = (self.q * shift - self.Q * shift**2 / 2 + self.q**2 * spread / (2 * self.cost)) / widened
        return [P, p, c - self.cost / 2 * mpmath.log(widened)]


@pytest.mark.parametrize("point", POINTS)
def test_what_verify_reports_is_what_mpmath_derives(point: str) -> None:
    overrides = [*POINTS[point].split(), "iterations=1", "trajectories=2", "num_samples=100", "train_batch_size=4", "draws=2"]
    result = verify(read_verification("lqg", "score-as-action", overrides)).values
    with mpmath.workdps(30):
        precise = Precise(POINTS[point])
        assert result["policy"]["gradient_of_chain"] == pytest.approx(list(map(float, precise.gradient())), rel=1e-11)
        assert result["policy"]["objective_of_chain"] == pytest.approx(
            float(precise.objective(precise.K, precise.k)), rel=1e-12
        )
        assert result["objective_exact"] == pytest.approx(float(precise.best_chain()), rel=1e-12)
        assert list(result["optimum"]["value"].values()) == pytest.approx(list(map(float, precise.best_value())), abs=1e-11)
