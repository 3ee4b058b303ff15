"""Episodes of a policy, in an environment that is known by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tiltflow.errors import InputError
from tiltflow.evaluation.episodes import BestOf, Episode, Valued, play_episodes, summary_of
from tiltflow.flows.flow import Flow
from tiltflow.models.policy import Policy
from tiltflow.policies.drawing import from_above
from tiltflow.samplers.sampling import Sampling


class Toward(nn.Module):
    """The field whose ODE ends at actions of `gain` times what is observed, whatever the noise."""

    def __init__(self, gain: float):
        super().__init__()
        self.gain = gain

    def forward(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        return (self.gain * seen.repeat(1, x.shape[1]) - x) / (1 - time[:, None])


def policy(gain: float = -1.0, horizon: int = 2) -> Policy:
    sampling = Sampling(solver="euler", num_inference_steps=3)
    return Policy(Flow(Toward(gain)), (horizon,), sampling, observation_dim=1, horizon=horizon)


class Walk:
    """A place on the line, moved by each action; the task is over within 0.1 of 0. Ten steps, each at a reward of -1."""

    def __init__(self) -> None:
        self.place, self.steps, self.seeds, self.actions = 0.0, 0, list[int | None](), list[float]()

    def reset(self, *, seed: int | None = None) -> tuple[Any, Mapping[str, Any]]:
        self.seeds.append(seed)
        self.place, self.steps = [0.8, -3.2][len(self.seeds) % 2], 0
        return np.array([self.place]), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, Mapping[str, Any]]:
        if action.shape != (1,):
            raise ValueError("one number")
        self.actions.append(float(action[0]))
        self.place, self.steps = self.place + float(action[0]), self.steps + 1
        success = abs(self.place) < 0.1
        return np.array([self.place]), -1.0, success, self.steps == 10, {"success": success}


def test_chunks_are_clipped_and_taken_until_the_end() -> None:
    """From -3.2 it goes by clipped chunks of (1, 1), (1, 1), and then 0.8 too far: back and forth between -0.8 and 0.8."""
    walk = Walk()
    (episode,) = play_episodes(policy(), lambda: walk, 1)
    assert walk.actions == pytest.approx([1, 1, 1, 1, -0.8])
    assert episode == Episode(success=True, returned=-5.0, steps=5)


def test_a_policy_that_does_not_move_runs_out_of_time() -> None:
    walk = Walk()
    found = play_episodes(policy(gain=0.0), lambda: walk, 3, at_once=1)
    assert [episode.success for episode in found] == [False] * 3
    assert [episode.steps for episode in found] == [10] * 3
    assert len(set(walk.seeds)) == 3


def test_episodes_side_by_side_are_those_one_after_another() -> None:
    def some(at_once: int) -> list[Episode]:
        return play_episodes(policy(horizon=1), Walk, 4, at_once=at_once)

    assert [each.success for each in some(4)] == [True] * 4
    assert some(4) == [play_episodes(policy(horizon=1), Walk, 1)[0]] * 4


def test_the_summary_by_hand() -> None:
    episodes = [Episode(True, -5.0, 5)] * 8 + [Episode(False, -10.0, 10)] * 2
    found = summary_of(episodes)
    assert found["success_rate"] == 0.8
    assert found["success_rate_interval"] == pytest.approx([0.4902, 0.9433], abs=1e-4)  # Wilson
    assert found["return"] == -6.0
    assert found["return_error"] == pytest.approx(np.std([-5] * 8 + [-10] * 2, ddof=1) / 10**0.5)
    assert found["steps"] == 6.0
    assert summary_of(episodes[:1])["return_error"] is None


def test_an_environment_of_another_size_is_refused() -> None:
    twice = Policy(Flow(lambda x, time, seen: torch.zeros_like(x)), (2,), observation_dim=1, horizon=1)
    with pytest.raises(InputError, match=r"the environment does not take actions of 2 numbers \(one number\)"):
        play_episodes(twice, Walk, 1)
    wide = Policy(Flow(lambda x, time, seen: torch.zeros_like(x)), (1,), observation_dim=4, horizon=1)
    with pytest.raises(InputError, match=r"observations must be \[n, 4\], got \[1, 1\]"):
        play_episodes(wide, Walk, 1)


def test_values_at_the_start_beside_discounted_returns() -> None:
    """From -3.2, with a first chunk of (1, 1), it takes five steps; from 0.8, with a first action of -0.8, one."""
    seen = list[Tensor]()

    def values(observations: Tensor, chunks: Tensor) -> Tensor:
        seen.append(torch.cat([observations, chunks], 1))
        return 10 * observations[:, 0] + chunks.sum(1)

    valued = Valued(values, discount=0.5)
    (long, short) = play_episodes(policy(), Walk, 1, valued=valued) + play_episodes(
        policy(horizon=1), walks_from(0.8), 1, valued=valued
    )
    assert seen[0].tolist() == [pytest.approx([-3.2, 1, 1])]
    assert long == Episode(True, -5.0, 5, value=pytest.approx(-30), discounted=-(1 + 0.5 + 0.25 + 0.125 + 0.0625))
    assert short == Episode(True, -1.0, 1, value=pytest.approx(7.2), discounted=-1.0)
    late = Episode(False, -10.0, 10, value=3.0, discounted=-2.0, over=False)
    found = summary_of([long, short, late])
    assert found["value"] == pytest.approx((-30 + 7.2 + 3) / 3)
    assert found["discounted_return"] == pytest.approx((-1.9375 - 1 - 2) / 3)
    assert found["value_error"] == pytest.approx((-30 + 1.9375 + 7.2 + 1) / 2)
    assert found["value_error_error"] == pytest.approx(np.std([-30 + 1.9375, 8.2], ddof=1) / 2**0.5)
    assert found["episodes_with_known_return"] == 2
    assert "value" not in summary_of([Episode(True, -5.0, 5)])
    assert summary_of([late])["value_error"] is None


def walks_from(place: float) -> Any:
    """Makes walks whose first episode begins here."""
    walk = Walk()
    if place > 0:
        walk.seeds.append(None)
    return lambda: walk


def test_the_best_of_several_chunks_by_hand() -> None:
    """Of a policy whose actions are its noise."""
    noise = Policy(Flow(lambda x, time, seen: torch.zeros_like(x)), (2,), observation_dim=1, horizon=2)
    observations = torch.tensor([[1.0], [-1.0]])
    best = BestOf(noise, lambda seen, chunks: seen[:, 0] * chunks[:, 1], 3).act(observations, seed=5, batch_size=4)
    drawn = noise.act(observations.repeat_interleave(3, 0), seed=5, batch_size=4).reshape(2, 3, 2)
    assert torch.equal(best[0, :, 0], drawn[0, drawn[0, :, 1].argmax()])
    assert torch.equal(best[1, :, 0], drawn[1, drawn[1, :, 1].argmin()])


def test_the_first_episodes_are_watched() -> None:
    """Each by its own: where it was, what was observed, and whether it was the end."""
    seen: list[list[tuple[Any, ...]]] = [[], []]

    def watching(into: list[tuple[Any, ...]]) -> Any:
        return lambda world, observation, info, over: into.append((world.place, float(observation[0]), world.steps, over))

    found = play_episodes(policy(), Walk, 3, watches=[watching(each) for each in seen], at_once=2)
    assert found == play_episodes(policy(), Walk, 3, at_once=2)
    for each in seen:
        places, observed, steps, over = zip(*each, strict=True)
        assert steps == (0, 1, 2, 3, 4, 5)
        assert places == observed == pytest.approx([-3.2, -2.2, -1.2, -0.2, 0.8, 0.0], abs=1e-6)
        assert over == (False,) * 5 + (True,)


def test_things_from_above_are_where_they_are() -> None:
    """A block in the middle of what is seen, and a ring, wider when it is higher, nearer the arm and to its left."""
    info = {"privileged/block_0_pos": [0.425, 0.0, 0.02], "privileged/block_0_quat": [1, 0, 0, 0]}
    block = np.asarray(from_above(info))
    rows, columns = (block != 255).any(2).nonzero()
    assert (rows.mean(), columns.mean()) == pytest.approx((100, 100), abs=1)
    widths = []
    for height in (0.0, 0.2):
        ring = np.asarray(from_above({"proprio/effector_pos": [0.3125, 0.2, height]}))
        rows, columns = (ring != 255).any(2).nonzero()
        assert (rows.mean(), columns.mean()) == pytest.approx((50, 50), abs=1)
        widths.append(np.ptp(columns))
    assert widths[1] > widths[0] + 10
