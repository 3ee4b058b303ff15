"""The achieved tilt: estimates of log p_tuned / p_base against densities, and their regression on the tilt."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from affine import LINEAR, QUADRATIC, on_gaussian, riccati
from scipy.integrate import quad
from tiny import tiny_recipe
from torch import Tensor
from torch.testing import assert_close

from tiltflow.conditions import Item
from tiltflow.control.path_weights import draw_paths
from tiltflow.evaluation.achieved_tilt import divergence, far_in_words, measure, regression
from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.log_ratio import END, by_flow_matching, by_ode
from tiltflow.evaluation.samples import Asked
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import Cosine
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward, mixture
from tiltflow.laws.target import exponential_tilt
from tiltflow.models.model import Model
from tiltflow.runs.reached import States, of_achieved_tilt
from tiltflow.runs.recipe import Recipe
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.sampling import Sampling
from tiltflow.samplers.solvers.memoryless import memoryless
from tiltflow.settings import read_yaml, validate
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

STANDARD = mixture(torch.tensor([[0.7]], dtype=torch.float64), (1.0,), 0.5)
CURVED = QuadraticReward(torch.tensor([1.7], dtype=torch.float64), 3.0)
RING = mixture(torch.tensor([[2.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]], dtype=torch.float64), (0.6, 0.4), (0.4, 0.7))
SLANTED = QuadraticReward(torch.tensor([1.0, 0.5, 0.0, -0.2], dtype=torch.float64), 0.3)


def field(law: GaussianMixture) -> FunctionField:
    return FunctionField(law.velocity)


def log_density(law: GaussianMixture, x: Tensor) -> Tensor:
    squares, d = (x[:, None] - law.means).square().sum(2), x.shape[1]
    return torch.logsumexp(law.log_weights - squares / (2 * law.variances) - d / 2 * (2 * math.pi * law.variances).log(), 1)


def log_ratio(tuned: GaussianMixture, base: GaussianMixture, x: Tensor) -> Tensor:
    return log_density(tuned, x) - log_density(base, x)


def regressed(*arguments: Any, **options: Any) -> tuple[Estimate, Estimate]:
    """The regression, where both of its numbers are known."""
    found = regression(*arguments, **options)
    assert found is not None
    slope, r2 = found
    assert r2 is not None
    return slope, r2


# ---- estimates of the log ratio ----


@pytest.mark.parametrize(("base", "reward"), [(STANDARD, CURVED), (RING, SLANTED)])
def test_differences_of_flow_matching_losses_are_the_log_ratio(base: GaussianMixture, reward: QuadraticReward) -> None:
    """The mean over many draws, sample by sample, and both estimates are as good and independent."""
    tuned = base.tilt(reward, 0.8)
    x = tuned.sample(20, stream(0, "x"))
    many = by_flow_matching(field(tuned), field(base), x.repeat(500, 1), stream(0, "noise"), draws=8).reshape(2, 500, 20)
    error = many.std(1) / 500**0.5
    z = (many.mean(1) - log_ratio(tuned, base, x)) / error
    assert z.abs().max() < 4
    assert 0.5 < z.square().mean() < 2
    correlation = ((many[0] - many[0].mean(0)) * (many[1] - many[1].mean(0))).mean(0) / (many[0].std(0) * many[1].std(0))
    assert correlation.abs().max() < 4 / 500**0.5


@pytest.mark.parametrize(("share", "slope"), [(0.25, 0.2133), (0.5, 0.4510), (0.75, 0.7132), (1.0, 1.0)])
def test_a_field_on_the_way_to_the_optimum_has_part_of_the_tilt(share: float, slope: float) -> None:
    """v + share (v* - v) is the field of no law, and the estimate of its tilt is then not exact, but known."""
    target = STANDARD.tilt(CURVED, 1.0)

    def blend(x: Tensor, t: Tensor) -> Tensor:
        return STANDARD.velocity(x, t) + share * (target.velocity(x, t) - STANDARD.velocity(x, t))

    x = target.sample(40_000, stream(1, "x"))
    estimates = by_flow_matching(FunctionField(blend), field(STANDARD), x, stream(1, "noise"))
    found, _ = regressed(estimates, CURVED(x))
    assert found.standard_error < 0.006
    assert abs(found.value - slope) < 4 * found.standard_error + 1e-3


def test_the_estimate_does_not_depend_on_what_a_network_predicts_and_on_which_path() -> None:
    """The same fields as networks that predict noise on a cosine path."""
    x = STANDARD.sample(50, stream(2, "x"))
    target = STANDARD.tilt(CURVED, 1.0)

    def noise_of(law: GaussianMixture) -> Flow:
        path = Cosine()

        def predict(y: Tensor, s: Tensor) -> Tensor:
            c = path(s)
            total = (c.alpha + c.beta)[:, None]
            t = c.alpha / (c.alpha + c.beta)
            state = y / total
            return state - t[:, None] * law.velocity(state, t)

        return Flow(predict, "epsilon", path)

    own = by_flow_matching(field(target), field(STANDARD), x, stream(2, "noise"))
    other = by_flow_matching(noise_of(target), noise_of(STANDARD), x, stream(2, "noise"))
    assert_close(own, other, rtol=1e-6, atol=1e-8)
    assert_close(
        by_ode(noise_of(target), noise_of(STANDARD), x), by_ode(field(target), field(STANDARD), x), rtol=1e-6, atol=1e-8
    )


def test_a_start_after_time_0_and_an_end_before_1_leave_the_rest_out() -> None:
    """N(0, 1) shifted by 1: v* - v = (1 - t) / V with V = t^2 + (1 - t)^2, so the log ratio is x int 2 t (1 - t) / V^2 dt."""
    base, reward = mixture(torch.zeros(1, 1), (1.0,), 1.0), QuadraticReward(torch.ones(1), 0.0)
    x = torch.linspace(-2, 2, 4000)[:, None]
    for start, end in ((0.0, END), (0.0, 0.7), (0.4, END)):
        exact = quad(lambda t: 2 * t * (1 - t) / (t**2 + (1 - t) ** 2) ** 2, start, end)[0]
        tuned = field(base.tilt(reward, 1.0))
        found, _ = regressed(by_flow_matching(tuned, field(base), x, stream(4, "noise"), start=start, end=end), x[:, 0])
        assert found.standard_error < 0.005
        assert abs(found.value - exact) < 4 * found.standard_error
    assert exact == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize(("base", "reward"), [(STANDARD, CURVED), (RING, SLANTED)])
def test_the_ode_has_the_density_to_second_order(base: GaussianMixture, reward: QuadraticReward) -> None:
    tuned = base.tilt(reward, 0.8)
    x = tuned.sample(200, stream(3, "x"))
    exact = log_ratio(tuned, base, x)
    errors = [
        (by_ode(field(tuned), field(base), x, steps=steps) - exact).square().mean().sqrt().item() for steps in (20, 40, 80)
    ]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)
    assert errors[1] < 0.02


def test_micro_batches_and_conditions_change_nothing() -> None:
    """A field for each of two classes, evaluated seven samples at a time."""
    laws = (STANDARD, STANDARD.tilt(CURVED, 1.0))

    def predict(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.where(label[:, None] == 1, laws[1].velocity(x, t), laws[0].velocity(x, t))

    x, labels = STANDARD.sample(20, stream(5, "x")), torch.arange(20) % 2
    tuned = Flow(predict).bind(labels)
    for estimate in (partial(by_flow_matching, generator=stream(5, "noise")), by_ode):
        parts = estimate(tuned, field(STANDARD), x, batch_size=7)
        whole = partial(by_flow_matching, generator=stream(5, "noise")) if estimate is not by_ode else by_ode
        assert_close(parts, whole(tuned, field(STANDARD), x))
        assert ((parts != 0) == (labels == 1)).all()


@pytest.mark.parametrize(("steps", "slope", "r2"), [(10, 0.7653, 0.721), (20, 0.8888, 0.863), (40, 0.9459, 0.932)])
def test_the_paths_of_the_best_control_of_few_steps_have_part_of_the_tilt(steps: int, slope: float, r2: float) -> None:
    """Gaussian steps cannot narrow a law as its velocity could; of a linear reward the paths have all of the tilt, exactly."""
    chain = memoryless(time_grid(steps), denoise=False)
    affine = on_gaussian(chain)
    x0 = torch.randn(40_000, 1, generator=stream(8, "x"))
    for linear, quadratic in ((LINEAR, QUADRATIC), (1.0, 0.0)):
        controls = torch.stack(riccati(affine, linear, quadratic))

        def tuned(x: Tensor, t: Tensor, controls: Tensor = controls) -> Tensor:
            k = int((chain.times - t).abs().argmin())
            w = controls[0, k] * x + controls[1, k]
            return STANDARD.velocity(x, t) + chain.std[k] / chain.v_scale[k] * w

        drawn = torch.zeros(len(x0), dtype=torch.bool)
        paths = draw_paths(chain, FunctionField(tuned), field(STANDARD), x0, drawn, stream(8, "paths"))
        assert paths.log_ratio is not None
        reward = QuadraticReward(torch.tensor([linear]), quadratic)
        found, share = regressed(paths.log_ratio[None], reward(paths.ends))
        if quadratic:
            assert abs(found.value - slope) < 4 * found.standard_error < 0.03
            assert abs(share.value - r2) < 4 * share.standard_error < 0.03
        else:
            assert (found.value, share.value) == pytest.approx((1, 1))


# ---- the regression ----


def made(groups: int, size: int, seed: int = 0, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """(estimates of log ratios [2, n], tilts [n]): slope 0.8 and a residual of variance 0.3 beside a tilt of variance 1, a
    constant of each group that goes against the slope, and noise that is larger for samples of a large tilt."""
    generator = stream(seed, "made")
    z, rest = torch.randn(groups, size, generator=generator), torch.randn(groups, size, generator=generator)
    constant = torch.linspace(0, 4, groups)[:, None] if groups > 1 else torch.zeros(1, 1)
    ratio = 0.8 * z + 0.3**0.5 * rest - 2 * constant
    draws = torch.randn(2, groups, size, generator=generator) * noise * (1 + z.square())
    return (ratio + draws).flatten(1), (z + constant).flatten()


R2 = 0.64 / (0.64 + 0.3)


def design(z: Tensor, groups: int) -> Tensor:
    """The matrix of the regression with a constant of each group [n, 1 + groups]."""
    member = torch.eye(groups).repeat_interleave(len(z) // groups, 0)
    return torch.cat([z[:, None], member], 1)


@pytest.mark.parametrize("groups", [1, 5])
def test_the_slope_and_its_error_are_those_of_least_squares(groups: int) -> None:
    """With a constant of each group, and the sandwich of HC3; over groups, of their sums, in which a group's own constant makes
    no residual too small: without HC3."""
    estimates, z = made(groups, 40, noise=0.5)
    X, y = design(z, groups), estimates.mean(0)
    inverse = torch.linalg.inv(X.T @ X)
    best = inverse @ X.T @ y
    each = (X @ inverse)[:, 0] * (y - X @ best)
    alone = each / (1 - (X @ inverse * X).sum(1))
    found, _ = regressed(estimates, z, groups)
    assert found.value == pytest.approx(best[0].item())
    assert found.standard_error == pytest.approx(alone.square().sum().sqrt().item())
    if groups > 1:
        clustered, _ = regressed(estimates, z, groups, strata=False)
        assert clustered.value == found.value
        expected = (each.reshape(groups, -1).sum(1).square().sum() * groups / (groups - 1)).sqrt()
        assert clustered.standard_error == pytest.approx(expected.item())


@pytest.mark.parametrize(("groups", "strata"), [(1, True), (1, False), (3, True), (100, False)])
def test_errors_are_those_of_leaving_each_sample_out(groups: int, strata: bool) -> None:
    """Or each group: the jackknife, which knows no formula of an influence."""
    size = 600 // groups
    estimates, z = made(groups, size, noise=0.25)
    found = regressed(estimates, z, groups, strata=strata)
    blocks = groups if groups > 1 and not strata else 600
    without = []
    for out in range(blocks):
        kept = torch.arange(600) // (600 // blocks) != out
        some = torch.where(kept, z, -math.inf)
        without.append([each.value for each in regressed(estimates, some, groups)])
    for one, values in zip(found, torch.tensor(without).T, strict=True):
        jackknife = ((blocks - 1) * values.var(correction=0)).sqrt()
        assert one.standard_error == pytest.approx(jackknife.item(), rel=0.02)


@pytest.mark.parametrize(("groups", "size", "strata"), [(1, 400, True), (4, 100, True), (40, 10, False), (60, 4, False)])
def test_errors_cover_the_truth_and_the_noise_is_taken_out_of_r2(groups: int, size: int, strata: bool) -> None:
    slopes, squares = [], []
    for seed in range(300):
        slope, r2 = regressed(*made(groups, size, seed, noise=0.25), groups, strata=strata)
        slopes.append((slope.value - 0.8) / slope.standard_error)
        squares.append((r2.value - R2) / r2.standard_error)
    for z in (torch.tensor(slopes), torch.tensor(squares)):
        assert 0.92 < (z.abs() < 2).double().mean() < 0.98
        assert abs(z.mean()) < 0.3


@pytest.mark.parametrize(("groups", "size", "strata"), [(1, 400, True), (4, 100, True), (40, 10, False), (60, 4, False)])
def test_the_divergence_from_the_target_is_without_noise_and_its_errors_cover_it(groups: int, size: int, strata: bool) -> None:
    """0.2 of the tilt is missing, and a residual of variance 0.3 is there: KL (0.04 + 0.3) / 2."""
    found = [divergence(*made(groups, size, seed, noise=0.25), groups, strata=strata) for seed in range(300)]
    z = torch.tensor([(each.value - 0.17) / each.standard_error for each in found])
    values = torch.tensor([each.value for each in found])
    assert abs(values.mean() - 0.17) < 4 * values.std() / 300**0.5
    assert 0.9 < (z.abs() < 2).double().mean() < 0.98
    estimates, tilt = made(1, 400)
    some = torch.where(torch.arange(400) < 300, tilt, -math.inf)
    kept = divergence(estimates[:, :300], tilt[:300])
    found_of_some = divergence(estimates, some)
    assert (found_of_some.value, found_of_some.standard_error) == pytest.approx((kept.value, kept.standard_error))


def test_without_noise_r2_is_the_squared_correlation() -> None:
    estimates, z = made(1, 100)
    _, r2 = regressed(estimates[:1], z)
    assert r2.value == pytest.approx(torch.corrcoef(torch.stack([estimates[0], z]))[0, 1].item() ** 2)
    for value, exact in zip(regressed(2 * z[None] + 1, z), (2, 1), strict=True):
        assert value.value == pytest.approx(exact)
        assert value.standard_error < 1e-9


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_the_slope_is_per_unit_of_the_tilt(unit: float) -> None:
    estimates, z = made(1, 50, noise=0.1)
    (one, r2), (other, same) = regressed(estimates, z), regressed(estimates, unit * z)
    assert (unit * other.value, unit * other.standard_error) == pytest.approx((one.value, one.standard_error))
    assert (same.value, same.standard_error) == pytest.approx((r2.value, r2.standard_error))


def test_groups_have_constants_of_their_own() -> None:
    """Pooled, the constants would turn the sign of the slope."""
    estimates, z = made(4, 200)
    (within, _), (pooled, _) = regressed(estimates, z, 4), regressed(estimates, z)
    assert abs(within.value - 0.8) < 4 * within.standard_error
    assert pooled.value < 0


def test_samples_with_an_infinite_tilt_are_left_out() -> None:
    estimates, z = made(2, 50, noise=0.1)
    kept = torch.arange(100) % 50 < 40
    some = z.clone()
    some[~kept] = -math.inf
    for one, other in zip(regressed(estimates, some, 2), regressed(estimates[:, kept], z[kept], 2), strict=True):
        assert (one.value, one.standard_error) == pytest.approx((other.value, other.standard_error))


def test_a_tilt_that_does_not_vary_has_no_slope_and_a_model_that_is_the_base_has_slope_0() -> None:
    estimates, z = made(2, 50)
    assert regression(estimates, torch.arange(2.0).repeat_interleave(50), 2) is None
    for same in (0.0, 0.1, 1e8 / 3):
        assert regression(estimates, torch.full((100,), same), 1) is None
    assert regression(torch.zeros(2, 100), z, 2) == (Estimate(0.0, 0.0), None)


# ---- together ----


@pytest.mark.parametrize(("base", "reward", "by"), [(STANDARD, CURVED, "ODE"), (RING, SLANTED, "flow matching")])
@pytest.mark.parametrize("beta", [0.7, 1.4])
def test_the_tilt_that_a_model_has_in_units_of_the_one_that_was_asked_for(
    base: GaussianMixture, reward: QuadraticReward, by: str, beta: float
) -> None:
    """A model that is at temperature `beta`, where 1 was asked for."""
    tuned = base.tilt(reward, beta)
    x = tuned.sample(1000, stream(6, "x"))
    found = measure(field(tuned), field(base), x, reward(x), stream(6, "noise"))
    assert found is not None
    assert found.r2 is not None
    assert by in found.by
    assert found.slope.standard_error < 0.04
    assert abs(found.slope.value - 1 / beta) < 4 * found.slope.standard_error + 1e-3
    assert abs(found.r2.value - 1) < 4 * found.r2.standard_error + 1e-3
    assert found.entries()["achieved_tilt"] == found.slope.value


@pytest.mark.parametrize("dimensions", [1, 4])
@pytest.mark.parametrize("off", [0.0, 0.1, 0.5])
def test_the_divergence_of_a_normal_law_that_is_off_by_a_shift(dimensions: int, off: float) -> None:
    """N(m + off, s^2) from N(m, s^2): off^2 / (2 s^2), whatever the base and the tilt between it and the target."""
    base = mixture(torch.full((1, dimensions), 0.7, dtype=torch.float64), (1.0,), 0.5)
    reward = QuadraticReward(torch.full((dimensions,), 1.7, dtype=torch.float64), 3.0)
    target = base.tilt(reward, 1.0)
    shift = off * torch.nn.functional.one_hot(torch.tensor(0), dimensions)
    tuned = GaussianMixture(target.log_weights, target.means + shift, target.variances)
    x = tuned.sample(2000, stream(7, "x"))
    found = measure(field(tuned), field(base), x, reward(x), stream(7, "noise"))
    assert found is not None
    exact = off**2 / (2 * target.variances.item())
    assert abs(found.kl.value - exact) < 4 * found.kl.standard_error + 0.01 * exact + 1e-4
    assert found.kl.standard_error < 0.1 * exact + 0.01
    entries = found.entries()
    assert (entries["kl_to_target"], entries["kl_to_target_error"]) == (found.kl.value, found.kl.standard_error)


def test_a_model_far_from_a_law_that_nothing_else_checks_is_told() -> None:
    for kl, error, told in (
        (0.1, 0.047, True),
        (0.1, 0.048, False),
        (0.005, 0.0, False),
        (0.006, 0.0, True),
        (None, None, False),
    ):
        found = {"kl_to_target": kl, "kl_to_target_error": error}
        assert [len(far_in_words(found, rounds=rounds)) for rounds in (False, True)] == [told, told]
    found = {"kl_to_target": 0.314, "kl_to_target_error": 0.012}
    ((said,), (of_rounds,)) = (far_in_words(found, rounds=rounds) for rounds in (False, True))
    assert "about 0.314 ± 0.012 nats from that law" in said
    assert "method.first" not in said
    assert of_rounds.startswith(said)
    assert "path-reweighted that begins with this method (method.first)" in of_rounds


@pytest.mark.parametrize(("dimensions", "start", "by"), [(3, 0.0, "ODE"), (4, 0.0, "flow matching"), (3, 0.1, "flow matching")])
def test_the_ode_is_for_three_dimensions_from_normal_noise(dimensions: int, start: float, by: str) -> None:
    base = mixture(torch.zeros(1, dimensions), (1.0,), 1.0)
    tuned, x = base.tilt(QuadraticReward(torch.ones(dimensions), 0.0), 1.0), torch.randn(20, dimensions)
    found = measure(field(tuned), field(base), x, x.sum(1), stream(6, "noise"), start=start)
    assert found is not None
    assert by in found.by


def test_the_estimate_is_as_sure_as_it_says_and_surer_than_plain_draws() -> None:
    """For 4,096 samples of the standard problem, 16 plain draws of noise and time have a standard deviation of 0.025."""
    target = STANDARD.tilt(CURVED, 1.0)
    found = []
    for seed in range(30):
        x = target.sample(4096, stream(seed, "x"))
        found.append(regressed(by_flow_matching(field(target), field(STANDARD), x, stream(seed, "noise")), CURVED(x))[0])
    values, errors = torch.tensor([each.value for each in found]), torch.tensor([each.standard_error for each in found])
    assert values.std() < 0.019
    assert 0.7 < values.std() / errors.mean() < 1.4


# ---- in a run ----


class Pixels(torch.nn.Module):
    """The velocity of a law of the four pixels of an image."""

    def __init__(self, law: GaussianMixture):
        super().__init__()
        self.law = law

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self.law.velocity(x.flatten(1), time).reshape(x.shape)


def test_a_run_has_the_achieved_tilt_of_some_of_its_samples(tmp_path: Path) -> None:
    """No more of them than cost as many evaluations as they did; none where the law is not known."""
    recipe = validate(Recipe, read_yaml(tiny_recipe(tmp_path)), "recipe")
    base, tuned = (Model(Flow(Pixels(law)), (1, 2, 2)) for law in (RING, RING.tilt(SLANTED, 0.2)))
    x = RING.tilt(SLANTED, 0.2).sample(4000, stream(7, "x"))
    states = States(Asked.of_samples(4000), x.reshape(-1, 1, 2, 2), SLANTED(x), Sampling(num_inference_steps=40))

    def entries(recipe: Any, states: States = states) -> dict[str, Any]:
        return of_achieved_tilt(recipe, exponential_tilt(0.1), base, tuned, states, lambda rewards, asked: rewards)

    found = entries(recipe)
    assert found["achieved_tilt_samples"] == 4000 * recipe.evaluation.first.num_inference_steps // 16 == 1000
    assert abs(found["achieved_tilt"] - 0.5) < 4 * found["achieved_tilt_error"] < 0.15
    assert abs(found["achieved_tilt_r2"] - 1) < 4 * found["achieved_tilt_r2_error"] < 0.6
    assert found["achieved_tilt_absent"] is None
    guided = entries(recipe.model_copy(update={"training": recipe.training.model_copy(update={"guidance_mode": "full"})}))
    flat = entries(recipe, replace(states, rewards=torch.ones(4000)))
    for absent, why in ((guided, "the field of no law"), (flat, "the same for all samples, so")):
        assert absent["achieved_tilt"] is absent["achieved_tilt_error"] is absent["achieved_tilt_r2"] is None
        assert why in absent["achieved_tilt_absent"]


def test_some_states_are_as_many_of_each_group() -> None:
    asked = Asked.of_prompts([Item("a"), Item("b"), Item("c")], 5)
    states = States(asked, torch.arange(15.0)[:, None], torch.arange(15.0), Sampling())
    some = states.some(7)
    assert some.rewards.tolist() == some.x[:, 0].tolist() == [0, 1, 5, 6, 10, 11]
    assert [item.text for item in some.asked.items] == ["a", "a", "b", "b", "c", "c"]
    assert states.some(1).rewards.tolist() == some.rewards.tolist()
    assert states.some(15) is states
