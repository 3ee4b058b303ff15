"""The law that is best for a utility at a price of the KL, on the points of a grid: each utility beside the functional, written
apart from it, that it estimates."""

# Mutation tests: test_verify_utility.py

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.laws import functionals
from tiltflow.laws.functionals import Functional, Grid
from tiltflow.laws.law import Array
from tiltflow.laws.utility_optimum import (
    kl,
    of_cvar,
    of_entropic_risk,
    of_log_barrier,
    of_mean_variance,
    of_superquantile,
    tilted,
)
from tiltflow.plugins import import_function
from tiltflow.utilities import Utility
from tiltflow.utilities.augmented_lagrangian import AugmentedLagrangian
from tiltflow.utilities.cvar import Cvar
from tiltflow.utilities.entropic_risk import EntropicRisk
from tiltflow.utilities.entropy import Entropy
from tiltflow.utilities.expected_reward import ExpectedReward
from tiltflow.utilities.function import Function, of_law
from tiltflow.utilities.kl import Kl
from tiltflow.utilities.log_barrier import LogBarrier
from tiltflow.utilities.mean_variance import MeanVariance
from tiltflow.utilities.mmd import Mmd
from tiltflow.utilities.optimal_design import OptimalDesign
from tiltflow.utilities.renyi import Renyi
from tiltflow.utilities.spread_conditions import SpreadConditions
from tiltflow.utilities.sum import Sum
from tiltflow.utilities.superquantile import Superquantile
from tiltflow.utilities.wasserstein_1 import Wasserstein1
from tiltflow.utilities.wasserstein_2 import Wasserstein2

AT_THE_EDGE = 1e-6
"""Most mass at the ends of the grid."""
MISSING = {
    "augmented-lagrangian": "in a sum",
    "spread-conditions": "in a sum",
    "wasserstein-1": "in the plane, and for a metric",
    "wasserstein-2": "in the plane, and for a metric",
    "mmd": "without a bandwidth",
}


@dataclass(frozen=True)
class Points:
    """A grid, and what is known there.

    Args:
        base: probabilities of the points under the base of each class; of one where there are no classes.
        rewards: the reward and the cost, by these names: [n].
        log_odds: log p(x | class) under the base: [n, classes].
    """

    grid: Grid
    base: tuple[Array, ...]
    rewards: Mapping[str, Array]
    log_odds: Array | None = None


@dataclass(frozen=True)
class Best:
    """The law that is best.

    Args:
        masses: its probabilities of the points, of each class.
        utility: what is best there, with the multiplier at which it settles, if it has one.
        value: the utility of the law.
    """

    points: Points
    masses: tuple[Array, ...]
    utility: Utility
    value: float

    @property
    def kl(self) -> float:
        """From the base, in nats; the mean over the classes."""
        return sum(kl(p, q) for p, q in zip(self.masses, self.points.base, strict=True)) / len(self.masses)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw [count, d] samples, of the classes in turn, anywhere in the cell of a point."""
        classes, grid = len(self.masses), self.points.grid
        u = torch.rand(count, generator=generator, dtype=torch.float64).numpy()
        where = np.empty(count, dtype=int)
        for z, p in enumerate(self.masses):
            where[z::classes] = np.minimum(np.searchsorted(np.cumsum(p), u[z::classes]), len(p) - 1)
        points = torch.from_numpy(grid.points[where])
        jitter = torch.rand(points.shape, generator=generator, dtype=torch.float64) - 0.5
        return points + jitter * torch.from_numpy(grid.spacing)


def best_law(utility: Utility, alpha: float, at: Points) -> Best:
    """argmax F(p) - alpha KL(p | base). Raises InputError where it is not known."""
    try:
        found = of_classes(utility, alpha, at) if isinstance(utility, SpreadConditions) else of_one(utility, alpha, at)
    except ValueError as error:
        raise InputError(f"verify utility: {error}") from None
    if (edge := max(map(at.grid.at_the_edge, found.masses))) > AT_THE_EDGE:
        raise InputError(f"verify utility: the best law leaves the grid, with {edge:.1g} of it at the ends: raise alpha")
    return found


def of_classes(utility: SpreadConditions, alpha: float, at: Points) -> Best:
    """Each class tilted by log p_z / p of the base: the classifier that judges them stays as it is."""
    assert at.log_odds is not None
    rewards = at.log_odds - np.logaddexp.reduce(at.log_odds, 1)[:, None] + math.log(len(at.base))
    masses = tuple(tilted(q, rewards[:, z] / alpha) for z, q in enumerate(at.base))
    return Best(at, masses, utility, sum(float(p @ rewards[:, z]) for z, p in enumerate(masses)) / len(masses))


def of_one(utility: Utility, alpha: float, at: Points) -> Best:
    """Where there are no classes: in closed form but for one number where that is known, and else by a fixed point."""
    (q,), r, c = at.base, at.rewards["reward"], at.rewards["cost"]
    match utility:
        case Superquantile():
            p = of_superquantile(q, r, utility.share, alpha).masses
        case Cvar():
            p = of_cvar(q, r, utility.share, alpha).masses
        case MeanVariance() if utility.aversion != 0:
            p = of_mean_variance(q, r, utility.aversion, alpha).masses
        case EntropicRisk():
            p = of_entropic_risk(q, r, utility.risk, alpha).masses
        case LogBarrier():
            p = of_log_barrier(q, r, c, utility.limit, utility.strength, alpha).masses
        case AugmentedLagrangian():
            utility, p = limited(utility, alpha, at)
        case _:
            p = functionals.maximum(q, functional(utility, at), alpha)
    return Best(at, (p,), utility, functional(utility, at, alone=True).value(p))


def limited(utility: AugmentedLagrangian, alpha: float, at: Points) -> tuple[AugmentedLagrangian, Array]:
    """The utility with the multiplier at which it settles, and the law there: where the mean is held to the limit, the best of
    all that keep it."""
    (q,), r, c = at.base, at.rewards["reward"], at.rewards["cost"]

    def with_multiplier(m: float) -> AugmentedLagrangian:
        return utility.model_copy(update={"multiplier": m})

    def log_tilt(m: float) -> Array:
        return (r - (penalty_of(with_multiplier(m))(c) if utility.samples else m * c)) / alpha

    m = functionals.least_multiplier(q, log_tilt, c, utility.limit)
    return with_multiplier(m), tilted(q, log_tilt(m))


def penalty_of(utility: AugmentedLagrangian) -> Callable[[Array], Array]:
    """Of a cost."""
    m, g = utility.multiplier, utility.price
    return lambda c: (np.maximum(0, m + g * (c - utility.limit)) ** 2 - m**2) / (2 * g)


def functional(utility: Utility, at: Points, *, alone: bool = False) -> Functional:
    """The utility as a functional of the probabilities of the points, the base being the reference. Raises InputError for one
    that is not known.

    Args:
        alone: whether it is no term of a sum.
    """
    (q,), grid, r, c = at.base, at.grid, at.rewards["reward"], at.rewards["cost"]
    match utility:
        case Sum():
            return functionals.weighted([(term.weight, functional(term.utility, at)) for term in utility.utilities])
        case ExpectedReward():
            return functionals.mean(r)
        case Superquantile():
            return functionals.best_share(r, utility.share)
        case Cvar():
            return functionals.worst_share(r, utility.share)
        case MeanVariance():
            return functionals.mean_variance(r, utility.aversion)
        case EntropicRisk():
            return functionals.entropic_risk(r, utility.risk)
        case LogBarrier():
            return functionals.log_barrier(r, c, utility.limit, utility.strength)
        case AugmentedLagrangian() if alone:
            return functionals.penalised(r, penalty_of(utility), c, samples=utility.samples)
        case Entropy():
            return functionals.entropy(grid.cell)
        case Kl():
            return functionals.minus_kl(q)
        case Renyi():
            return functionals.minus_renyi(q, utility.order)
        case Wasserstein1() if len(grid.axes) == 1 and not utility.metric:
            return functionals.minus_wasserstein_1(grid.axes[0], q)
        case Wasserstein2() if len(grid.axes) == 1 and not utility.metric:
            return functionals.minus_wasserstein_2(grid.axes[0], q)
        case Mmd() if utility.kernel == "energy" or utility.bandwidth is not None:
            return functionals.minus_mmd(grid, q, utility.bandwidth if utility.kernel == "gaussian" else None)
        case OptimalDesign():
            features = utility.features_of(torch.from_numpy(grid.points)).double().numpy()
            return functionals.optimal_design(features, utility.criterion, utility.ridge)
        case Function():
            return own(utility, at)
    where = MISSING.get(utility.name)
    raise InputError(f"verify utility: the best law of {utility.name} is not known{f' {where}' if where else ''}")


def own(utility: Function, at: Points) -> Functional:
    """Your function of the points, with their probabilities as weights, and autograd's slope in these."""
    of = of_law(import_function(utility.path, "utility"), f"utility {utility.path}")
    if "weights" not in of.asks or "scores" in of.asks:
        raise InputError(
            f"verify utility: the best law of {utility.path} is known if it takes `weights`, and no scores: it is asked for the"
            " value of points with their probabilities"
        )
    points = torch.from_numpy(at.grid.points)
    told = {"rewards": torch.from_numpy(at.rewards["reward"])}

    def value(p: Array) -> float:
        return float(of(points, {**told, "weights": torch.from_numpy(p)}))

    def slope(p: Array) -> Array:
        weights = torch.from_numpy(p).clone().requires_grad_()
        with torch.enable_grad():
            return np.asarray(of.slope(of(points, {**told, "weights": weights}), weights).numpy())

    return Functional(value, slope)
