"""Distances of transport as utilities: exact potentials, metrics, a critic; closed forms and the change of the functional."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.laws.law import Array
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation import transport
from tiltflow.utilities.estimation.known import Known
from tiltflow.utilities.wasserstein_1 import Wasserstein1
from tiltflow.utilities.wasserstein_2 import Wasserstein2


def normal(count: int, dimension: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


METRICS: list[transport.Metric] = [(), (1.0, 7.0), ((1.0, 0.5), (-0.3, 2.0))]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("power", [1, 2])
def test_the_cost_is_that_of_the_best_assignment(metric: transport.Metric, power: int) -> None:
    """Of scipy's solver; and the dual has its value and keeps its constraints."""
    x, y = normal(30, 2), normal(30, 2, seed=1) * 0.5 + 1
    matrix = np.eye(2) if not metric else np.diag(metric) if isinstance(metric[0], float) else np.array(metric)
    costs = np.linalg.norm((x[:, None] - y).numpy() @ matrix.T, axis=2) ** power
    rows, columns = linear_sum_assignment(costs)
    expected = costs[rows, columns].mean()
    utility: Utility = Wasserstein1(metric=metric) if power == 1 else Wasserstein2(metric=metric)
    known = Known(x, reference=y)
    assert utility.value(known).value == pytest.approx(-expected, rel=1e-9)
    _, f = transport.solve(x, known.p, y, metric, power)  # type: ignore[arg-type]
    assert float(f(x).mean() + f.heights.mean()) == pytest.approx(expected, rel=1e-9)
    assert (f(x)[:, None].numpy() + f.heights.numpy() <= costs + 1e-9).all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_potential_of_w1_has_slope_one_in_the_metric(metric: transport.Metric) -> None:
    """|A^-T grad f| = 1 everywhere, at new points too; and no two points are further apart in f than in the metric."""
    x, y = normal(40, 2), normal(25, 2, seed=1) + 2
    slope = Wasserstein1(metric=metric).first_variation(Known(x, reference=y))
    new = normal(50, 2, seed=2) * 3
    values, gradient = value_and_gradient(slope, new)
    matrix = torch.eye(2).double()
    if metric:
        matrix = torch.tensor(metric, dtype=torch.float64)
        matrix = matrix.diag() if matrix.ndim == 1 else matrix
    torch.testing.assert_close(torch.linalg.solve(matrix.T, gradient.T).norm(dim=0), torch.ones(50).double())
    apart = torch.cdist(new @ matrix.T, new @ matrix.T)
    assert ((values[:, None] - values).abs() <= apart + 1e-9).all()


def test_a_translation() -> None:
    """Of a law by delta, far against its width: W1 is |A delta|, and the gradient A^T A delta / |A delta|; W2^2 is |A delta|^2,
    with the gradient 2 A^T A delta. At the narrow law moved by (4, 3) with A = diag(1, 7): 21.4, and mostly down."""
    delta, scale = torch.tensor([4.0, 3.0]).double(), torch.tensor([1.0, 7.0]).double()
    y = normal(60, 2) * 0.02
    known = Known(y + delta, reference=y)
    length = (scale * delta).norm()
    one, two = Wasserstein1(metric=(1.0, 7.0)), Wasserstein2(metric=(1.0, 7.0))
    assert one.value(known).value == pytest.approx(-float(length), rel=1e-3)
    assert two.value(known).value == pytest.approx(-(float(length) ** 2), rel=1e-9)  # a translation is the best plan of all
    torch.testing.assert_close(
        value_and_gradient(one.first_variation(known), known.x)[1].mean(0), -(scale**2) * delta / length, rtol=2e-3, atol=0
    )
    torch.testing.assert_close(
        value_and_gradient(two.first_variation(known), known.x)[1], (-2 * scale**2 * delta).expand(60, 2)
    )


def test_the_map_of_a_gaussian() -> None:
    """Of N(0, 1) to N(1, 2^2) on the line: 2 (x - T(x)), T(x) = 1 + 2 x, at the samples and, nearly, at new points."""
    levels = (torch.arange(400).double() + 0.5) / 400
    x = torch.special.ndtri(levels)[:, None]
    slope = Wasserstein2().first_variation(Known(x, reference=1 + 2 * x))
    torch.testing.assert_close(value_and_gradient(slope, x)[1], -2 * (x - (1 + 2 * x)))
    new = torch.linspace(-1.5, 1.5, 20).double()[:, None]
    torch.testing.assert_close(value_and_gradient(slope, new)[1], -2 * (new - (1 + 2 * new)), rtol=0, atol=0.08)


# ---- the change of the functional, on the line, where the distances are integrals of quantile functions ----

GRID = np.linspace(-4, 4, 161)
TARGET = np.linspace(-1.0, 3.0, 40)


def laws() -> tuple[Array, Array]:
    p, q = (np.exp(-((GRID - m) ** 2) / (2 * s**2)) for m, s in ((-0.3, 1.0), (0.8, 0.6)))
    return p / p.sum(), q / q.sum()


def on_the_line(p: Array, power: int) -> float:
    """The integral of |F_p^-1 - F_target^-1|^power over all levels."""
    ends = np.unique(np.concatenate([np.cumsum(p), np.arange(1, 41) / 40]).clip(0, 1))
    middle = (ends + np.concatenate([[0.0], ends[:-1]])) / 2
    ours = GRID[np.searchsorted(np.cumsum(p), middle).clip(max=160)]
    theirs = TARGET[np.floor(middle * 40).astype(int).clip(max=39)]
    return float(np.diff(ends, prepend=0) @ abs(ours - theirs) ** power)


@pytest.mark.parametrize("power", [1, 2])
def test_the_first_variation_is_the_change_of_the_distance(power: int) -> None:
    p, q = laws()
    utility: Utility = Wasserstein1() if power == 1 else Wasserstein2()
    known = Known(torch.from_numpy(GRID)[:, None], weights=torch.from_numpy(p), reference=torch.from_numpy(TARGET)[:, None])
    assert utility.value(known).value == pytest.approx(-on_the_line(p, power), rel=1e-6)
    expected = -(on_the_line(p + 1e-5 * (q - p), power) - on_the_line(p - 1e-5 * (q - p), power)) / 2e-5
    found = float((q - p) @ utility.first_variation(known)(known.x).numpy())
    assert found == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("utility", [Wasserstein1(), Wasserstein2()], ids=["one", "two"])
def test_the_error_is_the_spread_of_the_estimate(utility: Utility) -> None:
    values, errors = [], []
    for seed in range(100):
        z = normal(140, 2, seed)
        found = utility.value(Known(z[:80], reference=z[80:] * 1.5 + 1.5))
        values.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(errors) / np.std(values) == pytest.approx(1, abs=0.25)


def test_metrics_that_are_none() -> None:
    known = Known(normal(5, 2), reference=normal(5, 2))
    for metric, message in (
        ((1.0,), r"must have 2 factors, or be a matrix \[2, 2\], is \[1\]"),
        (((1.0, 0.0), (0.0,)), "all of one length"),
        ((1.0, 0.0), "must not be singular"),
    ):
        with pytest.raises(InputError, match=message):
            Wasserstein1(metric=metric).value(known)
    with pytest.raises(InputError, match="needs samples of a reference law"):
        Wasserstein2().value(Known(normal(5, 2)))
    many = torch.zeros(8000, 1)
    with pytest.raises(InputError, match="between 8000 and 8000 samples takes too much memory"):
        Wasserstein2().value(Known(many, reference=many))


def test_of_the_same_samples_a_critic_is_without_distance() -> None:
    x = normal(30, 1) + 3
    for weights in (None, torch.ones(30)):
        found = Wasserstein1(potential="critic", critic_steps=2, critic_width=8).value(Known(x, weights=weights, reference=x))
        assert found.value == pytest.approx(0, abs=1e-6)


def test_a_critic_learns_a_translation_on_the_line() -> None:
    """By 3, where a step of 1 costs 2: W1 is 6, and the gradient of minus the potential -2, whatever sign the slope of the
    network had before. Both are larger by what a penalty of 10 leaves: the slope s that is best for s W1 / scale less
    10 (s - 1)^2."""
    y = normal(60, 1).float() * 0.2
    known = Known(y + 3, reference=y)
    utility = Wasserstein1(metric=(2.0,), potential="critic", critic_steps=60, critic_width=16, critic_learning_rate=1e-2)
    slope = 1 + 6 / float(torch.cat([2 * y, 2 * y + 6]).std()) / 20
    assert utility.value(known).value == pytest.approx(-6 * slope, rel=0.1)
    between = torch.linspace(0.5, 2.5, 5)[:, None]
    gradient = value_and_gradient(utility.first_variation(known), between)[1]
    torch.testing.assert_close(gradient, torch.full((5, 1), -2 * slope), rtol=0.1, atol=0)


@pytest.mark.slow
def test_a_critic_learns_the_potential() -> None:
    """Of two Gaussians with A = diag(1, 7): its gradient has the length 1 in that metric and the direction of the exact one,
    which a slope of 1 without the metric has not; and its distance is near. Twice the same."""
    delta, scale = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 7.0])
    y = normal(400, 2).float() * 0.5
    known = Known(y.flip(0) + delta, reference=y)
    utility = Wasserstein1(metric=(1.0, 7.0), potential="critic", critic_steps=200, critic_width=32)
    slope = utility.first_variation(known)
    _, gradient = value_and_gradient(slope, known.x)
    assert (gradient / scale).norm(dim=1).mean().item() == pytest.approx(1, abs=0.15)
    mean = gradient.mean(0)
    expected = -(scale**2) * delta / (scale * delta).norm()
    assert torch.nn.functional.cosine_similarity(mean, expected, dim=0).item() > math.cos(0.1)
    exact = Wasserstein1(metric=(1.0, 7.0)).value(known).value
    assert utility.value(known).value == pytest.approx(exact, rel=0.1)
    assert torch.equal(slope(known.x), utility.first_variation(known)(known.x))
