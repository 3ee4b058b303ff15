r"""The optimum of a sampler's chain under control: no network, no training, in one and two dimensions.

A method that controls a chain x_{k+1} = m_k(x_k) + s_k eps_k can only shift the mean of each Gaussian step, at a price: by
the control w_k, to y = m_k(x) + s_k w_k, for |w_k|^2 / 2 = |y - m_k|^2 / (2 s_k^2), or whatever energy the method charges.
What it maximises is E[r(x_K)] / beta minus those prices. Dynamic programming solves that: V_K = r / beta and

    U_k(y) = E V_{k+1}(y + s_k eps),      V_k(x) = max_y  U_k(y) - |y - m_k(x)|^2 / (2 c_k^2),      c_k = s_k for the path KL.

The maximum over shifts is less than log E exp V_{k+1}, which a step of any shape would reach. So the law of x_K at this
optimum is not p_base exp(r / beta) at a finite number of steps: on one Gaussian it is off in the variance, by O(h); on a
mixture also in the weights of the modes and in the mean reward. No run comes closer than this, however long it trains.

Functions live on a grid as cubic splines. U_k is a quadrature that is exact for quadratic V, so that on a Gaussian base the
result is Riccati's to rounding. One step of a policy is then a matrix M_k, V-like functions of x_{k+1} -> of x_k; its transpose
takes the law of x_k, as weights on the grid, to that of x_{k+1}.
"""

# Mutation tests: test_chain_optimum.py

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import BSpline, NdBSpline, make_interp_spline
from scipy.sparse import csr_matrix, identity, kron
from scipy.sparse.linalg import splu
from scipy.special import ndtr
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward
from tiltflow.samplers.chain import Chain

Array = NDArray[np.float64]

NODES = {1: (500, 4000), 2: (96, 256)}  # fewest and most grid points of an axis, by the dimension of x
REACH = 6.5  # reach of the grid, in standard deviations of every component at every time
FINE = 0.4  # largest spacing of the grid, in smallest standard deviations
REFINED = {1: 10, 2: 4}  # refinement of the grid for distances, by the dimension of x
NOISE = 7.5  # reach of a step's quadrature, in its standard deviations
DIRECTIONS = 32  # directions of the sliced distance, smooth and periodic in the angle: equal angles are accurate
LEVELS = 4000  # quantiles for each direction
NEWTON_STEPS = 8


@dataclass(frozen=True)
class ChainOptimum:
    """The best control's terminal law: `weights` [n, ..] on the grid of `axes`, [n] each; its mean reward; and the path KL that
    it costs, in nats (or the energy that the method charges instead)."""

    axes: list[Array]
    weights: Array
    reward: float
    path_kl: float

    def refined(self) -> tuple[Array, Array]:
        """The same law on a finer grid, by splines: points [m, dimension] and their probabilities [m]."""
        density, axes, times = self.weights, [], REFINED[len(self.axes)]
        for i, axis in enumerate(self.axes):
            axes.append(np.linspace(axis[0], axis[-1], times * (len(axis) - 1) + 1))
            density = make_interp_spline(axis, density, axis=i)(axes[-1]).clip(min=0)
        points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
        return points, (density / density.sum()).ravel()

    def sliced_w2(self, law: GaussianMixture) -> float:
        """Sliced 2-Wasserstein distance to a mixture, root mean square over directions; in one dimension W2 itself."""
        points, probabilities = self.refined()
        levels, squares = (np.arange(LEVELS) + 0.5) / LEVELS, []
        for direction in _directions(len(self.axes)):
            means, stds = law.means.numpy() @ direction, law.variances.sqrt().numpy()
            x = np.linspace((means - 9 * stds).min(), (means + 9 * stds).max(), 20_000)
            exact = np.interp(levels, ndtr((x[:, None] - means) / stds) @ law.log_weights.exp().numpy(), x)
            squares.append(np.mean((_quantiles(points @ direction, probabilities, levels) - exact) ** 2))
        return float(np.mean(squares) ** 0.5)


def solve(
    chain: Chain,
    energy: Tensor,
    base: GaussianMixture,
    reward: QuadraticReward,
    beta: float,
) -> ChainOptimum:
    """The best control of a chain that starts from N(0, I).

    Args:
        energy: [K], what a change of the velocities costs, as `Chain.energy` says it; 0 where a step is not controlled.
        base: the law of the base, whose exact velocity is the chain's.

    Raises InputError above two dimensions, and where the components are too narrow for the grid.
    """
    dimension = base.means.shape[1]
    axes = _axes(base, base.tilt(reward, beta), chain)
    points = np.stack(np.meshgrid(*(axis.points for axis in axes), indexing="ij"), -1).reshape(-1, dimension)
    x = torch.from_numpy(points)

    rewards: Array = reward(x).numpy()
    value, steps = rewards / beta, []
    for k in range(len(chain) - 1, -1, -1):
        step = Step(axes, chain.std[k].item())
        mean = chain.mean(k, x, chain.velocity(k, base.velocity, x)).numpy()
        if energy[k] > 0:
            width = (chain.v_scale[k].abs() / energy[k].sqrt()).item()
            after = step.best(value, mean, width)
            price = ((after - mean) ** 2).sum(1) / (2 * width**2)
        else:
            after, price = mean, np.zeros(len(mean))
        step.goes_to(after)
        value = step.expectation(value) - price
        steps.append(step)

    law = np.exp(-(points**2).sum(1) / 2)
    law /= law.sum()
    gain = float(law @ value)  # E[r(x_K)] / beta minus the price
    for step in reversed(steps):
        law = step.law_after(law)
    mean_reward = float(law @ rewards)
    law = law.reshape([len(axis.points) for axis in axes])
    return ChainOptimum([axis.points for axis in axes], law, mean_reward, mean_reward / beta - gain)


def tilted_chain(chain: Chain, base: GaussianMixture, reward: QuadraticReward, beta: float) -> ChainOptimum:
    """The law of the ends of the uncontrolled chain, tilted by exp(r / beta): what weights of its paths stand for. Its path KL
    is that from the chain's own ends. Raises InputError as `solve` does."""
    free = solve(chain, torch.zeros(len(chain), dtype=torch.float64), base, reward, beta)
    points = np.stack(np.meshgrid(*free.axes, indexing="ij"), -1).reshape(-1, len(free.axes))
    rewards: Array = reward(torch.from_numpy(points)).numpy().reshape(free.weights.shape)
    tilt = np.exp((rewards - rewards.max()) / beta)
    weights = free.weights * tilt / (free.weights * tilt).sum()
    mean = float((weights * rewards).sum())
    log_mean = math.log(float((free.weights * tilt).sum())) + float(rewards.max()) / beta
    return ChainOptimum(free.axes, weights, mean, mean / beta - log_mean)


class Axis:
    """Cubic splines on equally spaced points of the line."""

    def __init__(self, low: float, high: float, count: int):
        self.points: Array = np.linspace(low, high, count)
        self.knots: Array = make_interp_spline(self.points, self.points).t
        self.values = self.basis(self.points)
        self._solve = splu(self.values.tocsc())

    def basis(self, x: Array) -> csr_matrix:
        """Coefficients -> values at x [m]: [m, points]."""
        return BSpline.design_matrix(x, self.knots, 3, extrapolate=True).tocsr()

    def smoothed(self, std: float) -> csr_matrix:
        """Coefficients of f -> E f(points + std eps), by the trapezoid rule, spectrally accurate for Gaussians. The nodes are
        as close as the points where that is affordable: the transpose turns a point into a law on them."""
        if std == 0:
            return self.values
        apart = min(max((self.points[1] - self.points[0]) / std, 0.06), 0.5)
        nodes = np.arange(-NOISE, NOISE + apart / 2, apart)
        weights = np.exp(-(nodes**2) / 2)
        everywhere = self.basis((self.points + std * nodes[:, None]).ravel())
        return csr_matrix(kron(weights[None] / weights.sum(), identity(len(self.points))) @ everywhere)

    def coefficients(self, values: Array, *, transposed: bool = False) -> Array:
        """Values at the points, along the first of any axes, -> coefficients; or the transpose of that matrix."""
        flat = np.ascontiguousarray(values.reshape(len(values), -1))
        solved: Array = self._solve.solve(flat, "T" if transposed else "N").reshape(values.shape)
        return solved


class Step:
    """One step to y + std eps, with y a function of the grid's points that `goes_to` sets: as a matrix, and its transpose."""

    def __init__(self, axes: list[Axis], std: float):
        self.axes, self.shape = axes, tuple(len(axis.points) for axis in axes)
        self.smoothing = [axis.smoothed(std) for axis in axes]
        self.matrix = csr_matrix((0, 0))

    def goes_to(self, y: Array) -> None:
        """y [points, dimension]."""
        data, columns = np.ones((len(y), 1)), np.zeros((len(y), 1), dtype=int)
        for i, axis in enumerate(self.axes):
            one = axis.basis(y[:, i])  # four cubic splines at every place
            ours, theirs = one.data.reshape(-1, 1, 4), one.indices.reshape(-1, 1, 4)
            data = (data[..., None] * ours).reshape(len(y), -1)
            columns = (columns[..., None] * len(axis.points) + theirs).reshape(len(y), -1)
        ends = np.arange(len(y) + 1) * data.shape[1]
        self.matrix = csr_matrix((data.ravel(), columns.ravel(), ends), shape=(len(y), math.prod(self.shape)))

    def expectation(self, value: Array) -> Array:
        """E f(y + std eps) for f at the points: [points] -> [points]."""
        after: Array = self.matrix @ self._smooth(value)[1].ravel()
        return after

    def law_after(self, law: Array) -> Array:
        """The weights of the points after the step, from those before: [points] -> [points]."""
        weights = (self.matrix.T @ law).reshape(self.shape)
        for i, axis in enumerate(self.axes):
            moved = axis.coefficients(np.moveaxis(weights, i, 0), transposed=True)
            flat = self.smoothing[i].T @ moved.reshape(len(moved), -1)
            moved = axis.coefficients(flat.reshape(moved.shape), transposed=True)
            weights = np.moveaxis(moved, 0, i)
        after: Array = weights.ravel()
        return after

    def best(self, value: Array, mean: Array, width: float) -> Array:
        """The y that maximises E f(y + std eps) - |y - mean|^2 / (2 width^2) for each mean [points, dimension]: from the best
        point of the grid for the nearest mean on the grid, as there may be several maxima, by Newton's method."""
        smooth, coefficients = self._smooth(value)
        index = self._best_on_grid(smooth, width)
        nearest = tuple(
            np.clip(np.rint((mean[:, i] - axis.points[0]) / (axis.points[1] - axis.points[0])), 0, len(axis.points) - 1).astype(
                int
            )
            for i, axis in enumerate(self.axes)
        )
        y = np.stack([axis.points[index[i][nearest]] for i, axis in enumerate(self.axes)], 1)
        spline, size = NdBSpline(tuple(axis.knots for axis in self.axes), coefficients, 3), len(self.axes)

        def gain(y: Array, mean: Array) -> Array:
            found: Array = spline(y) - ((y - mean) ** 2).sum(1) / (2 * width**2)
            return found

        gains, first, moving = gain(y, mean), np.eye(size, dtype=int), np.arange(len(y))
        for _ in range(NEWTON_STEPS):
            here, m = y[moving], mean[moving]
            slope = np.stack([spline(here, nu=a) for a in first], 1) - (here - m) / width**2
            curvature = np.stack([[spline(here, nu=a + b) for a in first] for b in first]).transpose(2, 0, 1)
            there = here - np.linalg.solve(curvature - np.eye(size) / width**2, slope[..., None])[..., 0]
            reached = gain(there, m)
            better = reached > gains[moving] + 1e-14  # near a kink between two maxima a step may lead away
            moving = moving[better]
            y[moving], gains[moving] = there[better], reached[better]
        return y

    def _best_on_grid(self, smooth: Array, width: float) -> list[Array]:
        """For each point of the grid as the mean, the index of the best y, one array of the grid's shape for each axis: axis by
        axis, as the price is a sum over them."""
        chosen: list[Array] = []
        for i, axis in enumerate(self.axes):
            price = (axis.points[:, None] - axis.points) ** 2 / (2 * width**2)  # [mean, y]
            gain = np.moveaxis(smooth, i, 0)[None] - price.reshape(*price.shape, *(1 for _ in self.axes[1:]))
            index = np.moveaxis(gain.argmax(1), 0, i)
            smooth = np.moveaxis(gain.max(1), 0, i)
            # those that were chosen before, at the y that is chosen now
            chosen = [np.take_along_axis(before, index, i) for before in chosen] + [index]
        return chosen

    def _smooth(self, value: Array) -> tuple[Array, Array]:
        """E f(x + std eps) at the points, and its coefficients, both of the grid's shape."""
        grid = value.reshape(self.shape)
        for i, axis in enumerate(self.axes):
            moved = axis.coefficients(np.moveaxis(grid, i, 0))
            flat = self.smoothing[i] @ moved.reshape(len(moved), -1)
            grid = np.moveaxis(flat.reshape(moved.shape), 0, i)
        smooth = grid
        for i, axis in enumerate(self.axes):
            grid = np.moveaxis(axis.coefficients(np.moveaxis(grid, i, 0)), 0, i)
        return smooth, grid


def _axes(base: GaussianMixture, target: GaussianMixture, chain: Chain) -> list[Axis]:
    """A grid that holds every component of both laws at every time of the linear path, and the noise of every step."""
    dimension = base.means.shape[1]
    if dimension not in NODES:
        raise InputError("not computed above two dimensions")
    means, variances = torch.cat([base.means, target.means]), torch.cat([base.variances, target.variances])[:, None]
    stds = torch.cat([torch.ones(1, dtype=torch.float64), chain.std])  # of the start, and of what each step adds
    away = [
        REACH * torch.maximum((t**2 * variances + (1 - t) ** 2).sqrt(), std) for t, std in zip(chain.times, stds, strict=True)
    ]
    low = torch.stack([(t * means - reach).amin(0) for t, reach in zip(chain.times, away, strict=True)]).amin(0)
    high = torch.stack([(t * means + reach).amax(0) for t, reach in zip(chain.times, away, strict=True)]).amax(0)
    apart, (fewest, most) = FINE * variances.min().sqrt().item(), NODES[dimension]
    counts = [max(math.ceil(length / apart), fewest) for length in (high - low).tolist()]
    if max(counts) > most:
        raise InputError(
            f"not computed: modes this narrow need {max(counts)} points of a grid in each dimension, {most} at most"
        )
    return [Axis(*ends) for ends in zip(low.tolist(), high.tolist(), counts, strict=True)]


def _directions(dimension: int) -> Array:
    if dimension == 1:
        return np.ones((1, 1))
    angle = (np.arange(DIRECTIONS) + 0.5) * math.pi / DIRECTIONS
    return np.stack([np.cos(angle), np.sin(angle)], 1)


def _quantiles(x: Array, probabilities: Array, levels: Array) -> Array:
    """Quantiles at `levels` of a law with these probabilities at x, its distribution function linear between them."""
    order = np.argsort(x, kind="stable")
    cdf = np.cumsum(probabilities[order]) - probabilities[order] / 2
    return np.interp(levels, cdf, x[order])
