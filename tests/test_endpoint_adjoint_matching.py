"""Endpoint Adjoint Matching: its parts in closed form, where its gradient vanishes, and its blindness to weights of modes."""

from __future__ import annotations

from typing import Any

import affine
import pytest
import torch
from tiny import iterate
from torch import Tensor, nn
from torch.testing import assert_close

from tiltflow.errors import SettingsError
from tiltflow.flows.field import FunctionField
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import PredictionType
from tiltflow.laws.gaussian_mixture import GaussianMixture, QuadraticReward
from tiltflow.laws.law import Law, log_normal
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.adjoint_matching import State as PathState
from tiltflow.methods.endpoint_adjoint_matching import EndpointAdjointMatching, State
from tiltflow.streams import stream
from tiltflow.training.batch import Batch

pytestmark = pytest.mark.usefixtures("double")

REWARD = QuadraticReward(torch.tensor([affine.LINEAR]), affine.QUADRATIC)
BASE, CPU = FunctionField(affine.velocity), torch.device("cpu")


class Near(nn.Module):
    """A field, and what it is away from it: a constant, and a multiple of x."""

    def __init__(self, field: Any):
        super().__init__()
        self.field, self.away = field, nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.field(x, t) + self.away[0] + self.away[1] * x


def gaussian(mean: Any, variance: Any) -> Any:
    return lambda x, t: affine.velocity(x, t.reshape(-1, 1), mean, variance)


def gradient_z(field: Any, base: Any, reward: Any, method: Any, state: Any) -> Tensor:
    """z-scores of the gradient at `field`, on samples of its own."""
    found = []
    for seed in range(25):
        tuned = Near(field)
        x = torch.randn(200, 1, generator=stream(seed))
        list(iterate(method, FunctionField(tuned), FunctionField(base), reward, x, stream(seed, "noise"), state()))
        found.append(tuned.away.grad)
    return torch.stack(found).mean(0) / (torch.stack(found).std(0) / 5)


def test_the_target_of_exact_scores_is_the_field_of_the_tilt() -> None:
    """In closed form on Gaussians, for a reference that is not the base: E[x_1 | x_t] under the tilt goes in, its field comes
    out."""
    mean, variance = affine.TILTED_MEAN, affine.TILTED_VARIANCE
    state, x = State(CPU, torch.tensor([0.2]), 0.8), torch.tensor([[-1.0], [0.4], [2.0]])
    for t in (torch.tensor([[0.1]]), torch.tensor([[0.5]]), torch.tensor([[0.9]])):
        assert_close(state.velocity(x, t), affine.velocity(x, t, 0.2, 0.8))
        x1 = mean + t * variance / (t**2 * variance + (1 - t) ** 2) * (x - t * mean)
        score = -(x1 - affine.MEAN) / affine.VARIANCE
        force = affine.LINEAR - affine.QUADRATIC * x1 + score + (x1 - 0.2) / 0.8
        assert_close(state.velocity(x, t) + state.propagated(force, t), affine.velocity(x, t, mean, variance))


def test_forces_are_gradients_and_scores_of_the_smoothed_base() -> None:
    x1 = torch.tensor([[-0.5], [0.7], [1.4]])
    batch = Batch(x1, BASE, BASE, REWARD, stream(0))
    method = EndpointAdjointMatching(beta=0.5, score_time=0.9)
    forces, rewards = method._forces(batch, x1)
    score = -(x1 - affine.MEAN) / (affine.VARIANCE + (0.1 / 0.9) ** 2)
    assert_close(forces, (affine.LINEAR - affine.QUADRATIC * x1) / 0.5 + score)
    assert_close(rewards, REWARD(x1))


class OffInItsPrediction(nn.Module):
    """A network whose prediction is off by constants [2] from that of a field."""

    def __init__(self, prediction: PredictionType, field: Any):
        super().__init__()
        self.prediction, self.field, self.off = prediction, field, nn.Parameter(torch.tensor([0.3, -0.4]))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        velocity, t = self.field(x, t[:, None]), t[:, None]
        predicted = {"velocity": velocity, "epsilon": x - t * velocity, "x1": x + (1 - t) * velocity}[self.prediction]
        return predicted + self.off


@pytest.mark.parametrize("prediction", ["velocity", "epsilon", "x1"])
def test_the_loss_is_the_mean_square_of_errors_of_the_prediction(prediction: PredictionType) -> None:
    """Of a force that is the same at all ends, whose target is known: an error of (0.3, -0.4) has the loss 0.25 / 2."""
    mean, force = torch.tensor([0.2, -1.0]), torch.tensor([0.7, 0.1])

    def target(x: Tensor, t: Tensor) -> Tensor:
        return affine.velocity(x, t, mean, 0.8) + (1 - t) * 0.8 / (t**2 * 0.8 + (1 - t) ** 2) * force

    network = OffInItsPrediction(prediction, target)
    x1 = torch.randn(6, 2, generator=stream(0))
    batch = Batch(x1, Flow(network, prediction), BASE, REWARD, stream(1), parameters=list(network.parameters()))
    measured = EndpointAdjointMatching()._regress(batch, x1, force.expand(6, 2), State(CPU, mean, 0.8))
    assert measured["loss"] == pytest.approx(0.125)
    assert_close(network.off.grad, network.off.detach())


@pytest.mark.parametrize(
    ("time", "mean", "variance"), [(0.98, 0.642803, 0.142993), (0.9, 0.641278, 0.146805), (0.8, None, None)]
)
def test_the_law_is_the_tilt_of_the_smoothed_base(time: float, mean: float | None, variance: float | None) -> None:
    smooth = affine.VARIANCE + ((1 - time) / time) ** 2
    expected = 1 / (1 / smooth + affine.QUADRATIC)
    own = expected * (affine.MEAN / smooth + affine.LINEAR), expected
    if mean is not None:
        assert own == pytest.approx((mean, variance), abs=5.1e-7)
    base = Law.of(lambda x: log_normal(x, affine.MEAN, affine.VARIANCE**0.5))
    law = EndpointAdjointMatching(score_time=time).target(1).law(base, lambda x: 1.7 * x - 1.5 * x**2)
    assert (law.mean, law.variance) == pytest.approx(own, abs=1e-6)
    if time == 0.8:
        method = EndpointAdjointMatching(score_time=time, num_inference_steps=40, num_passes=1)
        for reference in (None, torch.tensor([0.2])):

            def state(reference: Any = reference) -> State:
                return State(CPU, reference, 0.8)

            assert gradient_z(gaussian(*own), affine.velocity, REWARD, method, state).abs().max() < 4
        exact = gaussian(affine.TILTED_MEAN, affine.TILTED_VARIANCE)
        assert gradient_z(exact, affine.velocity, REWARD, method, lambda: State(CPU)).abs().max() > 5


def two_modes(weight: float) -> GaussianMixture:
    weights = torch.tensor([weight, 1 - weight])
    return GaussianMixture(weights.log(), torch.tensor([[-2.0], [2.0]]), torch.tensor([0.16, 0.16]))


def test_wrong_weights_of_separate_modes_are_at_rest() -> None:
    """Without a reward the law should be the base's. Its modes with other weights have no gradient here; with other widths they
    have one, and Adjoint Matching has one for the weights."""
    base, wrong = two_modes(0.5), two_modes(0.7)
    narrow = GaussianMixture(base.log_weights, base.means, base.variances / 2)

    def nothing(x: Tensor) -> Tensor:
        return 0 * x[:, 0]

    method = EndpointAdjointMatching(num_inference_steps=30, num_passes=1, score_time=0.99)
    assert gradient_z(wrong.velocity, base.velocity, nothing, method, lambda: State(CPU)).abs().max() < 4
    assert gradient_z(narrow.velocity, base.velocity, nothing, method, lambda: State(CPU)).abs().max() > 5
    paths = AdjointMatching(num_inference_steps=10)
    assert gradient_z(wrong.velocity, base.velocity, nothing, paths, PathState).abs().max() > 5


def test_the_reference_is_the_base_of_the_first_batch() -> None:
    """Its mean and the mean of its variances, measured once, and kept in a checkpoint."""
    method, state = EndpointAdjointMatching(num_inference_steps=30, num_passes=1), State(CPU)
    tuned = Near(gaussian(0.0, 1.0))
    base = gaussian(torch.tensor([0.7, 2.1]), torch.tensor([0.25, 2.25]))
    x = torch.randn(4000, 2, generator=stream(0))
    fields = FunctionField(tuned), FunctionField(base)
    list(iterate(method, *fields, lambda x: x[:, 0], x, stream(1), state, micro_batch_size=500))
    assert state.mean.tolist() == pytest.approx([0.7, 2.1], abs=0.1)
    assert state.variance == pytest.approx((0.25 + 2.25) / 2, rel=0.08)
    other = State(CPU)
    other.load_state_dict(state.state_dict())
    assert torch.equal(other.mean, state.mean)
    assert other.variance == state.variance
    list(iterate(method, FunctionField(tuned), FunctionField(lambda x, t: 0 * x), lambda x: x[:, 0], x[:8], stream(1), state))
    assert torch.equal(other.mean, state.mean)


def test_micro_batches_and_samples_without_a_reward() -> None:
    def reward(x: Tensor) -> Tensor:
        return torch.where(x[:, 0] > 1.2, torch.nan, REWARD(x))

    found = []
    for size in (None, 5):
        tuned = Near(gaussian(0.7, 0.25))
        x = torch.randn(30, 1, generator=stream(0))
        method = EndpointAdjointMatching(num_passes=2)
        options: dict[str, Any] = {"micro_batch_size": size, "non_finite": "drop"}
        rows = list(iterate(method, FunctionField(tuned), BASE, reward, x, stream(1), State(CPU), **options))
        assert len(rows) == 2
        assert 0 < rows[0]["dropped"] < 29
        found.append((rows[1], tuned.away.grad))
    assert found[0][0] == pytest.approx(found[1][0])
    assert_close(found[0][1], found[1][1])


def test_settings_and_words() -> None:
    with pytest.raises(SettingsError, match="has noise, and the method needs the law of the ODE"):
        EndpointAdjointMatching(solver="memoryless")
    target = EndpointAdjointMatching(beta=0.5).target(1)
    assert (target.reaches, target.temperature) == ("none", 0.5)
    assert target.caveats[0].startswith("Scores do not see the weights of modes")
    assert "standard deviation 0.02 in each coordinate" in target.caveats[1]
    assert "standard deviation 0.25 in each" in EndpointAdjointMatching(score_time=0.8).target(1).caveats[1]
