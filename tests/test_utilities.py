"""Utilities: their first variations against the change of the functional, by quadrature; closed forms; errors by simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tiltflow.errors import InputError, SettingsError
from tiltflow.laws.law import Array, log_normal
from tiltflow.models.model_folder import load_classifier
from tiltflow.plugins import names
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.utilities import Utility
from tiltflow.utilities.augmented_lagrangian import AugmentedLagrangian
from tiltflow.utilities.cvar import Cvar
from tiltflow.utilities.entropic_risk import EntropicRisk
from tiltflow.utilities.entropy import Entropy
from tiltflow.utilities.estimation.known import Known
from tiltflow.utilities.expected_reward import ExpectedReward
from tiltflow.utilities.kl import Kl
from tiltflow.utilities.log_barrier import LogBarrier
from tiltflow.utilities.mean_variance import MeanVariance
from tiltflow.utilities.mmd import Mmd
from tiltflow.utilities.optimal_design import OptimalDesign
from tiltflow.utilities.renyi import Renyi
from tiltflow.utilities.spread_conditions import SpreadConditions
from tiltflow.utilities.sum import Sum
from tiltflow.utilities.superquantile import Superquantile

# ---- a law p on a grid, a base, and a law q toward which p is moved; all by quadrature ----

GRID = np.linspace(-7, 7, 1401)


def mixture(x: Array, *parts: tuple[float, float, float]) -> Array:
    """The log density of a mixture of (weight, mean, standard deviation)."""
    return np.asarray(np.logaddexp.reduce([math.log(w) + log_normal(x, m, s) for w, m, s in parts]))


LAW = ((0.3, -1.2, 0.8), (0.7, 0.9, 1.1))
LOG_P, LOG_BASE = mixture(GRID, *LAW), log_normal(GRID, 0.0, 1.3)
P, BASE, Q = (np.exp(each) / np.exp(each).sum() for each in (LOG_P, LOG_BASE, log_normal(GRID, 1.4, 0.7)))
CELL = GRID[1] - GRID[0]
POINTS = torch.from_numpy(GRID)[:, None]
REFERENCE = torch.linspace(-1, 2, 30).double()[:, None]


def reward(x: Tensor) -> Tensor:
    return (2 * x[:, 0]).sin() + x[:, 0] / 2


def cost(x: Tensor) -> Tensor:
    return x[:, 0].square() / 4


R, C = (each(POINTS).numpy() for each in (reward, cost))


def score_of(*parts: tuple[float, float, float]) -> Callable[[Tensor], Tensor]:
    def score(x: Tensor) -> Tensor:
        logs = torch.stack([math.log(w / s) - ((x - m) / s) ** 2 / 2 for w, m, s in parts])
        slopes = torch.stack([-(x - m) / s**2 for _, m, s in parts])
        return (logs.softmax(0) * slopes).sum(0)

    return score


def log_ratio(x: Tensor) -> Tensor:
    z = x[:, 0].numpy()
    return torch.from_numpy(mixture(z, *LAW) - log_normal(z, 0.0, 1.3))


def at(masses: Array) -> Known:
    return Known(
        POINTS,
        weights=torch.from_numpy(masses),
        reward={"reward": reward, "cost": cost},
        score=score_of(*LAW),
        base_score=score_of((1.0, 0.0, 1.3)),
        log_ratio=log_ratio,
        reference=REFERENCE,
    )


def tail(p: Array, r: Array, share: float) -> float:
    """The mean of the best share: its own definition, min over t of t + E (r - t)+ / share."""
    return float(min(t + p @ np.maximum(r - t, 0) / share for t in r))


def moments(p: Array) -> Array:
    features = np.stack([GRID, GRID**2 / 3])
    return np.asarray((features * p) @ features.T + 0.1 * np.eye(2))


def features(x: Tensor) -> Tensor:
    return torch.cat([x, x**2 / 3], 1)


DESIGN: dict[str, Any] = {"features": "test_utilities:features", "ridge": 0.1}


def gaussian_kernel(x: Array, y: Array) -> Array:
    return np.asarray(np.exp(-((x[:, None] - y) ** 2) / (2 * 0.7**2)))


def discrepancy(kernel: Callable[[Array, Array], Array]) -> Callable[[Array], float]:
    ours, both = kernel(GRID, GRID), kernel(GRID, REFERENCE[:, 0].numpy()).mean(1)
    return lambda p: float(p @ ours @ p - 2 * p @ both)


def energy_kernel(x: Array, y: Array) -> Array:
    return -abs(x[:, None] - y)


CASES: dict[str, tuple[Utility, Callable[[Array], float]]] = {
    "expected-reward": (ExpectedReward(), lambda p: float(p @ R)),
    "cvar": (Cvar(share=0.2), lambda p: -tail(p, -R, 0.2)),
    "superquantile": (Superquantile(share=0.2), lambda p: tail(p, R, 0.2)),
    "mean-variance": (MeanVariance(aversion=0.7), lambda p: float(p @ R - 0.7 * (p @ R**2 - (p @ R) ** 2))),
    "entropic-risk": (EntropicRisk(risk=-1.5), lambda p: -math.log(p @ np.exp(-1.5 * R)) / 1.5),
    "entropic-risk, seeking": (EntropicRisk(risk=0.8), lambda p: math.log(p @ np.exp(0.8 * R)) / 0.8),
    "log-barrier": (LogBarrier(limit=1.5, strength=0.4), lambda p: float(p @ R) + 0.4 * math.log(1.5 - p @ C)),
    "augmented-lagrangian": (
        AugmentedLagrangian(limit=0.3, price=2.0, multiplier=0.5),
        lambda p: float(p @ R) - (max(0, 0.5 + 2 * (p @ C - 0.3)) ** 2 - 0.5**2) / 4,
    ),
    "augmented-lagrangian, per sample": (
        AugmentedLagrangian(limit=0.3, price=2.0, multiplier=0.5, samples=True),
        lambda p: float(p @ (R - (np.maximum(0, 0.5 + 2 * (C - 0.3)) ** 2 - 0.5**2) / 4)),
    ),
    "optimal-design": (OptimalDesign(**DESIGN), lambda p: float(np.linalg.slogdet(moments(p))[1])),
    "optimal-design, trace": (
        OptimalDesign(criterion="trace", **DESIGN),
        lambda p: -float(np.trace(np.linalg.inv(moments(p)))),
    ),
    "optimal-design, eigenvalue": (
        OptimalDesign(criterion="eigenvalue", **DESIGN),
        lambda p: float(np.linalg.eigvalsh(moments(p))[0]),
    ),
    "entropy": (Entropy(), lambda p: -float(p @ np.log(p / CELL))),
    "kl": (Kl(), lambda p: -float(p @ np.log(p / BASE))),
    "renyi": (Renyi(order=2.5), lambda p: -math.log(p**2.5 @ BASE**-1.5) / 1.5),
    "renyi, order below 1": (Renyi(order=0.4), lambda p: math.log(p**0.4 @ BASE**0.6) / 0.6),
    "mmd": (Mmd(bandwidth=0.7), lambda p: -discrepancy(gaussian_kernel)(p)),
    "mmd, energy": (Mmd(kernel="energy"), lambda p: -discrepancy(energy_kernel)(p)),
}
"""Utilities, and what they are by other code, up to a constant for mmd."""


def slopes(utility: Utility, known: Known) -> tuple[Tensor, Tensor]:
    """The first variation at the points and its gradient."""
    return value_and_gradient(utility.first_variation(known), known.x)


@pytest.mark.parametrize("name", CASES)
def test_the_first_variation_is_the_change_of_the_utility(name: str) -> None:
    """d/de F((1 - e) p + e q) at 0 is E_q[dF] - E_p[dF]: of the values of dF, whose slope is its gradient everywhere but at
    kinks; or of the integral of its gradient, where there is nothing else."""
    utility, functional = CASES[name]
    step = 1e-4
    expected = (functional(P + step * (Q - P)) - functional(P - step * (Q - P))) / (2 * step)
    values, gradient = (each.numpy() for each in slopes(utility, at(P)))
    assert abs(expected) > 0.02
    if utility.first_variation(at(P)).valued:
        misfit = abs(gradient[1:-1, 0] - np.gradient(values, GRID)[1:-1])
        assert np.quantile(misfit, 0.95) < 1e-3 * abs(gradient).max()
    else:
        values = np.concatenate([[0.0], np.cumsum((gradient[1:, 0] + gradient[:-1, 0]) / 2) * CELL])
    tail = name in ("cvar", "superquantile")
    assert (Q - P) @ values == pytest.approx(expected, rel=2e-3 if tail else 1e-4 if name == "entropy" else 1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("entropy", "mmd", "mmd, energy")])
def test_the_value_is_the_utility(name: str) -> None:
    utility, functional = CASES[name]
    # the variance is made unbiased, for samples; the base has 6e-8 of its mass beyond the grid
    assert utility.value(at(P)).value == pytest.approx(functional(P), abs=1e-2 if name == "mean-variance" else 2e-7)


@pytest.mark.parametrize("name", CASES)
def test_a_utility_that_says_so_is_concave(name: str) -> None:
    """On every chord between three laws; and the others are not: the superquantile is concave, the CVaR is not."""
    utility, functional = CASES[name]
    excess = [functional((a + b) / 2) - (functional(a) + functional(b)) / 2 for a, b in itertools.combinations((P, Q, BASE), 2)]
    if utility.concave:
        assert min(excess) > -1e-9
    elif name != "renyi":  # of which neither is true everywhere
        assert max(excess) < 0


def test_every_utility_is_tested_here_or_has_its_own_test() -> None:
    others = {"wasserstein-1", "wasserstein-2", "spread-conditions", "sum", "function"}
    assert {name.split(",")[0] for name in CASES} | others == set(names("utilities"))
    for utility, _ in CASES.values():
        assert utility.words


# ---- tails ----


def normal(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(x: Tensor) -> Tensor:
    return x[:, 0]


def test_tails_of_a_normal_law() -> None:
    """The mean of the best hundredth of N(0, 1) is phi(2.326) / 0.01 = 2.665, and that of the worst -2.665: a share of 0.01 is
    neither 0.99 of the samples nor the other end."""
    known = Known(normal(200_000), reward={"reward": linear})
    for utility, expected in ((Superquantile(share=0.01), 2.6652), (Cvar(share=0.01), -2.6652)):
        found = utility.value(known)
        assert found.value == pytest.approx(expected, abs=4 * found.standard_error)
        assert found.standard_error < 0.02


@pytest.mark.parametrize("count", [100, 400])
def test_the_gradient_of_a_tail_is_that_of_the_reward_over_the_share(count: int) -> None:
    """1 / share in the tail, neither share nor divided by the number of samples, and 0 elsewhere."""
    x = normal(count)
    known = Known(x, reward={"reward": linear})
    order = x[:, 0].argsort()
    for utility, inside in ((Superquantile(share=0.1), order[-count // 10 :]), (Cvar(share=0.1), order[: count // 10])):
        expected = torch.zeros(count).double()
        expected[inside] = 10
        assert torch.equal(slopes(utility, known)[1][:, 0], expected)
        alone = value_and_gradient(utility.first_variation(known), x[inside[:1]])[1]
        assert alone.item() == 10


def test_a_tail_of_less_than_a_sample() -> None:
    known = Known(normal(50), reward={"reward": linear})
    for utility in (Superquantile(share=0.01), Cvar(share=0.01)):
        with pytest.raises(InputError, match=r"tail with share 0\.01 of 50 samples has less than one of them"):
            utility.first_variation(known)
        with pytest.raises(InputError, match="less than one of them"):
            utility.one_shot(known, 1.0)
    for share in (0, 1, 1.5):
        with pytest.raises(SettingsError, match="share must be"):
            Cvar(share=share)


# ---- the best law in one stage ----


def test_one_stage_at_the_best_threshold_does_better_than_one_at_the_base() -> None:
    """On N(0, 1) under r = x: at the threshold of the best law the tilt reaches a higher utility less alpha KL than the tilt by
    the first variation at the base, for both tails."""
    p = np.exp(log_normal(GRID, 0.0, 1.0))
    p /= p.sum()
    known, alpha = Known(POINTS, weights=torch.from_numpy(p), reward={"reward": linear}), 1.0
    for utility in (Superquantile(share=0.1), Cvar(share=0.1)):

        def objective(slope: Callable[[Tensor], Tensor], utility: Utility = utility) -> float:
            tilted = p * np.exp(slope(POINTS).numpy() / alpha)
            tilted /= tilted.sum()
            value = utility.value(replace(known, weights=torch.from_numpy(tilted))).value
            return value - alpha * float(tilted[tilted > 0] @ np.log((tilted / p)[tilted > 0]))

        best = objective(utility.one_shot(known, alpha))
        assert best > objective(utility.first_variation(known)) + 0.01
        # the pseudo-reward is of rewards alone, and so black-box methods can use it
        assert utility.one_shot(known, alpha).black_box


@pytest.mark.parametrize(
    ("criterion", "variance"),
    [("log-determinant", 1.69 * (1 + 2 / 4)), ("trace", 1.69 / 2 * (1 + math.sqrt(1 + 8 / (4 * 1.69))))],
)
def test_one_stage_of_optimal_design_is_the_best_gaussian(criterion: Any, variance: float) -> None:
    """On N(0, 1.69) with the feature x and alpha = 4 the best law is Gaussian, as its tilt is x^2 / (m alpha) or x^2 / (m^2
    alpha): its variance m solves 1 / m = 1 / 1.69 - 2 / (m alpha), or - 2 / (m^2 alpha)."""
    base = Known(POINTS, weights=torch.from_numpy(BASE))
    found = OptimalDesign(criterion=criterion, ridge=0).one_shot(base, 4.0)
    expected = POINTS[:, 0] ** 2 / (variance if criterion == "log-determinant" else variance**2)
    torch.testing.assert_close(found(POINTS), expected, rtol=2e-4, atol=0)  # the grid ends at 4.4 standard deviations


def test_what_has_no_one_stage_of_optimal_design_says_so() -> None:
    known = Known(normal(50, 0))
    with pytest.raises(InputError, match="smallest eigenvalue has no one reward"):
        OptimalDesign(criterion="eigenvalue").one_shot(known, 1.0)
    with pytest.raises(InputError, match=r"rests on 2 of 50 samples, and there are 2 features: raise the temperature"):
        OptimalDesign(**DESIGN).one_shot(known, 0.01)


def test_the_features_of_a_classifier() -> None:
    """log det M of the features below its last layer, by name; and a classifier that does not exist is refused."""
    x = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        f = load_classifier("digits-classifier")[0].features(x).double()  # type: ignore[operator]
    m = f.T @ f / 40 + 0.1 * torch.eye(f.shape[1])
    found = OptimalDesign(features="digits-classifier", ridge=0.1).value(Known(x))
    assert found.value == pytest.approx(float(torch.logdet(m)), rel=1e-6)  # of features in float32
    with pytest.raises(InputError, match="no-such-classifier"):
        OptimalDesign(features="no-such-classifier").value(Known(x))


def too_flat(x: Tensor) -> Tensor:
    return x[:, 0]


def too_few(x: Tensor) -> Tensor:
    return x[1:]


def test_features_that_are_none() -> None:
    known = Known(normal(8))
    for function in (too_flat, too_few):
        with pytest.raises(InputError, match=rf"{function.__name__} must return a tensor \[8, features\]"):
            OptimalDesign(features=f"test_utilities:{function.__name__}").value(known)
    with pytest.raises(InputError, match="linearly dependent: give a larger ridge"):
        OptimalDesign(ridge=0).value(Known(normal(8).expand(8, 2)))


# ---- scores, divergences ----


def test_the_gradient_of_the_entropy_is_minus_the_score() -> None:
    known = at(P)
    variation = Entropy().first_variation(known)
    values, gradient = value_and_gradient(variation, POINTS)
    assert not variation.valued
    assert torch.equal(values, torch.zeros(len(GRID)).double())
    np.testing.assert_allclose(gradient[1:-1, 0].numpy(), -np.gradient(LOG_P, GRID)[1:-1], atol=2e-4)


def test_the_gradient_of_the_renyi_divergence() -> None:
    """-b (p / p_base)^(b - 1) (s - s_base) / Z, whatever the ratio: here up to e^12, with Z far from 1."""
    b, base_std = 3.0, 0.5
    x = torch.linspace(-2.6, 2.6, 9).double()[:, None]

    def ratio(x: Tensor) -> Tensor:
        z = x[:, 0]
        return z**2 / (2 * base_std**2) - z**2 / 2 + math.log(base_std)

    known = Known(x, score=score_of((1.0, 0.0, 1.0)), base_score=score_of((1.0, 0.0, base_std)), log_ratio=ratio, reference=x)
    z = ((b - 1) * ratio(x)).exp().mean()
    expected = -b * ((b - 1) * ratio(x)).exp()[:, None] * (-x + x / base_std**2) / z
    assert ratio(x).max() > 9
    assert abs(math.log(z)) > 3
    torch.testing.assert_close(slopes(Renyi(order=b), known)[1], expected)


def test_the_kl_without_a_log_ratio_has_its_gradient_alone() -> None:
    known = replace(at(P), log_ratio=None)
    variation = Kl().first_variation(known)
    assert not variation.valued
    torch.testing.assert_close(slopes(Kl(), known)[1], slopes(Kl(), at(P))[1])
    with pytest.raises(InputError, match="utility kl needs the log ratio of the law to the base, 'log_ratio'"):
        Kl().value(known)
    with pytest.raises(InputError, match="utility entropy needs the score of the law, 'score'"):
        Entropy().first_variation(replace(known, score=None))


def test_entropy_without_a_price_has_no_optimum() -> None:
    assert Entropy().caveats(1.0) == ()
    assert "must stop after its stages" in Entropy().caveats(0.0)[0]
    assert "must stop after its stages" in Sum(utilities=[{"utility": "entropy"}]).caveats(0.0)[0]


def test_the_entropy_of_samples() -> None:
    """log sqrt(2 pi e) for each dimension of N(0, 1); equal samples have none."""
    for dimension, count in ((1, 4000), (2, 4000)):
        x = normal(count * dimension).reshape(count, dimension)
        found = Entropy().value(Known(x))
        assert found.value == pytest.approx(dimension / 2 * math.log(2 * math.pi * math.e), abs=4 * found.standard_error)
    with pytest.raises(InputError, match="some samples are equal"):
        Entropy(neighbour=1).value(Known(torch.zeros(10, 1)))
    with pytest.raises(InputError, match="without weights"):
        Entropy().value(at(P))
    with pytest.raises(InputError, match="needs more than 4 samples, got 4"):
        Entropy().value(Known(normal(4)))
    five = Known(normal(5))
    assert Entropy().value(replace(five, weights=torch.full((5,), 0.7))).value == Entropy().value(five).value


# ---- limits ----


def test_a_barrier_that_is_violated_says_by_how_much() -> None:
    with pytest.raises(InputError, match=r"mean cost, 0\.5095 ± 0\.019, is not below the limit 0\.4"):
        LogBarrier(limit=0.4).first_variation(at(P))
    known = Known(normal(8), reward={"reward": reward, "cost": lambda x: torch.full((len(x),), 0.5)})
    for of in (LogBarrier(limit=0.5).value, LogBarrier(limit=0.5).first_variation):  # at the limit the price has no end
        with pytest.raises(InputError, match=r"is not below the limit 0\.5"):
            of(known)


def test_a_multiplier_settles_where_the_limit_holds() -> None:
    """Stages of tilts p_base exp(dF / alpha): at the end E c = C, and the law is the best of those that keep the limit, the
    tilt by r - m c. Held sample by sample, it is another one with that mean cost, and not as good."""
    alpha, limit = 0.5, 0.25

    def settled(utility: AugmentedLagrangian) -> tuple[Array, AugmentedLagrangian]:
        p = BASE
        for _ in range(100):
            tilt = utility.first_variation(at(p))(POINTS).numpy() / alpha
            toward = BASE * np.exp(tilt - tilt.max())
            p = 0.7 * p + 0.3 * toward / toward.sum()
            utility = utility.after(at(p))
        return p, utility

    p, utility = settled(AugmentedLagrangian(limit=limit, price=0.3))
    assert p @ C == pytest.approx(limit, abs=1e-3)
    best = BASE * np.exp((R - utility.multiplier * C) / alpha)
    assert abs(p - best / best.sum()).sum() < 1e-2
    assert utility.multiplier > 0.1
    each, _ = settled(AugmentedLagrangian(limit=limit, price=0.3, samples=True))
    assert each @ C == pytest.approx(limit, abs=1e-3)
    ours, theirs = (q @ R - alpha * (q @ np.log(q / BASE)) for q in (p, each))
    assert ours > theirs + 1e-3


# ---- conditions ----

CONDITIONS = (((1.0, -0.6, 0.9),), ((0.5, 0.2, 0.7), (0.5, 1.5, 1.2)))
JOINT = torch.cat([POINTS, POINTS])
LABELS = torch.arange(2).repeat_interleave(len(GRID))


def log_odds(x: Tensor) -> Tensor:
    """With a term that is the same for both."""
    z = x[:, 0]
    logs = [torch.stack([math.log(w / s) - ((z - m) / s) ** 2 / 2 for w, m, s in parts]).logsumexp(0) for parts in CONDITIONS]
    return torch.stack(logs, 1) + z[:, None] ** 2


def test_conditions_pushed_apart() -> None:
    """The mutual information of sample and condition, shares 0.3 and 0.7: its change when one conditional law is moved; and the
    gradient, s_z - s."""
    laws = [np.exp(mixture(GRID, *parts)) for parts in CONDITIONS]
    one, two = (law / law.sum() for law in laws)

    def functional(moved: float) -> float:
        joint = np.stack([0.3 * one, 0.7 * ((1 - moved) * two + moved * Q)])
        return float((joint * np.log(joint / (joint.sum(0) * joint.sum(1, keepdims=True)))).sum())

    weights = torch.from_numpy(np.concatenate([0.3 * one, 0.7 * two]))
    known = Known(JOINT, weights=weights, log_odds=log_odds, labels=LABELS)
    utility = SpreadConditions()
    assert utility.value(known).value == pytest.approx(functional(0), rel=1e-9)
    variation = utility.first_variation(known)
    bound = variation.given([""] * len(JOINT), [{"label": int(label)} for label in LABELS])
    values, gradient = value_and_gradient(bound, JOINT)
    change = 0.7 * float((Q - two) @ values[len(GRID) :].numpy())
    assert change == pytest.approx((functional(1e-4) - functional(-1e-4)) / 2e-4, rel=1e-6)
    shares = np.stack([0.3 * one, 0.7 * two])
    shares /= shares.sum(0)
    scores = torch.cat([score_of(*parts)(POINTS) for parts in CONDITIONS], 1).numpy()
    np.testing.assert_allclose(gradient[len(GRID) :, 0].numpy(), scores[:, 1] - (shares.T * scores).sum(1), atol=2e-6)
    with pytest.raises(InputError, match="labels must be 0 to 1"):
        utility.value(replace(known, labels=LABELS + 1))


# ---- sums ----


def test_a_sum_of_utilities() -> None:
    """Of rewards, of scores, of a reference: value and gradient are the sums; what each needs is needed; a part adapts."""
    parts: list[dict[str, Any]] = [
        {"utility": "expected-reward"},
        {"utility": {"name": "augmented-lagrangian", "limit": 0.3}, "weight": 2.0},
        {"utility": "kl", "weight": 0.5},
    ]
    total = Sum(utilities=parts)
    assert total.reward_names == ("reward", "cost")
    assert total.needs == ("score", "base_score")
    assert total.value_needs == ("log_ratio",)
    terms = [(term.weight, term.utility) for term in total.utilities]
    known = at(P)
    for which in (0, 1):
        expected = sum(weight * slopes(utility, known)[which] for weight, utility in terms)
        torch.testing.assert_close(slopes(total, known)[which], expected)
    assert total.value(known).value == pytest.approx(sum(weight * each.value(known).value for weight, each in terms))
    assert total.after(known).utilities[1].utility.multiplier == pytest.approx(float(P @ C) - 0.3)
    assert not total.first_variation(known).black_box
    assert Sum(utilities=parts[:2]).first_variation(known).black_box
    with pytest.raises(SettingsError, match="at least one term"):
        Sum(utilities=[])
    with pytest.raises(SettingsError, match="there is no utility 'entropi', did you mean 'entropy'"):
        Sum(utilities=[{"utility": "entropi"}])


# ---- estimates from samples ----


@pytest.mark.parametrize(
    ("utility", "expected"),
    [(MeanVariance(aversion=0.7), "variance"), (Mmd(kernel="energy"), "energy"), (Mmd(bandwidth=0.9), "gaussian")],
)
def test_estimates_are_unbiased(utility: Utility, expected: str) -> None:
    """The mean over all samples of 4 from a law on three points is the utility of that law."""
    points, p = np.array([-1.0, 0.3, 1.1]), np.array([0.2, 0.5, 0.3])
    y = np.array([0.0, 0.4, 2.0])
    total = 0.0
    for indices in itertools.product(range(3), repeat=4):
        x = torch.from_numpy(points[list(indices)])[:, None]
        known = Known(x, reward={"reward": linear}, reference=torch.from_numpy(y)[:, None])
        total += float(np.prod(p[list(indices)])) * utility.value(known).value
    if expected == "variance":
        assert total == pytest.approx(p @ points - 0.7 * (p @ points**2 - (p @ points) ** 2), rel=1e-12)
        return

    def kernel(a: Array, b: Array) -> Array:
        away = abs(a[:, None] - b)
        return -away if expected == "energy" else np.exp(-(away**2) / (2 * 0.9**2))

    q = np.full(3, 1 / 3)
    among = (q @ (kernel(y, y) * (1 - np.eye(3))) @ q) / (1 - q @ q)
    assert total == pytest.approx(-(p @ kernel(points, points) @ p - 2 * p @ kernel(points, y) @ q + among), rel=1e-12)


def ratio_of_normals(x: Tensor) -> Tensor:
    """log N(0, 1) / N(0.3, 1.2)."""
    z = x[:, 0]
    return -(z**2) / 2 + ((z - 0.3) / 1.2) ** 2 / 2 + math.log(1.2)


SIMULATED: Sequence[Utility] = (
    ExpectedReward(),
    Cvar(share=0.2),
    Superquantile(share=0.1),
    MeanVariance(aversion=0.7),
    EntropicRisk(risk=-0.7),
    LogBarrier(limit=0.6, strength=0.4),
    AugmentedLagrangian(limit=0.1, price=2.0),
    OptimalDesign(**DESIGN),
    Entropy(),
    Kl(),
    Renyi(order=0.4),
)
SLOW = (OptimalDesign(criterion="trace", **DESIGN), OptimalDesign(criterion="eigenvalue", **DESIGN), Mmd(bandwidth=0.7))


@pytest.mark.parametrize("utility", [*SIMULATED, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_the_error_is_the_spread_of_the_estimate(utility: Utility) -> None:
    """Over 100 samples of 200: the standard deviation of 100 numbers is known to 7 %, and this is 4 of that."""
    values, errors = [], []
    for seed in range(100):
        x = normal(230, seed)
        known = Known(
            x[:200],
            reward={"reward": reward, "cost": cost},
            log_ratio=ratio_of_normals,
            reference=x[200:] + 0.5,
        )
        found = utility.value(known)
        values.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(errors) / np.std(values) == pytest.approx(1, abs=0.28)


PLUGGED_IN = [each for each in SIMULATED if not isinstance(each, MeanVariance | Entropy)]
"""Those whose value is the functional at the weighted samples themselves."""


@pytest.mark.parametrize("utility", [*PLUGGED_IN, *SLOW[:2], Renyi(order=2.0)])
def test_the_error_is_by_the_change_of_the_value_with_each_weight(utility: Utility) -> None:
    """sqrt(n / (n - 1) sum_i p_i^2 d_i^2), d_i the slope of the value from p toward sample i alone, by differences."""
    p, step = torch.softmax(normal(40, 5)[:, 0].double() / 3, 0), 1e-5
    known = Known(normal(40, 4), weights=p, reward={"reward": reward, "cost": cost}, log_ratio=ratio_of_normals)

    def value(weights: Tensor) -> float:
        return utility.value(replace(known, weights=weights)).value

    toward = torch.eye(40, dtype=torch.float64) - p
    slopes = [(value(p + step * way) - value(p - step * way)) / (2 * step) for way in toward]
    expected = math.sqrt(40 / 39 * sum(float(p[i]) ** 2 * slope**2 for i, slope in enumerate(slopes)))
    assert utility.value(known).standard_error == pytest.approx(expected, rel=1e-4)


def test_the_error_of_a_variance_is_by_its_change_where_rewards_are_skewed() -> None:
    """As above, but for what makes it unbiased, of order 1 / n."""
    n, step, utility = 300, 1e-4, MeanVariance(aversion=0.7)
    known = Known(normal(n, 4), reward={"reward": cost})
    p = torch.full((n,), 1 / n, dtype=torch.float64)

    def value(weights: Tensor) -> float:
        return utility.value(replace(known, weights=weights)).value

    slopes = [value(p + step * (way - p)) - value(p) for way in torch.eye(n, dtype=torch.float64)]
    expected = math.sqrt(sum((slope / step) ** 2 for slope in slopes)) / n
    assert utility.value(known).standard_error == pytest.approx(expected, rel=0.02)


def test_the_error_of_mmd_is_as_much_that_of_the_reference() -> None:
    x, y = normal(50, 0), normal(70, 1) + 0.5
    left, right = (Mmd(bandwidth=0.9).value(Known(a, reference=b)) for a, b in ((x, y), (y, x)))
    assert left.standard_error == pytest.approx(right.standard_error, rel=1e-6)


def test_importance_weights_make_it_the_utility_of_another_law() -> None:
    """Samples of N(0, 1) with the weights of N(0.5, 1), whose best tenth under r = x has the mean 0.5 + 1.755."""
    values, errors = [], []
    for seed in range(100):
        x = normal(1000, seed)
        known = Known(x, weights=(0.5 * x[:, 0]).exp(), reward={"reward": linear})
        found = Superquantile(share=0.1).value(known)
        values.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(values) == pytest.approx(2.255, abs=3 * np.std(values) / 10 + 0.01)
    assert np.mean(errors) / np.std(values) == pytest.approx(1, abs=0.25)
