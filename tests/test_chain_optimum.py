"""What the best control of a chain reaches: against Riccati on Gaussians, and against plain enumeration on a mixture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from affine import LINEAR, MEAN, QUADRATIC, TILTED_MEAN, TILTED_VARIANCE, VARIANCE, on_gaussian, riccati
from scipy.interpolate import CubicSpline
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.laws.chain_optimum import Array, ChainOptimum, solve
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.problems.verification.quadratic_tilt import best_of_chain
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.solvers.ddim import ddim
from tiltflow.samplers.solvers.euler import euler
from tiltflow.samplers.solvers.memoryless import memoryless
from tiltflow.samplers.solvers.memoryless_offset import memoryless_offset

pytestmark = pytest.mark.usefixtures("double")

BETA = 0.6


def mixture(*means: list[float], variances: tuple[float, ...] = (0.15, 0.3)) -> GaussianMixture:
    weights, places, widths = (torch.tensor(part, dtype=torch.float64) for part in ([0.6, 0.4], means, variances))
    return GaussianMixture(weights.log(), places, widths)


TWO, REWARD = mixture([-1.5], [1.5]), QuadraticReward(torch.tensor([0.8], dtype=torch.float64), 0.7)


def path_kl(chain: Chain) -> Tensor:
    return chain.control_scale**2


def moments(best: ChainOptimum) -> tuple[list[float], list[float]]:
    points = np.stack(np.meshgrid(*best.axes, indexing="ij"), -1).reshape(-1, len(best.axes))
    mean = best.weights.ravel() @ points
    return mean.tolist(), (best.weights.ravel() @ (points - mean) ** 2).tolist()


def positive(best: ChainOptimum) -> float:
    points, probabilities = best.refined()
    return float(probabilities[points[:, 0] > 0].sum())


# ---- Gaussians: Riccati's equation ----


@pytest.mark.parametrize(
    ("chain", "dimension"),
    [
        (memoryless(time_grid(12)), 1),
        (memoryless(time_grid(6, shift=3.0), denoise=False), 1),
        (memoryless_offset(time_grid(12)), 1),
        (ddim(time_grid(8), eta=1.0), 1),
        (memoryless(time_grid(3, shift=4.0)), 1),
        (memoryless_offset(time_grid(6)), 2),
        (memoryless(time_grid(3, shift=4.0)), 2),
    ],
)
def test_on_a_gaussian_it_is_riccatis(chain: Chain, dimension: int) -> None:
    base = GaussianMixture(torch.zeros(1), torch.full((1, dimension), MEAN), torch.tensor([VARIANCE]))
    reward = QuadraticReward(torch.full((dimension,), LINEAR), QUADRATIC)
    best = solve(chain, path_kl(chain), base, reward, 1.0)
    affine = on_gaussian(chain)
    controls = riccati(affine)
    mean, variance = (float(part) for part in affine.controlled(*controls).law())
    assert moments(best)[0] == pytest.approx([mean] * dimension, abs=1e-11)
    assert moments(best)[1] == pytest.approx([variance] * dimension, abs=1e-11)
    assert best.path_kl == pytest.approx(dimension * float(affine.path_kl(*controls)), abs=1e-11)
    assert best.reward == pytest.approx(dimension * (LINEAR * mean - QUADRATIC / 2 * (mean**2 + variance)), abs=1e-11)
    # every direction of the plane sees the same two Gaussians, but for the length of the mean's shift in it
    shift, widths = (mean - TILTED_MEAN) ** 2, (variance**0.5 - TILTED_VARIANCE**0.5) ** 2
    assert best.sliced_w2(base.tilt(reward, 1.0)) == pytest.approx(math.sqrt(shift + widths), abs=5e-5)


@pytest.mark.parametrize("method", [{"solver": "ddpm"}, {"solver": "euler"}, {"running_reward": "transition-kl"}])
def test_a_price_that_is_not_the_path_kl(method: dict[str, str]) -> None:
    """V = -P x^2 / 2 + p x, a step y for |y - m|^2 / 2 c^2: y = (m + c^2 p) / (1 + c^2 P), then P <- G^2 P / (1 + c^2 P)."""
    chain, energy = ScoreAsAction(num_inference_steps=8, **method).priced_chain()
    if method["solver" if "solver" in method else "running_reward"] == "ddpm":
        assert not torch.allclose(energy[:-1], path_kl(chain)[:-1])
    affine, P, p, steps = on_gaussian(chain), QUADRATIC, LINEAR, []
    for gain, offset, v_scale, price in list(zip(affine.gain, affine.offset, chain.v_scale, energy, strict=True))[::-1]:
        square = v_scale**2 / price if price > 0 else 0.0
        d = 1 + square * P
        steps.append((gain, offset, square, P, p))
        P, p = gain**2 * P / d, gain * (p - P * offset) / d
    mean, variance, cost = 0.0, 1.0, 0.0
    for (gain, offset, square, P, p), std in zip(steps[::-1], chain.std, strict=True):
        d = 1 + square * P
        slope, shift = gain / d, (offset + square * p) / d
        if square > 0:
            a, b = slope - gain, shift - offset
            cost += ((a * mean + b) ** 2 + a**2 * variance) / (2 * square)
        mean, variance = slope * mean + shift, slope**2 * variance + std**2
    base = GaussianMixture(torch.zeros(1), torch.full((1, 1), MEAN), torch.tensor([VARIANCE]))
    best = solve(chain, energy, base, QuadraticReward(torch.tensor([LINEAR]), QUADRATIC), 1.0)
    assert moments(best) == (pytest.approx([float(mean)], abs=1e-9), pytest.approx([float(variance)], abs=1e-9))
    assert best.path_kl == pytest.approx(float(cost), abs=1e-9)


# ---- a mixture ----


def enumerated(steps: int) -> tuple[float, float, float, float]:
    """P(x > 0), mean reward, path KL and W2 to the tilt, by looking at every shift on a finer and finer grid and carrying the
    density along by the Gaussian kernel itself."""
    chain, grid = memoryless(time_grid(steps), denoise=False), np.linspace(-7, 7, 701)
    x, noise = torch.from_numpy(grid[:, None]), np.linspace(-7, 7, 141)
    weights = np.exp(-(noise**2) / 2) / np.exp(-(noise**2) / 2).sum()
    value, policy = REWARD(x).numpy() / BETA, []
    for k in range(steps - 1, -1, -1):
        std, mean = chain.std[k].item(), chain.mean(k, x, TWO.velocity(x, chain.times[k])).numpy()[:, 0]
        after = CubicSpline(grid, CubicSpline(grid, value)(grid[:, None] + std * noise) @ weights)

        def gain(y: Array, after: CubicSpline = after, mean: Array = mean, std: float = std) -> Array:
            found: Array = after(y) - (y - mean[:, None]) ** 2 / (2 * std**2)
            return found

        y = grid[gain(grid[None]).argmax(1)]
        for width in (0.02, 0.002, 0.0002):
            near = y[:, None] + np.linspace(-width, width, 21)
            y = near[np.arange(len(y)), gain(near).argmax(1)]
        value = gain(y[:, None])[:, 0]
        policy.append((mean, y, std))
    spacing, cost = grid[1] - grid[0], 0.0
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    for mean, y, std in policy[::-1]:
        cost += float((density * (y - mean) ** 2).sum()) * spacing / (2 * std**2)
        density = np.exp(-((grid[:, None] - y) ** 2) / (2 * std**2)) @ density * spacing / (std * math.sqrt(2 * math.pi))
    levels, target = (np.arange(50_000) + 0.5) / 50_000, TWO.tilt(REWARD, BETA)
    fine = np.linspace(-6, 6, 60_001)
    normal = torch.special.ndtr((torch.from_numpy(fine[:, None]) - target.means[:, 0]) / target.variances.sqrt())
    cdf = np.cumsum(density) * spacing - density * spacing / 2
    w2 = np.interp(levels, cdf, grid) - np.interp(levels, (normal @ target.log_weights.exp()).numpy(), fine)
    mean_reward = float((density * REWARD(x).numpy()).sum()) * spacing
    return 1 - float(np.interp(0, grid, cdf)), mean_reward, cost, float((w2**2).mean() ** 0.5)


def test_on_a_mixture_no_shift_that_can_be_enumerated_is_better() -> None:
    chain = memoryless(time_grid(12), denoise=False)
    best = solve(chain, path_kl(chain), TWO, REWARD, BETA)
    found = positive(best), best.reward, best.path_kl, best.sliced_w2(TWO.tilt(REWARD, BETA))
    assert found == pytest.approx(enumerated(12), abs=3e-4)


@pytest.mark.parametrize(
    ("steps", "mass", "mean_reward", "w2"),
    [(10, 0.889, 0.1815, 0.3065), (15, 0.908, 0.2084, 0.2324), (20, 0.9178, 0.2226, 0.1894), (40, 0.9329, 0.2451, 0.112)],
)
def test_the_chain_falls_short_of_the_weights_of_a_mixture(steps: int, mass: float, mean_reward: float, w2: float) -> None:
    """The tilt has P(x > 0) = 0.948 and a mean reward of 0.2687: the order h of a chain is in the weights of the modes too."""
    best = best_of_chain(AdjointMatching(num_inference_steps=steps, beta=BETA), TWO, REWARD, BETA)["chain_optimum"]
    assert (best["reward"], best["distance"]) == pytest.approx((mean_reward, w2), abs=2e-4)
    chain = memoryless(time_grid(steps))
    assert positive(solve(chain, path_kl(chain), TWO, REWARD, BETA)) == pytest.approx(mass, abs=2e-4)
    assert TWO.tilt(REWARD, BETA).expectation(REWARD) == pytest.approx(0.2687, abs=5e-5)


@pytest.mark.parametrize(("steps", "mean_reward", "w2"), [(15, 0.2266, 0.1769), (40, 0.2537, 0.0764)])
def test_smaller_steps_in_the_middle_leave_less(steps: int, mean_reward: float, w2: float) -> None:
    """The same steps, spread evenly, are at W2 0.2324 and 0.1120."""
    method = AdjointMatching(num_inference_steps=steps, beta=BETA, spacing="middle")
    best = best_of_chain(method, TWO, REWARD, BETA)["chain_optimum"]
    assert (best["reward"], best["distance"]) == pytest.approx((mean_reward, w2), abs=2e-4)


@pytest.mark.parametrize("angle", [0.0, 0.5])
def test_a_plane_that_factorises(angle: float) -> None:
    """Two modes of one width: the coordinate along them and the one across are two problems, however the plane is turned."""
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    law, chain = mixture([-1.2], [1.2], variances=(0.25, 0.25)), memoryless(time_grid(10))
    across, reward = GaussianMixture(torch.zeros(1), torch.zeros(1, 1), torch.tensor([0.25])), QuadraticReward
    parts = [
        solve(chain, path_kl(chain), law, reward(torch.tensor([0.8]), 0.7), BETA),
        solve(chain, path_kl(chain), across, reward(torch.tensor([-0.5]), 0.7), BETA),
    ]
    plane = GaussianMixture(law.log_weights, torch.cat([law.means, torch.zeros(2, 1)], 1) @ turn, law.variances)
    best = solve(chain, path_kl(chain), plane, reward(torch.tensor([0.8, -0.5]) @ turn, 0.7), BETA)
    assert best.reward == pytest.approx(sum(part.reward for part in parts), abs=3e-4)
    assert best.path_kl == pytest.approx(sum(part.path_kl for part in parts), abs=3e-4)
    expected = torch.tensor([moments(part)[0][0] for part in parts]) @ turn
    assert moments(best)[0] == pytest.approx(expected.tolist(), abs=3e-4)


# ---- where there is none ----


def test_what_is_not_computed_says_so() -> None:
    reward, method = QuadraticReward(torch.zeros(3), 1.0), AdjointMatching()
    space = GaussianMixture(torch.zeros(1), torch.zeros(1, 3), torch.ones(1))
    assert best_of_chain(method, space, reward, 1.0) == {
        "chain_optimum": None,
        "chain_optimum_missing": "not computed above two dimensions",
    }
    narrow = GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.tensor([1e-4]))
    with pytest.raises(InputError, match="not computed: modes this narrow need"):
        solve(memoryless(time_grid(5)), torch.ones(5), narrow, QuadraticReward(torch.zeros(2), 1.0), 1.0)
    for other in (OrwCfmW2(), ScoreAsAction(solver="heun"), ScoreAsAction(running_reward="none")):
        assert "does not control a chain" in best_of_chain(other, TWO, REWARD, 1.0)["chain_optimum_missing"]


def test_the_last_step_of_the_base_has_no_price_but_that_of_an_ode_has() -> None:
    chain, energy = ScoreAsAction(num_inference_steps=5).priced_chain()
    assert torch.equal(energy, path_kl(chain))
    assert energy[-1] == 0
    chain, energy = ScoreAsAction(num_inference_steps=5, solver="euler").priced_chain()
    assert torch.equal(energy, euler(time_grid(5)).energy)


@pytest.mark.parametrize(("steps", "gain"), [(15, 1.2275), (40, 1.0824)])
def test_the_gain_at_which_a_calibrated_run_settles_is_above_one(steps: int, gain: float) -> None:
    """Where the best control at beta / gain has the mean reward of the tilt at beta."""
    method = AdjointMatching(num_inference_steps=steps, beta=BETA)
    best = best_of_chain(method, TWO, REWARD, BETA / gain)["chain_optimum"]
    assert best["reward"] == pytest.approx(TWO.tilt(REWARD, BETA).expectation(REWARD), abs=2e-4)
