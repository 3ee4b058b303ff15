"""The exact field of a Gaussian mixture, and models that are made of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tiltflow
from tiltflow.errors import InputError
from tiltflow.laws.gaussian_mixture import mixture
from tiltflow.models.sources.mixture import Mixture
from tiltflow.networks.gaussian_mixture import GaussianMixture, GaussianMixtureModule
from tiltflow.reports.points import draw, frame
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.samplers.sampling import Sampling
from tiltflow.settings import validate
from tiltflow.streams import new_network, stream

MEANS, WEIGHTS = ((-1.5, 0.0), (2.5, 0.5)), (9.2, 0.8)
ELLIPSES = ((0.5, 0.9), (0.9, 0.5))


def field(x: Tensor, t: float, **settings: Any) -> Tensor:
    """Of the network at a time, in float64."""
    network = GaussianMixture(means=MEANS, weights=WEIGHTS, hidden=4, layers=1, **settings).build().double()
    assert isinstance(network, GaussianMixtureModule)
    found: Tensor = network(x, torch.full((len(x),), t, dtype=torch.float64)).detach()
    return found


@pytest.mark.parametrize("t", [0.0, 0.3, 0.98, 1.0])
def test_the_field_of_circles_is_that_of_the_law(t: float) -> None:
    x = 2 * torch.randn(50, 2, generator=stream(0), dtype=torch.float64)
    law = mixture(torch.tensor(MEANS, dtype=torch.float64), WEIGHTS, 0.7)
    torch.testing.assert_close(field(x, t, scale=0.7), law.velocity(x, torch.tensor(t)), rtol=1e-5, atol=1e-6)


def test_the_field_of_ellipses_is_the_mean_of_where_paths_go() -> None:
    """E[x_1 - x_0 | x_t = x] = (E[x_1 | x] - x) / (1 - t), by quadrature over x_1."""
    t, x = 0.6, torch.tensor([[-0.4, 0.3], [1.0, -0.2]], dtype=torch.float64)
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    density = torch.zeros(len(grid), dtype=torch.float64)
    for mean, weight, scale in zip(MEANS, WEIGHTS, ELLIPSES, strict=True):
        s = torch.tensor(scale, dtype=torch.float64)
        away = (grid - torch.tensor(mean, dtype=torch.float64)) / s
        density += weight * (-away.square().sum(1) / 2).exp() / s.prod()
    for point, found in zip(x, field(x, t, scale=ELLIPSES), strict=True):
        posterior = density * (-(point - t * grid).square().sum(1) / (2 * (1 - t) ** 2)).exp()
        expected = (posterior[:, None] * grid).sum(0) / posterior.sum()
        torch.testing.assert_close(found, (expected - point) / (1 - t), rtol=1e-5, atol=1e-5)


def test_at_the_data_the_field_is_that_of_every_law() -> None:
    """x, whatever has been learned: E[x_1 - x_0 | x_1 = x] of noise that is independent of the data."""
    network = new_network(GaussianMixture(means=MEANS, scale=ELLIPSES, hidden=4, layers=1), 0)
    for each in network.parameters():
        torch.nn.init.normal_(each, generator=stream(0))
    x = torch.randn(5, 2, generator=stream(1))
    torch.testing.assert_close(network(x, torch.ones(5)), x)
    assert not torch.allclose(network(x, torch.zeros(5)), field(x.double(), 0.0, scale=ELLIPSES).float(), atol=0.1)


def test_samples_are_of_the_mixture() -> None:
    """Their moments, z-tests."""
    source = Mixture(means=MEANS, weights=WEIGHTS, scale=ELLIPSES, hidden=4, layers=1)
    x = source.load("cpu").sample(4000, sampling=Sampling(solver="heun", num_inference_steps=30), batch_size=4000).numpy()
    w, m, v = np.array(WEIGHTS) / 10, np.array(MEANS), np.array(ELLIPSES) ** 2
    mean = w @ m
    variance = w @ (v + m**2) - mean**2
    fourth = w @ (3 * v**2 + 6 * v * (m - mean) ** 2 + (m - mean) ** 4)
    assert abs((x.mean(0) - mean) / np.sqrt(variance / len(x))).max() < 4
    assert abs((x.var(0) - variance) / np.sqrt((fourth - variance**2) / len(x))).max() < 4


def recipe(**more: Any) -> Recipe:
    """Of two points of a Gaussian mixture, in seconds."""
    tree = {
        "model": {"name": "mixture", "means": MEANS, "weights": WEIGHTS, "scale": ELLIPSES, "hidden": 8, "layers": 1},
        "reward": {"name": "norm", "center": [0.0, 1.0]},
        "method": {"name": "adjoint-matching", "beta": 1.0, "num_inference_steps": 4},
        "training": {"max_train_steps": 2, "train_batch_size": 8},
        "evaluation": {"num_samples": 64, "points": [{"num_inference_steps": 4}]},
    }
    return validate(Recipe, tree | more, "recipe")


def test_a_recipe_trains_a_mixture(tmp_path: Path) -> None:
    """Its report shows the points; loaded from the folder, its mixture has not moved."""
    summary = run(recipe(), tmp_path / "run")
    assert summary["model"] == "2 Gaussians in 2-d"
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for side in ("before", "after"):
        assert f"Row 1 of the samples, {side} tuning" in text
        assert (tmp_path / "run" / f"{side}.png").exists()
    tuned, base = tiltflow.load(tmp_path / "run"), recipe().source.load("cpu")
    for (name, ours), (_, theirs) in zip(
        tuned.flow.network.state_dict().items(), base.flow.network.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs) == (not name.startswith("correction")), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"means": [[0.0, 1.0], [0.0]]}, "means: all must be as long as the first, 2 long"),
        ({"means": []}, "means"),
        ({"means": [[0.0]], "weights": [1.0, 2.0]}, "weights: 2 of them, for 1 means"),
        ({"means": [[0.0, 1.0]], "scale": [[1.0]]}, "scale: must be one number, or 1 lists of 2, as means"),
        ({"means": [[0.0]], "scale": -1.0}, "scale"),
        ({"means": [[0.0]], "weight": [1.0]}, "weight"),
    ],
)
def test_what_is_no_mixture_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        recipe(model={"name": "mixture", **settings})


def test_a_picture_of_points_has_them_all_in_one_frame() -> None:
    """As long on both sides, and the same before and after tuning; but for a few that are far out."""
    clouds = [torch.randn(2000, 2, generator=stream(i)) * torch.tensor([3.0, 1.0]) + 5 * i for i in range(2)]
    limits = frame(clouds)
    assert limits[0][1] - limits[0][0] == pytest.approx(limits[1][1] - limits[1][0])
    for x in clouds:
        inside = torch.stack([(low < each) & (each < high) for each, (low, high) in zip(x.T, limits, strict=True)]).all(0)
        assert inside.double().mean() > 0.99


@pytest.mark.parametrize("dimension", [1, 2])
def test_a_reward_that_fails_elsewhere_leaves_a_picture_without_lines(dimension: int, tmp_path: Path) -> None:
    x = torch.randn(50, dimension, generator=stream(0))
    draw(x, frame([x]), "tuned", lambda points: points[:, 0] * torch.nan)(tmp_path / "nothing.png")
    draw(x, frame([x]), "tuned", lambda points: points[:, 0])(tmp_path / "lines.png")
    sizes = [len(Image.open(tmp_path / f"{name}.png").convert("RGB").getcolors(1 << 20) or []) for name in ("nothing", "lines")]
    assert 1 < sizes[0] < sizes[1]
