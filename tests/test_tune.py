"""`tune` and `sample` on networks as they come out of a user's own training loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiltflow
from tiltflow.errors import UserCodeError
from tiltflow.flow import Flow, eval_mode

METHODS: dict[str, tuple[Any, str]] = {
    "adjoint-matching": (tiltflow.AdjointMatching(num_inference_steps=4), "path_kl"),
    "score-as-action": (tiltflow.ScoreAsAction(num_inference_steps=4), "path_kl"),
    "orw-cfm-w2": (tiltflow.OrwCfmW2(num_inference_steps=4), "velocity_distance"),
}


class Net(nn.Module):
    """In train mode but for one part, which its owner has put in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.enter, self.leave = nn.Linear(3, 16), nn.Linear(16, 2)
        self.norm, self.drop, self.frozen = nn.BatchNorm1d(16), nn.Dropout(0.3), nn.BatchNorm1d(16).eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.leave(self.drop(self.frozen(self.norm(torch.tanh(self.enter(torch.cat([x, t[:, None]], 1)))))))


def modes(network: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in network.named_modules()}


def buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in network.named_buffers()}


def reward(x: Tensor) -> Tensor:
    return -(x - 1).square().sum(1)


def test_eval_mode_puts_every_mode_back() -> None:
    network, other = Net(), nn.Dropout()
    before = modes(network)
    assert before["drop"]
    assert not before["frozen"]
    seen = []

    def fail() -> None:
        with eval_mode(network, lambda x: x, other, network):
            seen.extend([*modes(network).values(), other.training])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not any(seen)
    assert modes(network) == before
    assert other.training


def test_samples_of_a_network_in_train_mode() -> None:
    network = Net()
    model = tiltflow.Model(Flow(network), (2,))
    before, held, draws = modes(network), buffers(network), torch.random.get_rng_state()
    x = model.sample(4, seed=0)
    assert torch.equal(x, model.sample(4, seed=0))
    assert modes(network) == before
    assert all(torch.equal(buffer, held[name]) for name, buffer in network.named_buffers())
    assert torch.equal(draws, torch.random.get_rng_state())
    assert torch.equal(x, tiltflow.Model(Flow(network.eval()), (2,)).sample(4, seed=0))


@pytest.mark.parametrize("name", METHODS)
def test_tuning_a_network_in_train_mode(name: str) -> None:
    method, distance = METHODS[name]
    network = Net()
    base = tiltflow.Model(Flow(network), (2,))
    before, held, draws = modes(network), buffers(network), torch.random.get_rng_state()
    runs = []
    for _ in range(2):
        rows: list[Any] = []
        tuned = tiltflow.tune(
            base, reward, method, tiltflow.Training(max_train_steps=2, train_batch_size=16), watch=rows.append
        )
        runs.append((tuned, [row.metrics for row in rows]))
        torch.rand(3)  # somebody else draws from torch's own generator
    assert runs[0][1][0][distance] == pytest.approx(0, abs=1e-10)  # before the first update
    assert runs[0][1] == runs[1][1]
    for a, b in zip(runs[0][0].flow.parameters(), runs[1][0].flow.parameters(), strict=True):
        assert torch.equal(a, b)
    for each in (network, tuned.flow.network):
        assert modes(each) == before  # type: ignore[arg-type]
    assert all(torch.equal(buffer, held[key]) for key, buffer in network.named_buffers())
    torch.random.set_rng_state(draws)


def test_an_error_puts_the_modes_back_too() -> None:
    network = Net()
    before = modes(network)

    def broken(x: Tensor) -> Tensor:
        raise KeyError

    with pytest.raises(UserCodeError, match="the reward raised KeyError"):
        tiltflow.tune(tiltflow.Model(Flow(network), (2,)), broken, METHODS["score-as-action"][0])
    assert modes(network) == before


def test_a_reward_in_train_mode_is_one_function() -> None:
    """A reward that is a module, with dropout: the run is that of the reward in eval mode, and its mode is its owner's."""

    class Score(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x).sum(1)

    score, found = Score(), []
    for one in (score, Score().eval(), lambda x: x.sum(1)):
        rows: list[Any] = []
        training = tiltflow.Training(max_train_steps=1, train_batch_size=8)
        tiltflow.tune(tiltflow.Model(Flow(Net()), (2,)), one, METHODS["adjoint-matching"][0], training, watch=rows.append)
        found.append(rows[0].metrics)
    assert found[0] == found[1] == found[2]
    assert score.drop.training
