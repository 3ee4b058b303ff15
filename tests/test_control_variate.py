"""The noise to come as a control variate: mean zero, leaves the gradient's mean and takes its noise late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import iterate
from torch import Tensor
from torch.testing import assert_close

from tiltflow.control.control_variate import noise_to_come, predicted
from tiltflow.flows.field import FunctionField
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward
from tiltflow.methods.adjoint_matching import AdjointMatching, State
from tiltflow.samplers.grid import time_grid
from tiltflow.samplers.rollout import Trajectory, rollout
from tiltflow.samplers.solvers.memoryless import memoryless
from tiltflow.samplers.stored import Stored
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

BASE = GaussianMixture(torch.tensor([0.6, 0.4]).log(), torch.tensor([[-1.5], [1.5]]), torch.tensor([0.15, 0.3]))
REWARD, BETA = QuadraticReward(torch.tensor([0.8]), 0.7), 0.6
TARGET = BASE.tilt(REWARD, BETA)


def still(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros_like(x)


def test_the_noise_to_come_is_the_sum_of_what_is_drawn() -> None:
    """Of a chain that only adds noise: what x_K, or the last state with noise, is away from x_k."""
    path = rollout(memoryless(time_grid(6)), FunctionField(still), torch.zeros(5, 2), stream(0))
    scale = path.chain.x_scale
    noises = [after - scale[k] * before for k, (before, after) in enumerate(zip(path.states, path.states[1:], strict=False))]
    found = dict(noise_to_come(path))
    for k in range(5):
        assert_close(found[k], torch.stack(noises[k:]).sum(0))
    guided = Trajectory(path.chain, path.states, Stored(path.velocities.data + 1, path.states[0]), path.velocities)
    assert_close(dict(noise_to_come(guided)), found)


def test_each_sample_gets_the_regression_of_all_others() -> None:
    residuals, variate = (torch.randn(3, 5, 2, generator=stream(i)) for i in (1, 2))
    found = predicted(residuals, variate)
    for k in range(3):
        for i in range(5):
            others = [j for j in range(5) if j != i]
            z, r = variate[k, others].flatten(), residuals[k, others].flatten()
            assert_close(found[k, i], torch.linalg.lstsq(z[:, None], r[:, None]).solution[0, 0] * variate[k, i])
    assert not predicted(residuals[:, :1], variate[:, :1]).any()
    assert not predicted(residuals, 0 * variate).any()


def test_the_unit_of_the_variate_does_not_matter() -> None:
    """Also where one sample has nearly all of it: what its square leaves of the sum of all squares has no digits then."""
    residuals, variate = (torch.randn(3, 5, 2, generator=stream(i)) for i in (1, 2))
    for share in (1.0, 1e-9):
        variate[:, 1:] *= share
        found = predicted(residuals, variate)
        assert found.isfinite().all()
        for unit in (2.0**-30, 2.0**30):
            assert torch.equal(predicted(residuals, unit * variate), found)


class Away(torch.nn.Module):
    """The velocity of the tilt, and what it is away from that, [2]."""

    def __init__(self, *away: float) -> None:
        super().__init__()
        self.away = torch.nn.Parameter(torch.tensor(away))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return TARGET.velocity(x, t) + self.away[0] + self.away[1] * x


def gradients(part: dict[str, Any], *away: float, control_variate: bool) -> Tensor:
    """Of independent batches, [16, 2]."""
    steps: Any = [{**part, "count": 2}]
    method = AdjointMatching(num_inference_steps=40, beta=BETA, train_timesteps=steps, control_variate=control_variate)
    found = []
    for seed in range(16):
        tuned = Away(*away)
        x, fields = torch.randn(200, 1, generator=stream(seed)), (FunctionField(tuned), FunctionField(BASE.velocity))
        list(iterate(method, *fields, REWARD, x, stream(seed, "noise"), State()))
        found.append(tuned.away.grad)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("part", "away"),
    [
        ({"start": 0.9, "end": 0.95}, (0.0, 0.0)),
        ({"start": 0.9, "end": 0.95}, (0.4, -0.2)),
        ({"start": 0.5, "end": 0.55}, (0.4, -0.2)),
    ],
)
def test_it_leaves_the_mean_of_the_gradient(part: dict[str, Any], away: tuple[float, float]) -> None:
    plain, less = (gradients(part, *away, control_variate=on) for on in (False, True))
    differences = less - plain
    assert (differences.mean(0) / (differences.std(0) / 16**0.5)).abs().max() < 4
    assert differences.std() > 0


def test_it_takes_the_noise_late() -> None:
    """At the optimum and t = 0.9 the root of the terms' mean falls from 0.16 of the control's to 0.03."""
    plain, less = (gradients({"start": 0.9, "end": 0.95}, 0.0, 0.0, control_variate=on) for on in (False, True))
    assert (less.var(0) < 0.1 * plain.var(0)).all()
