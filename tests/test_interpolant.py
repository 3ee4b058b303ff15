"""Interpolants and conversions, against closed forms, autograd and schedules computed in plain Python."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tiltflow.flows.interpolant import (
    Coefficients,
    Cosine,
    DiscreteVariancePreserving,
    Interpolant,
    Linear,
    VariancePreserving,
    convert,
    expand,
    interior,
    linear_time,
    mixture_weights,
)

pytestmark = pytest.mark.usefixtures("double")

STABLE_DIFFUSION = DiscreteVariancePreserving(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
DIFFUSIONS: list[Interpolant] = [
    Cosine(),
    VariancePreserving(),
    VariancePreserving(beta_min=0.5, beta_max=8.0),
    DiscreteVariancePreserving(),
    STABLE_DIFFUSION,
    DiscreteVariancePreserving(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2"),
]
PATHS = [Linear(), *DIFFUSIONS]
QUANTITIES = ("velocity", "epsilon", "v", "x1", "score")

over_paths = pytest.mark.parametrize("path", PATHS, ids=repr)


def times() -> Tensor:
    """Inside (0, 1), on no knot of a discrete schedule."""
    return torch.linspace(0.0123, 0.9877, 37)


def slope(f: Tensor, s: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(f.sum(), s, retain_graph=True)
    return gradient


# ---- the schedules ----


@over_paths
def test_data_end_is_clean(path: Interpolant) -> None:
    c = path(torch.ones(()))
    assert (c.alpha, c.beta) == pytest.approx((1, 0), abs=1e-15)


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=repr)
def test_noise_end_is_pure(path: Interpolant) -> None:
    c = path(torch.zeros(()))
    assert (c.alpha, c.beta) == (0, 1)


@over_paths
def test_derivatives_are_those_of_autograd(path: Interpolant) -> None:
    s = times().requires_grad_()
    c = path(s)
    assert_close(c.d_alpha, slope(c.alpha, s))
    assert_close(c.d_beta, slope(c.beta, s))


@over_paths
def test_signal_to_noise_increases(path: Interpolant) -> None:
    c = path(torch.linspace(0, 1, 301)[:-1])
    assert (c.alpha / c.beta).diff().min() > 0


@pytest.mark.parametrize("path", DIFFUSIONS, ids=repr)
def test_diffusions_preserve_the_variance(path: Interpolant) -> None:
    c = path(torch.linspace(0, 1, 301))
    assert_close(c.alpha**2 + c.beta**2, torch.ones(301))


def test_variance_preserving_follows_its_formula() -> None:
    path, s = VariancePreserving(beta_min=0.5, beta_max=8.0), times()
    u = 1 - s
    assert_close(path(s).alpha, torch.exp(-(0.5 * u + 7.5 * u**2 / 2) / 2))


def test_linear_noise_level() -> None:
    s = times()
    c = Linear()(s)
    assert_close(c.kappa, 1 / s)
    assert_close(c.eta, (1 - s) / s)
    assert_close(c.memoryless_sigma, torch.sqrt(2 * (1 - s) / s))


def test_diffusion_noise_level_is_half_the_slope_of_the_log_signal() -> None:
    """kappa = eta = abar' / (2 abar) (2409.08861, table 1), with abar' / abar in closed form."""
    s = times()
    for path, expected in (
        (Cosine(), math.pi / torch.tan(math.pi / 2 * s)),
        (VariancePreserving(), 0.1 + 19.9 * (1 - s)),
    ):
        c = path(s)
        assert_close(c.kappa, expected / 2)
        assert_close(c.eta, expected / 2)
        assert_close(c.memoryless_sigma, expected.sqrt())


# ---- discrete schedules ----


def products(schedule: str, start: float, end: float, steps: int) -> list[float]:
    """prod (1 - beta_j), j <= i, one factor after the other as in the papers (2006.11239, 2112.10752, 2102.09672)."""

    def bar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    result, signal = [], 1.0
    for i in range(steps):
        if schedule == "linear":
            beta = start + (end - start) * i / (steps - 1)
        elif schedule == "scaled_linear":
            beta = (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * i / (steps - 1)) ** 2
        else:
            beta = min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999)
        signal *= 1 - beta
        result.append(signal)
    return result


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_discrete_schedule_is_the_product_at_its_knots(schedule: str) -> None:
    path = DiscreteVariancePreserving(beta_start=0.002, beta_end=0.009, beta_schedule=schedule)
    i = torch.arange(1000)
    c = path(1 - (i + 1) / 1000)
    expected = torch.tensor(products(schedule, 0.002, 0.009, 1000))
    # s = 1 - (i + 1) / 1000 is off its knot by rounding, on an interval as steep as 1000 times the drop of the product
    assert_close(c.alpha**2, expected, rtol=0, atol=1e-13)


def test_signal_left_in_the_noise_of_known_models() -> None:
    """Printed digits: Stable Diffusion, and the schedule of microsoft/soc-fine-tuning-sd."""
    s = torch.tensor([0.0, 0.98])  # timesteps 999 and 19
    assert STABLE_DIFFUSION(s).alpha[0].item() == pytest.approx(0.0683, abs=5e-5)
    assert (STABLE_DIFFUSION(s).alpha[1] ** 2).item() == pytest.approx(0.98224, abs=5e-6)
    theirs = DiscreteVariancePreserving(beta_start=0.002, beta_end=0.009, beta_schedule="scaled_linear")
    assert (theirs(s).alpha ** 2).tolist() == pytest.approx([0.00612, 0.95992], abs=5e-6)


def test_discrete_signal_is_linear_between_knots() -> None:
    path = DiscreteVariancePreserving(num_train_timesteps=10, beta_end=0.5)
    left, right = path(torch.tensor(0.3)).alpha ** 2, path(torch.tensor(0.4)).alpha ** 2
    assert_close(path(torch.tensor(0.325)).alpha ** 2, 0.75 * left + 0.25 * right)


# ---- times ----


@over_paths
def test_own_time_inverts_linear_time(path: Interpolant) -> None:
    s = torch.linspace(0, 1, 101)
    assert_close(path.own_time(linear_time(path, s)), s, rtol=0, atol=1e-12)
    t = torch.linspace(linear_time(path, torch.zeros(())).item(), 1, 101)
    assert_close(linear_time(path, path.own_time(t)), t, rtol=0, atol=1e-12)


@over_paths
def test_own_time_is_0_before_the_path_begins(path: Interpolant) -> None:
    assert path.own_time(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def test_discrete_network_time_is_the_timestep() -> None:
    path = DiscreteVariancePreserving(num_train_timesteps=10)
    s = torch.tensor([0.0, 0.1, 0.45, 0.9, 0.95, 1.0])
    assert_close(path.network_time(s), torch.tensor([9.0, 8.0, 4.5, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("path", [Linear(), Cosine(), VariancePreserving()], ids=repr)
def test_continuous_network_time_is_own_time(path: Interpolant) -> None:
    assert torch.equal(path.network_time(times()), times())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interior_stays_sqrt_epsilon_inside(dtype: torch.dtype) -> None:
    margin = torch.finfo(dtype).eps ** 0.5
    s = torch.tensor([0, 0.5, 1], dtype=dtype)
    assert_close(interior(s), torch.tensor([margin, 0.5, 1 - margin], dtype=dtype), rtol=0, atol=0)


# ---- one pair (x_1, x_0), many quantities ----


def known(quantity: str, c: Coefficients, x1: Tensor, x0: Tensor) -> Tensor:
    alpha, beta, d_alpha, d_beta = (w[:, None, None] for w in (c.alpha, c.beta, c.d_alpha, c.d_beta))
    return {
        "velocity": d_alpha * x1 + d_beta * x0,
        "epsilon": x0,
        "v": alpha * x0 - beta * x1,
        "x1": x1,
        "score": -x0 / beta,
    }[quantity]


@over_paths
def test_every_quantity_gives_every_other(path: Interpolant, generator: torch.Generator) -> None:
    s = times()
    x1, x0 = torch.randn(2, len(s), 2, 3, generator=generator)
    c = path(s)
    x = c.alpha[:, None, None] * x1 + c.beta[:, None, None] * x0
    for source, target in product(QUANTITIES, QUANTITIES):
        result = convert(known(source, c, x1, x0), x, s, path, source, target)
        # |quantity| and the conditioning 1 / (alpha beta) are below 1e4 on these times, rounding is 1e-16
        assert_close(result, known(target, c, x1, x0), rtol=1e-9, atol=1e-9)


@over_paths
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_conversions_hold_at_the_ends(path: Interpolant, end: float, generator: torch.Generator) -> None:
    s = torch.full((5,), end)
    x1, x0 = torch.randn(2, len(s), 2, 3, generator=generator)
    c = path(interior(s))
    x = c.alpha[:, None, None] * x1 + c.beta[:, None, None] * x0
    for source, target in product(QUANTITIES, QUANTITIES):
        expected = known(target, c, x1, x0)
        result = convert(known(source, c, x1, x0), x, s, path, source, target)
        # what alpha or beta = sqrt(eps) = 1.5e-8 leaves of a rounding of eps = 2.2e-16, relative to the size of the result
        assert_close(result, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


@over_paths
def test_every_path_is_the_linear_one_in_other_coordinates(path: Interpolant) -> None:
    """z = x / (alpha + beta) at t = alpha / (alpha + beta): velocity dz/dt = x_1 - x_0, score and noise level scaled."""
    x1, x0, s = 0.8, -1.3, times().requires_grad_()
    c = path(s)
    scale, t = c.alpha + c.beta, linear_time(path, s)
    z = (c.alpha * x1 + c.beta * x0) / scale
    linear = Linear()(t)
    assert_close(z, t * x1 + (1 - t) * x0)
    assert_close(slope(z, s) / slope(t, s), torch.full_like(s, x1 - x0))
    assert_close(mixture_weights("score", c)[1] * scale, mixture_weights("score", linear)[1])
    assert_close(c.memoryless_sigma**2 / (c.d_alpha * c.beta - c.alpha * c.d_beta), 2 * (1 - t) / t)


def test_expand_shapes_a_coefficient_to_multiply_a_batch() -> None:
    x = torch.zeros(3, 2, 4, dtype=torch.float32)
    assert expand(torch.tensor(2.0), x).shape == ()
    column = expand(torch.tensor([1.0, 2.0, 3.0]), x)
    assert column.shape == (3, 1, 1)
    assert column.dtype == torch.float32
    for wrong in (torch.zeros(2), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match=r"must be \[\] or \[3\]"):
            expand(wrong, x)


def test_zero_terminal_snr_moves_alpha_by_one_affine_map() -> None:
    """The noisiest alpha is 0 and the cleanest one stays (Lin et al., arXiv 2305.08891, algorithm 1)."""
    settings = STABLE_DIFFUSION.model_dump() | {"rescale_betas_zero_snr": True}
    rescaled = DiscreteVariancePreserving(**settings).alphas_cumprod[:-1].sqrt()
    alpha = STABLE_DIFFUSION.alphas_cumprod[:-1].sqrt()
    assert rescaled[0] == 0
    assert rescaled[-1] == pytest.approx(alpha[-1].item())
    slope = rescaled[1:] / (alpha[1:] - alpha[0])
    assert slope.min().item() == pytest.approx(slope.max().item())
