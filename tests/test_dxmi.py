"""DxMI: its gradient against autograd, step by step; the average length of steps; the warm-up; what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from curved import Curved
from tiny import iterate
from torch import Tensor

import tiltflow
from tiltflow.control.value import Critic
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.methods.dxmi import KEPT, Dxmi
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.streams import stream

pytestmark = pytest.mark.usefixtures("double")

CPU = torch.device("cpu")
SIZE = 9


BASE = Flow(Curved(-0.8, 0.1, 0.2))


def reward(x: Tensor) -> Tensor:
    return torch.sin(2 * x[:, 0]) - x[:, 1] ** 2


def fixed_critic() -> Critic:
    """A critic that does not learn."""
    return Critic(loss="td", num_steps=0)


@pytest.mark.parametrize("solver", ["euler", "ddpm"])
@pytest.mark.parametrize("step_price", [0.0, 0.3])
def test_the_gradient_is_that_of_each_step_alone(solver: str, step_price: float) -> None:
    """By autograd of sum_k V(t_{k+1}, x_{k+1}) - price / 2 |x_{k+1} - x_k|^2 / m_k, x_k held fixed; V the reward at the end,
    which of a sampler with noise is a step of the base further."""
    method = Dxmi(solver=solver, num_inference_steps=5, step_price=step_price, critic=fixed_critic())
    tuned = Curved(-0.7, 0.2, 0.3)
    x, state = torch.randn(SIZE, 2, generator=stream(1)), method.new_state((2,), 0, CPU)
    for p in state.value.network.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=stream(2))
    with torch.no_grad():
        path, _ = method.rollout(Flow(tuned), BASE, x, stream(0))
    measured = next(iterate(method, Flow(tuned), BASE, reward, x, stream(0), state, micro_batch_size=4))
    found = tuned.values.grad.clone()  # type: ignore[union-attr]
    tuned.zero_grad()
    chain, count = path.chain, len(path.velocities)
    total = torch.zeros(())
    for k in range(count):
        before, after = path.states[k], path.states[k + 1]
        v = tuned(before, chain.times[k])
        moved = after + chain.v_scale[k] * (v - v.detach())
        if k < count - 1:
            value = state.value.learned(moved, chain.times[k + 1])
        else:
            end = moved if count == len(chain) else chain.mean(count, moved, BASE(moved, chain.times[count]))
            value = reward(end)
        mean_square = (after - before).square().sum(1).mean()
        total = total + (value - step_price / 2 * (moved - before).square().sum(1) / mean_square).mean()
    (-total).backward()
    torch.testing.assert_close(found, tuned.values.grad, rtol=1e-8, atol=1e-10)
    assert found.abs().max() > 0.1
    assert measured["reward"] < 1


def test_the_average_length_of_a_step_and_resume() -> None:
    method = Dxmi(num_inference_steps=4, critic=Critic(loss="td", num_steps=1))
    state, squares = method.new_state((2,), 0, CPU), []
    for i in range(3):
        x = (1 + i) * torch.randn(SIZE, 2, generator=stream(i))
        with torch.no_grad():
            path, _ = method.rollout(Flow(Curved(-0.7, 0.2, 0.3)), BASE, x, stream(i))
        squares.append(
            [(path.states[k + 1] - path.states[k]).square().sum(1).mean().item() for k in range(len(path.velocities))]
        )
        next(iterate(method, Flow(Curved(-0.7, 0.2, 0.3)), BASE, reward, x, stream(i), state))
    first, second, third = map(torch.tensor, squares)
    expected = KEPT * (KEPT * first + (1 - KEPT) * second) + (1 - KEPT) * third
    torch.testing.assert_close(torch.tensor(state.squares), expected)
    again = method.new_state((2,), 1, CPU)
    again.load_state_dict(state.state_dict())
    assert (again.squares, again.iterations) == (state.squares, 3)
    one, other = (s.value.network.state_dict() for s in (state, again))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_only_the_critic_learns_at_first() -> None:
    method = Dxmi(num_inference_steps=4, critic_warmup_steps=1)
    tuned, state = Curved(-0.7, 0.2, 0.3), method.new_state((2,), 0, CPU)
    before = [p.clone() for p in state.value.network.parameters()]
    x = torch.randn(SIZE, 2, generator=stream(1))
    list(iterate(method, Flow(tuned), BASE, reward, x, stream(0), state))
    assert tuned.values.grad is None
    assert any(not torch.equal(p, old) for p, old in zip(state.value.network.parameters(), before, strict=True))
    list(iterate(method, Flow(tuned), BASE, reward, x, stream(0), state))
    assert tuned.values.grad is not None


def test_words_and_refusals() -> None:
    target: Any = Dxmi().target(1)
    assert (target.reaches, Dxmi().temperature) == ("none", None)
    assert "Nothing but the size of the steps" in target.caveats[0]
    assert (Dxmi().num_inference_steps, Dxmi().step_price, Dxmi().optimizer_defaults) == (10, 0.01, {"learning_rate": 1e-7})
    assert Dxmi().needs.learned_reward
    with pytest.raises(InputError, match="'heun' is no chain"):
        Dxmi(solver="heun")
    with pytest.raises(InputError, match="no temperature"):
        Dxmi().at_temperature(0.5)
    with pytest.raises(InputError, match="preset 'dxmi' is the method 'dxmi' now"):
        ScoreAsAction(preset="dxmi")


class PerStep(torch.nn.Module):
    """v = shift_k - slope_k x at each of two steps: at first they shorten the way to 1 to three tenths, each."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.shift = (torch.nn.Parameter(torch.full((2,), 1.4)) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        k = (t > 0.25).long()
        return self.shift[k, None] - self.slope[k, None] * x


def test_without_a_price_all_samples_end_at_the_best_one() -> None:
    """Trained under -(x - 1)^2 / 2: no law, but the maximum of the reward."""
    critic = Critic(loss="td", num_steps=1, learning_rate=1e-2, train_batch_size=64)
    method = Dxmi(solver="euler", num_inference_steps=2, step_price=0.0, critic=critic)
    training = tiltflow.Training(max_train_steps=150, train_batch_size=64)
    optimizer = tiltflow.Optimizer(learning_rate=1e-2, lr_warmup_steps=0, lr_scheduler="constant")
    model = tiltflow.Model(Flow(PerStep()), (1,))
    assert model.sample(2000, sampling=method.sampling).std().item() > 0.08
    tuned = tiltflow.tune(model, lambda x: -(x[:, 0] - 1).square() / 2, method, training, optimizer=optimizer)
    x = tuned.sample(2000, sampling=method.sampling)
    assert x.mean().item() == pytest.approx(1, abs=0.02)
    assert x.std().item() < 0.02
