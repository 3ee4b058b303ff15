"""Samplers: exact laws by affine recursion against known digits, orders of convergence, memorylessness, and the draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import affine
import pytest
import torch
from affine import on_gaussian
from torch import Tensor
from torch.testing import assert_close

from tiltflow.control.path_weights import draw_paths
from tiltflow.errors import InputError, SettingsError
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.flows.guided import Guided
from tiltflow.flows.interpolant import DiscreteVariancePreserving, Linear
from tiltflow.flows.noise import noise
from tiltflow.laws.gaussian_mixture import ExactVelocity, mixture
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.plugins import names
from tiltflow.samplers import solvers
from tiltflow.samplers.chain import Chain, sde, step
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.rollout import rollout, rollout_ode, sample, simulate, solve
from tiltflow.samplers.sampling import Sampling, check_sampling
from tiltflow.samplers.solver import SOLVERS, ChainSolver, Solver, StochasticSolver, solver_named
from tiltflow.samplers.solvers.ddim import ddim
from tiltflow.samplers.solvers.dpm_solver_plus_plus import dpm_solver
from tiltflow.samplers.solvers.euler import euler
from tiltflow.samplers.solvers.euler_maruyama import euler_maruyama
from tiltflow.samplers.solvers.heun import heun
from tiltflow.samplers.solvers.memoryless import memoryless, memoryless_sigma
from tiltflow.samplers.solvers.memoryless_offset import memoryless_offset
from tiltflow.streams import stream
from tiltflow.testing.gaussian import law_of_states

pytestmark = pytest.mark.usefixtures("double")

STABLE_DIFFUSION = DiscreteVariancePreserving(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
STEPS = (10, 20, 40, 100, 200)


def offset_sde(times: Tensor) -> Chain:
    """The noise of 2409.08861, appendix G, with the drift that fits it."""
    h = times[1] - times[0]
    return sde(times, lambda t: torch.sqrt(2 * (1 - t + h) / (t + h)))


def noisy_to_the_end(times: Tensor) -> Chain:
    return memoryless(times, denoise=False)


def ddpm(times: Tensor) -> Chain:
    return ddim(times, eta=1.0)


def same(ours: Chain, theirs: Chain) -> bool:
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in ("times", "x_scale", "v_scale", "std"))


def order(steps: list[int], errors: list[float]) -> float:
    """The slope of log error over log step size."""
    x, y = torch.tensor(steps).double().log(), torch.tensor(errors).log()
    return -((x - x.mean()) * (y - y.mean())).sum().item() / (x - x.mean()).square().sum().item()


# ---- laws: variance at t = 1 over that of the data, for 10, 20, 40, 100, 200 steps ----


@pytest.mark.parametrize(
    ("make", "means", "ratios"),
    [
        (euler, [0.7] * 5, [0.742, 0.862, 0.929, 0.971, 0.985]),
        (memoryless_offset, [0.7448, 0.7248, 0.7131, 0.7054, 0.7027], [1.326, 1.178, 1.093, 1.038, 1.019]),
        (ddpm, [0.7] * 5, [0.597, 0.750, 0.856, 0.936, 0.967]),
    ],
)
def test_law_on_wide_data(make: Callable[[Tensor], Chain], means: list[float], ratios: list[float]) -> None:
    for steps, mean, ratio in zip(STEPS, means, ratios, strict=True):
        law = on_gaussian(make(time_grid(steps))).law()
        assert law[0].item() == pytest.approx(mean, abs=5.1e-5)
        assert law[1].item() / 0.25 == pytest.approx(ratio, abs=5.1e-4)


@pytest.mark.parametrize(
    ("make", "ratios"),
    [
        (offset_sde, [1.016, 1.003, 1.0004, 1.0, 1.0]),
        (noisy_to_the_end, [1.018, 1.0040, 1.0009, 1.0001, 1.0]),
        (memoryless, [1.028, 1.0051, 1.0011, 1.0002, 1.0]),
    ],
)
def test_law_of_the_unbiased_samplers(make: Callable[[Tensor], Chain], ratios: list[float]) -> None:
    for steps, ratio in zip(STEPS, ratios, strict=True):
        mean, variance = on_gaussian(make(time_grid(steps))).law()
        assert mean.item() == pytest.approx(0.7, abs=1e-12)
        assert variance.item() / 0.25 == pytest.approx(ratio, abs=5.1e-4 if steps < 40 else 5.1e-5)


@pytest.mark.parametrize(
    ("make", "ratios", "digit"),
    [
        (euler, [0.38, 0.63, 0.80, 0.91, 0.96], 0.01),
        (ddpm, [0.33, 0.51, 0.66, 0.82, 0.90], 0.01),
        (noisy_to_the_end, [2.29, 1.107, 1.023, 1.003, 1.001], 0.001),
        (memoryless, [1.24, 1.110, 1.025, 1.004, 1.001], 0.001),
        (offset_sde, [6.53], 0.01),
        (memoryless_offset, [4.07], 0.01),
    ],
)
def test_law_on_narrow_data(make: Callable[[Tensor], Chain], ratios: list[float], digit: float) -> None:
    for steps, ratio in zip(STEPS, ratios, strict=False):
        _, variance = on_gaussian(make(time_grid(steps)), variance=0.01).law()
        # ratios of 10 steps are printed with two decimals
        assert variance.item() / 0.01 == pytest.approx(ratio, abs=0.51 * (0.01 if steps == 10 else digit))


@pytest.mark.parametrize(
    ("steps", "wide", "narrow"),
    [
        (10, [0.834, 0.709, 1.018], [0.849, 0.722, 1.147]),
        (20, [0.903, 0.812, 0.991], [0.892, 0.777, 1.032]),
        (50, [0.955, 0.905, 0.990], [0.942, 0.859, 0.994]),
        (100, [0.976, 0.945, 0.993], [0.966, 0.909, 0.990]),
    ],
)
def test_law_on_the_timesteps_of_stable_diffusion(steps: int, wide: list[float], narrow: list[float]) -> None:
    """An uneven grid, from noise that holds some signal to data that holds some noise."""
    timestep = torch.arange(1000, 0, -1000 // steps) - 1
    square = STABLE_DIFFUSION(1 - (timestep + 1) / 1000).alpha ** 2
    square = torch.cat([square, (1 + square[-1:]) / 2])
    alpha, beta = square.sqrt(), (1 - square).sqrt()
    times = alpha / (alpha + beta)
    for data, ratios in ((1.0, wide), (0.25, narrow)):
        exact = times[-1] ** 2 * data + (1 - times[-1]) ** 2
        for make, ratio in zip((euler, ddpm, noisy_to_the_end), ratios, strict=True):
            _, variance = on_gaussian(make(times), variance=data).law(0.0, 1 / (alpha[0] + beta[0]) ** 2)
            assert (variance / exact).item() == pytest.approx(ratio, abs=5.1e-4)


# ---- steps ----


def test_ddpm_is_the_posterior_step_in_diffusion_coordinates(generator: torch.Generator) -> None:
    """DDIM(eta = 1) against 2409.08861, eq. 219, written in x and epsilon with abar."""
    square = torch.linspace(0.05, 0.95, 7)
    alpha, beta = square.sqrt(), (1 - square).sqrt()
    scale = alpha + beta
    chain = ddpm(alpha / scale)
    for k in range(6):
        x, epsilon = torch.randn(2, 5, generator=generator)
        now, then = square[k], square[k + 1]
        mean = torch.sqrt(then / now) * (x - (1 - now / then) / torch.sqrt(1 - now) * epsilon)
        std = torch.sqrt((1 - then) / (1 - now) * (1 - now / then))
        v = (x - beta[k] * epsilon) / alpha[k] - epsilon
        assert_close(chain.mean(k, x / scale[k], v) * scale[k + 1], mean)
        assert_close(chain.std[k] * scale[k + 1], std)


@pytest.mark.parametrize("times", [time_grid(7), time_grid(7, start=0.06, shift=3.0)])
def test_ddim_without_noise_is_euler(times: Tensor) -> None:
    ours, theirs = ddim(times, eta=0.0), euler(times)
    for name in ("x_scale", "v_scale", "std"):
        assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=1e-15)


def test_ddim_scales_the_noise_by_eta_and_keeps_the_noise_level() -> None:
    """Given x_1 and x_0, the next state has mean s x_1 + sqrt((1 - s)^2 - std^2) x_0: with fresh noise, level 1 - s."""
    times = time_grid(9)
    full, half = ddim(times, eta=1.0), ddim(times, eta=0.5)
    assert_close(half.std, full.std / 2)
    t, s = times[:-1], times[1:]
    on_x0 = half.x_scale * (1 - t) - half.v_scale  # x = t x_1 + (1 - t) x_0, v = x_1 - x_0
    on_x1 = half.x_scale * t + half.v_scale
    assert_close(on_x1, s)
    assert_close(on_x0**2 + half.std**2, (1 - s) ** 2)


def test_sde_is_euler_maruyama_of_the_score_drift(generator: torch.Generator) -> None:
    """kappa x + (sigma^2 / 2 + eta) score (2409.08861, eq. 10) for any sigma, on an uneven grid."""
    times = time_grid(8, start=0.1, shift=2.0)
    t, h = times[:-1], times.diff()
    sigma = 0.3 + t
    chain = sde(times, lambda t: 0.3 + t)
    x = torch.randn(8, generator=generator)
    score = -(x - t * affine.MEAN) / (t**2 * affine.VARIANCE + (1 - t) ** 2)
    drift = x / t + (sigma**2 / 2 + (1 - t) / t) * score
    assert_close(chain.x_scale * x + chain.v_scale * affine.velocity(x, t), x + h * drift)
    assert_close(chain.std, sigma * h.sqrt())


def test_sde_without_noise_is_euler() -> None:
    assert same(sde(time_grid(7), torch.zeros_like), euler(time_grid(7)))


def test_memoryless_starts_with_a_jump_and_ends_without_noise(generator: torch.Generator) -> None:
    times = time_grid(6, start=0.1)
    chain, noisy = memoryless(times), noisy_to_the_end(times)
    x1, x0 = torch.randn(2, 5, generator=generator)
    t, s = times[0].item(), times[1].item()
    assert_close(chain.mean(0, t * x1 + (1 - t) * x0, x1 - x0), s * x1)
    assert chain.std[0] == 1 - s
    inside, last = sde(times, memoryless_sigma), euler(times)
    for name in ("x_scale", "v_scale", "std"):
        assert torch.equal(getattr(chain, name)[:-1], getattr(noisy, name)[:-1])
        assert torch.equal(getattr(noisy, name)[1:], getattr(inside, name)[1:])
        assert torch.equal(getattr(chain, name)[-1], getattr(last, name)[-1])


def test_memoryless_noise_is_that_of_the_interpolant() -> None:
    t = torch.linspace(0.05, 0.95, 9)
    assert_close(memoryless_sigma(t), Linear()(t).memoryless_sigma)


def test_memoryless_offset_is_as_printed() -> None:
    """2409.08861, eq. 40 and 236 with kappa = 1 / (t + h): for 4 steps, by hand."""
    chain = memoryless_offset(time_grid(4))
    assert chain.x_scale.tolist() == pytest.approx([1 - 0.25 / 0.25, 1 - 0.25 / 0.5, 1 - 0.25 / 0.75, 1 - 0.25])
    assert chain.v_scale.tolist() == pytest.approx([0.5] * 4)
    sigma_squared = [2 * 1.25 / 0.25, 2 * 1.0 / 0.5, 2 * 0.75 / 0.75, 2 * 0.5 / 1.0]
    assert chain.std.tolist() == pytest.approx([math.sqrt(0.25 * s) for s in sigma_squared])


def test_control_is_the_change_of_velocity_in_units_of_noise() -> None:
    """w = sqrt(h) u with sigma u = (1 + sigma^2 / (2 eta)) dv; in the jump h dv / (1 - h); 0 without noise."""
    times = time_grid(8, start=0.1)
    t, h = times[:-1], times.diff()
    sigma, eta = 0.3 + t, (1 - t) / t
    assert_close(sde(times, lambda t: 0.3 + t).control_scale, h.sqrt() * (1 + sigma**2 / (2 * eta)) / sigma)
    scale = memoryless(time_grid(10)).control_scale
    assert scale[0].item() == pytest.approx(0.1 / 0.9)
    assert scale[5].item() == pytest.approx(math.sqrt(0.1) * 2 / math.sqrt(2))
    assert scale[9].item() == 0
    assert euler(times).control_scale.tolist() == [0] * 8


# ---- convergence ----


@pytest.mark.parametrize("sigma", [torch.ones_like, lambda t: 2 * (1 - t), lambda t: (1 + t).sqrt(), torch.zeros_like])
def test_marginals_do_not_depend_on_the_noise_level(sigma: Callable[[Tensor], Tensor]) -> None:
    steps = [80, 160, 320, 640]
    errors = [abs(on_gaussian(sde(time_grid(n), sigma)).law()[1].item() - affine.VARIANCE) for n in steps]
    assert errors[-1] < 2 / 640
    assert order(steps, errors) == pytest.approx(1, abs=0.1)


def gaussian_flow(x: Tensor, t: Tensor) -> Tensor:
    return affine.velocity(x, t)


def test_euler_has_order_1_and_heun_order_2(generator: torch.Generator) -> None:
    """The ODE takes x_0 to m + s x_0."""
    x = torch.tensor([-1.5, 0.2, 1.0])
    exact, steps = 0.7 + 0.5 * x, [40, 80, 160, 320]
    for solver, expected in (("euler", 1), ("heun", 2)):
        samplings = [Sampling(solver=solver, num_inference_steps=n) for n in steps]
        errors = [(sample(gaussian_flow, x, s, generator) - exact).abs().max().item() for s in samplings]
        assert order(steps, errors) == pytest.approx(expected, abs=0.1)


def test_dpm_solver_has_order_2() -> None:
    """Away from t = 1, where its last step is of order 1; the ODE keeps (x - t m) / sqrt(t^2 s^2 + (1 - t)^2)."""
    errors, steps = [], [40, 80, 160, 320]
    for n in steps:
        times = torch.linspace(0.1, 0.9, n + 1)
        spread = torch.hypot(0.5 * times, 1 - times)
        x = torch.tensor([-1.5, 0.2, 1.0])
        exact = 0.7 * 0.9 + spread[-1] / spread[0] * (x - 0.7 * 0.1)
        errors.append((dpm_solver(gaussian_flow, x, times)[-1] - exact).abs().max().item())
    assert order(steps, errors) == pytest.approx(2, abs=0.1)


def test_dpm_solver_extrapolates_the_denoised_sample_in_log_snr() -> None:
    """Two steps by hand, for x1hat = a + b log(t / (1 - t)), v = (x1hat - x) / (1 - t). The second step takes x1hat from
    its middle, in log(t / (1 - t)), where the line through the last two values has it exactly."""
    a, b, times = 0.3, 0.2, torch.tensor([0.2, 0.5, 0.6])

    def flow(x: Tensor, t: Tensor) -> Tensor:
        return (a + b * torch.logit(t) - x) / (1 - t)

    middle = a + b * (torch.logit(times[1]) + torch.logit(times[2])) / 2
    first = (1 - 0.5) / (1 - 0.2) * 1.0 + (0.5 - 0.2 * (1 - 0.5) / (1 - 0.2)) * (a + b * torch.logit(times[0]))
    second = (1 - 0.6) / (1 - 0.5) * first + (0.6 - 0.5 * (1 - 0.6) / (1 - 0.5)) * middle
    assert_close(torch.cat(dpm_solver(flow, torch.ones(1), times)), torch.stack([torch.ones(()), first, second]))


def test_dpm_solver_evaluates_once_a_step() -> None:
    asked = []

    def flow(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.item())
        return gaussian_flow(x, t)

    assert len(dpm_solver(flow, torch.zeros(1), time_grid(4))) == 5
    assert asked == [0, 0.25, 0.5, 0.75]


def test_heun_never_evaluates_the_network_at_the_data_end() -> None:
    asked = []

    def flow(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.item())
        return gaussian_flow(x, t)

    heun(flow, torch.zeros(1), time_grid(4))
    assert asked == [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


# ---- memory ----


@pytest.mark.parametrize("make", [memoryless, noisy_to_the_end, ddpm])
@pytest.mark.parametrize("variance", [0.01, 0.25, 1.0])
def test_memoryless_chains_forget_their_start_exactly(make: Callable[[Tensor], Chain], variance: float) -> None:
    assert on_gaussian(make(time_grid(40)), variance=variance).gain.prod() == 0


@pytest.mark.parametrize(("variance", "correlation"), [(0.25, -4.6e-4), (0.01, -5e-5), (1.0, -1.0e-3)])
def test_offset_chain_remembers_a_little(variance: float, correlation: float) -> None:
    chain = on_gaussian(memoryless_offset(time_grid(40)), variance=variance)
    result = chain.gain.prod() / chain.law()[1].sqrt()
    assert result.item() == pytest.approx(correlation, rel=0.05)  # two printed digits


@pytest.mark.parametrize(("c", "correlation"), [(1.0, 0.013), (0.245, 0.344)])
def test_scaled_noise_forgets_slowly(c: float, correlation: float) -> None:
    """sigma^2 = 2 c eta from t_0 on leaves the correlation rho^c, rho that of X_{t_0} and X_1 under the interpolant."""
    start, s2 = 0.025, affine.VARIANCE
    variance = start**2 * s2 + (1 - start) ** 2
    rho = start * math.sqrt(s2 / variance)

    def left(steps: int) -> float:
        chain = sde(time_grid(steps, start=start), lambda t: memoryless_sigma(t) * math.sqrt(c))
        return on_gaussian(chain).gain.prod().item() * math.sqrt(variance / s2)

    assert 2 * left(8000) - left(4000) == pytest.approx(rho**c, rel=1e-4)  # Richardson: the error left is of order h^2
    assert rho**c == pytest.approx(correlation, abs=5e-4)


# ---- grids ----


def test_time_grid_is_uniform_from_start_to_1() -> None:
    assert time_grid(4).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert time_grid(4, start=0.2).tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])


def test_shift_multiplies_the_odds_of_noise() -> None:
    plain, shifted = time_grid(8)[1:], time_grid(8, shift=3.0)[1:]
    assert_close((1 - shifted) / shifted, 3 * (1 - plain) / plain)
    assert time_grid(8, shift=3.0)[0] == 0
    assert_close(time_grid(8, start=0.1, shift=3.0)[1:], 0.1 + 0.9 * shifted)


def test_spacing_middle_spends_its_steps_in_the_middle() -> None:
    """Their density is 6 t (1 - t), so that 3 t^2 - 2 t^3 is even; the ends are exact, and the shift comes after it."""
    times = time_grid(40, spacing="middle")
    assert_close(3 * times**2 - 2 * times**3, time_grid(40))
    assert (times[0], times[20], times[-1]) == (0, 0.5, 1)
    assert times.diff().argmax() in (0, 39)
    assert times.diff()[20].item() == pytest.approx(1 / 40 / 1.5, rel=1e-3)
    both = time_grid(40, start=0.1, shift=3.0, spacing="middle")
    odds, shifted = (1 - times[1:]) / times[1:], (1 - both[1:]) / (both[1:] - 0.1)
    assert_close(shifted, 3 * odds)


@pytest.mark.parametrize(
    ("sampling", "chain"),
    [
        (Sampling(), memoryless(time_grid(40))),
        (Sampling(num_inference_steps=9, spacing="middle"), memoryless(time_grid(9, spacing="middle"))),
        (Sampling(solver="memoryless-offset", num_inference_steps=7), memoryless_offset(time_grid(7))),
        (Sampling(solver="ddpm", num_inference_steps=7, eta=0.3), ddim(time_grid(7), eta=1.0)),
        (Sampling(solver="ddim", num_inference_steps=7, eta=0.3), ddim(time_grid(7), eta=0.3)),
        (Sampling(solver="euler", num_inference_steps=7, shift=3.0), euler(time_grid(7, shift=3.0))),
    ],
)
def test_solver_names(sampling: Sampling, chain: Chain) -> None:
    assert same(sampling.chain(), chain)


def test_chain_starts_where_the_noise_is() -> None:
    assert same(Sampling(shift=2.0).chain(0.06), memoryless(time_grid(40, start=0.06, shift=2.0)))
    with pytest.raises(ValueError, match="heun"):
        Sampling(solver="heun").chain()


# ---- draws ----


def test_each_step_draws_from_its_normal_law(generator: torch.Generator) -> None:
    chain, n = memoryless(time_grid(5)), 10_000
    path = rollout(chain, gaussian_flow, torch.randn(n, 1, generator=generator), generator)
    assert path.chain is chain
    draws = []
    for k, v in enumerate(path.velocities):
        x = path.states[k]
        assert torch.equal(v, gaussian_flow(x, chain.times[k]))
        mean = chain.x_scale[k] * x + chain.v_scale[k] * v
        draws.append((path.states[k + 1] - mean) / chain.std[k])
    draw = torch.cat(draws, 1)
    z = [draw.mean(0) * n**0.5, (draw.var(0) - 1) * (n / 2) ** 0.5, torch.stack([draw[:, 0] @ d for d in draws[1:]]) / n**0.5]
    assert torch.cat([value.flatten() for value in z]).abs().max() < 4


def test_rollout_leaves_out_the_last_step_only_if_it_has_no_noise(generator: torch.Generator) -> None:
    x = torch.zeros(2, 1)
    for chain, taken in ((memoryless(time_grid(5)), 4), (noisy_to_the_end(time_grid(5)), 5), (ddpm(time_grid(5)), 4)):
        path = rollout(chain, gaussian_flow, x, generator)
        assert (len(path.states), len(path.velocities)) == (taken + 1, taken)
        assert torch.equal(path.states[0], x)


def test_sample_is_the_rollout_and_the_last_step() -> None:
    x = torch.linspace(-1, 1, 4)[:, None]
    chain = memoryless(time_grid(5, start=0.06))
    path = rollout(chain, gaussian_flow, x, stream(1))
    last = path.states[-1] + (1 - chain.times[4].item()) * gaussian_flow(path.states[-1], chain.times[4])
    result = sample(gaussian_flow, x, Sampling(num_inference_steps=5), stream(1), start=0.06)
    assert_close(result, last)
    assert torch.equal(result, sample(gaussian_flow, x, Sampling(num_inference_steps=5), stream(1), start=0.06))
    assert not torch.equal(result, sample(gaussian_flow, x, Sampling(num_inference_steps=5), stream(2), start=0.06))


def test_step_without_noise_draws_nothing() -> None:
    chain, g = euler(time_grid(4)), stream(0)
    before = g.get_state()
    x, v = torch.ones(2, 1), torch.full((2, 1), 3.0)
    assert step(chain, 0, x, v, g).tolist() == [[1.75], [1.75]]
    assert torch.equal(g.get_state(), before)


def test_noise_is_standard_normal_in_the_networks_coordinates() -> None:
    flow = Flow(lambda x, t: x, "epsilon", STABLE_DIFFUSION)
    alpha = 0.0682652  # sqrt(abar_999), printed as .0683
    scale = alpha + math.sqrt(1 - alpha**2)
    result = noise(flow, (3, 2), stream(5), torch.float64)
    assert_close(result * scale, torch.randn(3, 2, generator=stream(5)), rtol=0, atol=1e-6)
    assert noise(Flow(lambda x, t: x), (3, 2), stream(5)).dtype == torch.float32


# ---- the energy: what a change of velocity costs ----


@pytest.mark.parametrize(
    ("steps", "eta", "transitions", "continuous"),
    [
        (10, 1.0, 40.06, 3.59),
        (25, 1.0, 16.92, 4.48),
        (50, 1.0, 11.00, 4.97),
        (100, 1.0, 8.43, 5.35),
        (250, 1.0, 7.08, 5.72),
        (50, 0.5, 23.61, 7.77),
        (50, 0.2, 124.86, 33.61),
    ],
)
def test_path_kl_of_ddim_on_stable_diffusion(steps: int, eta: float, transitions: float, continuous: float) -> None:
    """Of a change of epsilon by 1 at all its timesteps, leading spacing with an offset of 1: known digits."""
    timestep = torch.arange(steps).flip(0) * (1000 // steps) + 1
    visited = torch.cat([timestep, (timestep[-1:] - 1000 // steps).clamp(min=0)])
    c = STABLE_DIFFUSION(1 - (visited + 1) / 1000)
    chain = ddim(c.alpha / (c.alpha + c.beta), eta)
    per_epsilon = chain.times[:-1] ** -2  # epsilon = x - t v
    assert (chain.control_scale**2 * per_epsilon).sum().item() / 2 == pytest.approx(transitions, abs=0.0051)
    assert (chain.energy * per_epsilon).sum().item() / 2 == pytest.approx(continuous, abs=0.0051)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_energy_of_ddim_is_the_path_kl_of_small_steps(eta: float) -> None:
    errors = []
    for steps in (400, 800):
        chain = ddim(torch.linspace(0.1, 0.9, steps + 1), eta)
        errors.append((chain.control_scale**2 / chain.energy - 1).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] < 0.03


@pytest.mark.parametrize("make", [memoryless, ddpm, euler, euler_maruyama])
def test_energies_are_one_integral(make: Callable[[Tensor], Chain]) -> None:
    """Of 2 t / (1 - t), the energy of the memoryless process, whatever the sampler."""
    errors = []
    for steps in (200, 400):
        times = torch.linspace(0.1, 0.9, steps + 1)
        energy = make(times).energy[:-1].sum().item()
        exact = 2 * (math.log(0.9 / (1 - times[-2].item())) - (times[-2].item() - 0.1))
        errors.append(abs(energy / exact - 1))
    assert errors[0] < 0.03
    assert errors[1] < 0.6 * errors[0]


def test_energy_of_the_memoryless_chain_is_its_path_kl() -> None:
    chain = memoryless(time_grid(7))
    assert_close(chain.energy[:-1], chain.v_scale[:-1] ** 2 / chain.std[:-1] ** 2)
    assert torch.isfinite(ddpm(time_grid(7)).energy).all()
    assert_close(ddpm(time_grid(7)).energy[0], ddpm(time_grid(7)).control_scale[0] ** 2)


# ---- the variance-preserving diffusion in its own time ----


@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_euler_maruyama_is_that_of_the_diffusion(eta: float, generator: torch.Generator) -> None:
    """x' = x + D (x / 2 + (1 + eta^2) / 2 score) + eta sqrt(D) eps in the diffusion's own coordinates."""
    sampling = Sampling(solver="euler-maruyama", num_inference_steps=5, eta=eta)
    horizon = 2.0
    start = math.exp(-horizon / 2) / (math.exp(-horizon / 2) + math.sqrt(1 - math.exp(-horizon)))
    chain, D = sampling.chain(start), horizon / 5
    alpha = torch.exp(-(horizon - D * torch.arange(6)) / 2)
    beta = (1 - alpha**2).sqrt()
    assert_close(chain.times, alpha / (alpha + beta))
    X, v = torch.randn(2, 3, generator=generator)
    for k in range(5):
        z, t = X / (alpha + beta)[k], chain.times[k]
        score = -(z - t * v) / beta[k]
        expected = X + D * (X / 2 + (1 + eta**2) / 2 * score)
        assert_close(chain.mean(k, z, v) * (alpha + beta)[k + 1], expected)
        assert_close(chain.std[k] * (alpha + beta)[k + 1], torch.tensor(eta * D**0.5))


def test_euler_maruyama_needs_a_start_above_pure_noise() -> None:
    with pytest.raises(InputError, match="needs a diffusion model"):
        Sampling(solver="euler-maruyama").chain()


# ---- the path KL ----


def test_the_costs_of_a_constant_change_of_velocity() -> None:
    """sum_k |w_k|^2 / 2 with w_k the change in units of the noise, over the steps that have some."""
    chain, change = memoryless(time_grid(5)), torch.tensor([0.3, -0.1])
    tuned = FunctionField(lambda x, t: gaussian_flow(x, t) + change)
    drawn = torch.zeros(3, dtype=torch.bool)
    costs = draw_paths(chain, tuned, FunctionField(gaussian_flow), torch.zeros(3, 2), drawn, stream(1)).costs
    expected = (chain.v_scale[:4] / chain.std[:4]).square().sum() * change.square().sum() / 2
    assert_close(costs, expected.expand(3))


# ---- solvers of one's own ----


def midpoint(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor) -> list[Tensor]:
    states = [x]
    for t, s in pairwise(times):
        half = x + (s - t) / 2 * velocity(x, t)
        x = x + (s - t) * velocity(half, (t + s) / 2)
        states.append(x)
    return states


@pytest.mark.parametrize("solver", [heun, dpm_solver, midpoint])
def test_rollouts_keep_states_and_velocities(solver: Callable[..., list[Tensor]], generator: torch.Generator) -> None:
    asked = []

    def flow(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.item())
        return gaussian_flow(x, t)

    x, times = torch.randn(4, 1, generator=generator), time_grid(6)
    path = rollout_ode(solver, times, flow, x)
    alone = len(asked)
    assert [value.shape for value in (*path.states, *path.velocities)] == (7 + 6) * [x.shape]
    assert torch.equal(path.states[-1], solver(gaussian_flow, x, times)[-1])
    for state, t, v in zip(path.states, times, path.velocities, strict=False):
        assert_close(v, gaussian_flow(state, t))
    assert alone == {heun: 11, dpm_solver: 6, midpoint: 12}[solver]  # nothing is evaluated twice


@pytest.mark.parametrize("solver", [heun, dpm_solver, midpoint])
def test_what_acts_may_be_another_velocity(solver: Callable[..., list[Tensor]], generator: torch.Generator) -> None:
    """The path is that of the guided field, and the velocities along it are those of the field itself."""
    guided = Guided(FunctionField(gaussian_flow), FunctionField(lambda x, t: 0 * x), 2.0)
    x, times = torch.randn(3, 1, generator=generator), time_grid(6)
    path = rollout_ode(solver, times, gaussian_flow, x, act=guided.guide)
    for state, expected in zip(path.states, solver(guided, x, times), strict=True):
        assert_close(state, expected)
    for k, v in enumerate(path.velocities):
        assert_close(v, gaussian_flow(path.states[k], times[k]))
    chain = memoryless(times)
    path = rollout(chain, gaussian_flow, x, stream(1), act=guided.guide)
    drawn = [path.noise(k) for k in range(5)]
    for k, v in enumerate(path.velocities):
        assert torch.equal(v, gaussian_flow(path.states[k], times[k]))
        assert_close(path.states[k + 1], chain.mean(k, path.states[k], 2 * v) + chain.std[k] * drawn[k])
    assert torch.equal(path.states[-1], rollout(chain, guided, x, stream(1)).states[-1])
    for k, eps in enumerate(drawn):
        assert_close(eps, rollout(chain, guided, x, stream(1)).noise(k))
    some, pairs = torch.tensor([2, 0]), (torch.tensor([4, 0, 2]), torch.tensor([1, 2, 0]))
    assert torch.equal(path.noise_at(*pairs), torch.stack([drawn[k][i] for k, i in zip(*pairs, strict=True)]))
    fewer = path.keep(some)
    assert torch.equal(torch.stack([fewer.noise(k) for k in range(5)]), torch.stack(drawn)[:, some])


def test_velocities_that_a_solver_did_not_ask_for_are_computed() -> None:
    """One that evaluates elsewhere, or copies its states."""

    def copies(velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor) -> list[Tensor]:
        return [state.clone() for state in midpoint(velocity, x, times)]

    path = rollout_ode(copies, time_grid(3), gaussian_flow, torch.ones(2, 1))
    for state, t, v in zip(path.states, time_grid(3), path.velocities, strict=False):
        assert_close(v, gaussian_flow(state, t))


@pytest.mark.parametrize(
    ("solver", "message"),
    [
        (lambda v, x, times: [x], r"a list of 4 states, one for each time, got 1 states"),
        (lambda v, x, times: x, r"a list of 4 states, one for each time, got Tensor"),
        (lambda v, x, times: 4 * [x[:1]], r"state at t = 0 must be a tensor of shape \[2, 1\], got shape \[1, 1\]"),
        (lambda v, x, times: [x, x, 0.5, x], r"state at t = 0.6667 must be a tensor of shape \[2, 1\], got float"),
    ],
)
def test_solvers_that_return_something_else_are_refused(solver: Callable[..., list[Tensor]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rollout_ode(solver, time_grid(3), gaussian_flow, torch.ones(2, 1))
    with pytest.raises(InputError, match=message):
        solve(solver, gaussian_flow, torch.ones(2, 1), time_grid(3))


def test_solvers_by_name_of_a_function(generator: torch.Generator) -> None:
    sampling, x = Sampling(solver="test_sampler:midpoint", num_inference_steps=80), torch.tensor([[0.3], [-1.0]])
    assert_close(sample(gaussian_flow, x, sampling, generator), 0.7 + 0.5 * x, atol=1e-3, rtol=0)
    with pytest.raises(InputError, match=r"test_sampler has no 'midpont', did you mean 'midpoint'"):
        sample(gaussian_flow, x, Sampling(solver="test_sampler:midpont"), generator)
    with pytest.raises(SettingsError, match="there is no solver 'huen', did you mean 'heun'"):
        Sampling(solver="huen")


# ---- solvers as values ----


ODES = ("euler", "heun", "dpm-solver++")


def measured_order(solver: Solver) -> float:
    """Of the variance of a chain's law, and of the paths of an ODE solver, away from the end."""
    steps, errors = [40, 80, 160, 320], []
    for n in steps:
        times = torch.linspace(0.1, 0.9, n + 1)
        spread = torch.hypot(0.5 * times, 1 - times)
        if isinstance(solver, ChainSolver):
            law = on_gaussian(solver.chain(times)).law(0.7 * 0.1, spread[0] ** 2)
            errors.append(abs(law[1].item() - spread[-1].item() ** 2))
        elif isinstance(solver, StochasticSolver):
            errors.append(abs(law_of_states(solver, times)[1] - spread[-1].item() ** 2))
        else:
            x = torch.tensor([-1.5, 0.2, 1.0])
            exact = 0.7 * 0.9 + spread[-1] / spread[0] * (x - 0.7 * 0.1)
            errors.append((solver.states(gaussian_flow, x, times)[-1] - exact).abs().max().item())
    return order(steps, errors)


@pytest.mark.parametrize("eta", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", names(SOLVERS))
def test_a_solver_is_what_it_says_of_itself(name: str, eta: float) -> None:
    solver = solver_named(name, eta)
    assert solver == Sampling(solver=name, eta=eta).build()
    noise = (name not in ODES, name not in ODES and not isinstance(solver, StochasticSolver))
    assert (solver.has_noise, solver.is_memoryless) == (
        (eta > 0, name != "stochastic-heun" and (eta == 1 or (name == "tcd" and eta > 0))) if solver.uses_eta else noise
    )
    assert solver.order is not None
    assert measured_order(solver) > solver.order - 0.1
    if isinstance(solver, ChainSolver):
        chain = solver.chain(solver.times(40, start=1e-3))
        assert bool((chain.std > 0).any()) == solver.has_noise
        assert (abs(on_gaussian(chain).gain.prod().item()) < 2e-3) == solver.is_memoryless


def test_stochastic_heun_is_exact_where_heun_is_and_the_noise_changes_no_marginal(generator: torch.Generator) -> None:
    """A point mass at 0.7: x_t = 0.7 t + (1 - t) x_0, whose paths are straight, so that Heun's method makes no error."""

    def to_a_point(x: Tensor, t: Tensor) -> Tensor:
        return (0.7 - x) / (1 - t)

    solver, times = solver_named("stochastic-heun"), time_grid(6)
    assert isinstance(solver, StochasticSolver)
    x = torch.randn(200_000, 1, generator=generator, dtype=torch.float64)
    states = solver.states(to_a_point, x, times, lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype))
    for t, state in zip(times[:-1], states, strict=False):
        assert abs(state.mean() - 0.7 * t) < 4 * (1 - t) / 200_000**0.5
        assert abs(state.var() / (1 - t) ** 2 - 1) < 4 * (2 / 200_000) ** 0.5
    assert_close(states[-1], torch.full_like(x, 0.7))
    assert abs(torch.corrcoef(torch.stack([states[-2][:, 0], x[:, 0]]))[0, 1]) < 0.5  # it forgets


@pytest.mark.parametrize(("eta", "one", "two"), [(1.0, 0.5, 0.875), (0.5, 0.375, 0.8125)])
def test_stochastic_heun_goes_half_a_step_too_far_and_comes_back(eta: float, one: float, two: float) -> None:
    times = torch.tensor([0.0, 0.25, 0.75, 1.0], dtype=torch.float64)
    solver, asked = solver_named("stochastic-heun", eta), list[float]()
    assert isinstance(solver, StochasticSolver)

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        asked.append(float(t))
        return torch.ones_like(x)

    states = solver.states(recorded, torch.zeros(1, dtype=torch.float64), times, torch.ones_like)
    assert asked == [0, one, 0.25, two, 0.75]
    first = 0.25 / one * one + (0.75**2 - (0.25 / one * (1 - one)) ** 2) ** 0.5
    second = 0.75 / two * (first + two - 0.25) + (0.25**2 - (0.75 / two * (1 - two)) ** 2) ** 0.5
    assert_close(torch.cat(states).tolist(), [0.0, first, second, second + 0.25])


def test_stochastic_heun_without_noise_is_heun() -> None:
    still, x = Sampling(solver="stochastic-heun", eta=0), torch.linspace(-2, 2, 5)[:, None]
    assert not still.has_noise
    ode = sample(gaussian_flow, x, Sampling(solver="heun"), torch.Generator())
    assert_close(sample(gaussian_flow, x, still, torch.Generator()), ode)


def test_in_few_steps_between_modes_stochastic_heun_is_nearer_than_the_sde(generator: torch.Generator) -> None:
    law = mixture(torch.tensor([[-1.5], [1.5]]), (0.05, 0.95), (0.3, 0.5))
    flow, start = Flow(ExactVelocity(law)), torch.randn(100_000, 1, generator=generator)
    shares = {}
    for solver in ("memoryless", "stochastic-heun"):
        x = sample(flow, start, Sampling(solver=solver, num_inference_steps=15), generator)
        shares[solver] = (x > 0).double().mean().item()
    exact = law.sample(1_000_000, generator)
    right = (exact > 0).double().mean().item()
    assert abs(shares["stochastic-heun"] - right) < 4 * (0.05 / 100_000) ** 0.5
    assert abs(shares["memoryless"] - right) > 3 * abs(shares["stochastic-heun"] - right)


def test_stochastic_heun_is_not_tuned() -> None:
    sampling = Sampling(solver="stochastic-heun")
    with pytest.raises(ValueError, match="no chain of Gaussian steps"):
        sampling.chain()
    with pytest.raises(ValueError, match="no chain of Gaussian steps"):
        simulate(gaussian_flow, torch.zeros(1), sampling, torch.Generator())
    with pytest.raises(SettingsError, match="must be a memoryless solver"):
        AdjointMatching(solver="stochastic-heun")
    with pytest.raises(SettingsError, match="no transition densities"):
        ScoreAsAction(solver="stochastic-heun")


def test_a_solver_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    """Two, which someone adds: an ODE solver, and a chain with noise. Everything that names solvers knows them."""
    head = "from tiltflow.samplers.chain import sde\nfrom tiltflow.samplers.solver import ChainSolver, OdeSolver\n"
    (tmp_path / "mid_point.py").write_text(
        f"{head}from test_sampler import midpoint\n"
        "class MidPoint(OdeSolver):\n"
        "    order = 2\n"
        "    def states(self, velocity, x, times): return midpoint(velocity, x, times)\n"
    )
    (tmp_path / "forgetful.py").write_text(
        f"{head}class Forgetful(ChainSolver):\n"
        "    has_noise = is_memoryless = True\n"
        "    def chain(self, times):\n"
        "        h = times[1] - times[0]\n"
        "        return sde(times, lambda t: (2 * (1 - t + h) / (t + h)).sqrt())\n"
    )
    monkeypatch.setattr(solvers, "__path__", [*solvers.__path__, str(tmp_path)])
    assert {"mid-point", "forgetful", "euler"} < set(names(SOLVERS))
    assert measured_order(solver_named("mid-point")) > 1.9

    x, sampling = torch.tensor([[0.3], [-1.0]]), Sampling(solver="mid-point", num_inference_steps=80)
    assert not sampling.has_noise
    assert "no noise" in sampling.limits()[0]
    assert_close(sample(gaussian_flow, x, sampling, generator), 0.7 + 0.5 * x, atol=1e-3, rtol=0)
    assert OrwCfmW2(solver="mid-point").sampling.solver == "mid-point"
    assert ScoreAsAction(solver="mid-point").estimator == "closed-form"

    assert same(AdjointMatching(solver="forgetful", num_inference_steps=7).chain(), offset_sde(time_grid(7)))
    assert ScoreAsAction(solver="forgetful").estimator == "return-minus-value"
    assert Sampling(solver="forgetful").limits() == []
    with pytest.raises(SettingsError, match="solver 'forgetful' has noise"):
        OrwCfmW2(solver="forgetful")
    with pytest.raises(SettingsError, match=r"a memoryless solver \(.*ddim, .*ddpm, .*forgetful, .*\), is 'mid-point'"):
        AdjointMatching(solver="mid-point")
    with pytest.raises(SettingsError, match="there is no solver 'forgetfull', did you mean 'forgetful'"):
        AdjointMatching(solver="forgetfull")


# ---- where the tilted law is out of reach ----


@pytest.mark.parametrize(
    ("settings", "start", "words"),
    [
        ({"solver": "memoryless"}, 0.0, []),
        ({"solver": "ddpm"}, 0.006, []),
        ({"solver": "ddim", "eta": 0.5}, 0.0, ["not memoryless"]),
        ({"solver": "ddim", "eta": 0.0}, 0.0, ["no noise"]),
        ({"solver": "heun"}, 0.0, ["no noise"]),
        ({"solver": "memoryless-offset"}, 0.0, ["biased at the order of its step"]),
        # alpha^2 = exp(-2) of the variance is left: 13.5 %
        ({"solver": "euler-maruyama"}, math.exp(-1) / (math.exp(-1) + math.sqrt(1 - math.exp(-2))), ["holds 13.5% of"]),
    ],
)
def test_samplers_say_why_the_tilted_law_is_out_of_reach(settings: dict[str, object], start: float, words: list[str]) -> None:
    limits = Sampling.model_validate(settings).limits(start)
    assert len(limits) == len(words)
    for limit, word in zip(limits, words, strict=True):
        assert word in limit


def test_without_noise_every_step_is_an_action() -> None:
    """A chain that has none is rolled out to the end where that is asked for, and priced as the transport that it is."""
    x, generator = torch.ones(2, 1), stream(0)
    for chain in (euler(time_grid(4)), ddim(time_grid(4), 0.0), memoryless(time_grid(4))):
        path = rollout(chain, gaussian_flow, x, generator, to_the_end=True)
        assert len(path.states) == 5
    for chain in (ddim(time_grid(4), 0.0), euler_maruyama(time_grid(4, start=0.1), 0.0)):
        assert_close(chain.energy, euler(chain.times).energy)


def test_a_sampling_of_another_kind_is_refused() -> None:
    check_sampling(None)
    check_sampling(Sampling())
    with pytest.raises(InputError, match="sampling must be a Sampling"):
        check_sampling(40)
