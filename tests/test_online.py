"""Online: episodes that the policy plays while it is trained are transitions that its critics learn from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from replays import replay
from test_q_function import SMALL, STILL, of_critics
from test_resume import Killed, final, killed_after, resuming, same_runs

from tiltflow.errors import InputError
from tiltflow.policies.replay import Replay, episode_of
from tiltflow.policies.transitions import load_transitions
from tiltflow.rewards.q_function import QFunction
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import run
from tiltflow.settings import validate
from tiltflow.streams import stream


class Corridor:
    """Three numbers that are moved by the two of an action; over when the first is above 2, or after 7 steps."""

    action_space = SimpleNamespace(shape=(2,))

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        self.place, self.steps = np.random.default_rng(seed).normal(size=3), 0
        return self.place.copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place, self.steps = self.place + np.array([action[0], action[1], 0.5]), self.steps + 1
        over = bool(self.place[0] > 2)
        return self.place.copy(), -float(not over), over, self.steps == 7, {}


def broken() -> Any:
    raise RuntimeError("no display")


ONLINE = {"environment": "test_online:Corridor", "every": 2}


def test_the_rows_of_an_episode_by_hand() -> None:
    seen = [np.array([float(i)]) for i in range(4)]
    found = episode_of(seen, [np.array([0.1]), np.array([0.2]), np.array([0.3])], [-1.0, -2.0, 0.0], over=True)
    assert found.observations[:, 0].tolist() == [0, 1, 2, 3]
    assert found.last.tolist() == [3] * 4
    assert found.rewards is not None
    assert found.masks is not None
    assert found.rewards.tolist() == [-1, -2, 0, 0]
    assert found.masks.tolist() == [1, 1, 0, 1]
    returned, weight = found.returns(torch.tensor([0, 1]), 2, 0.5)
    assert returned.tolist() == [-2, -2]
    assert weight.tolist() == [0.25, 0]


def test_a_buffer_grows_and_is_the_same_again(tmp_path: Path) -> None:
    data = load_transitions(replay(tmp_path / "data.npz", episodes=(5, 4)), rewards=True)
    full, again = Replay(data, 2), Replay(data, 2)
    for length in (3, 6, 2):  # the last one is shorter than a chunk
        one = [np.full(3, float(length))] * length
        full.add(episode_of(one, [np.zeros(2)] * (length - 1), [0.0] * (length - 1), over=False))
    assert full.starts.tolist() == [0, 1, 2, 5, 6, 9, 12, 13, 14, 15]
    full.updates = 9
    again.load_state_dict(full.state_dict())
    assert again.updates == 9
    for name, value in vars(full.transitions).items():
        assert torch.equal(vars(again.transitions)[name], value)
    assert torch.equal(again.starts, full.starts)


def test_what_is_played_is_what_the_policy_does(tmp_path: Path) -> None:
    """One that keeps its noise: chunks of it, clipped, until the end; and learned from thereafter."""
    settings = QFunction(data=str(replay(tmp_path / "data.npz")), horizon=2, online=ONLINE, **SMALL)  # type: ignore[arg-type]
    reward = settings.build()
    measured = [reward.learn(torch.zeros(0), STILL, stream(0)) for _ in range(4)]
    rows = reward.transitions
    first = int(rows.last[len(rows.last) - reward.replay.added]) + 1
    episode = rows.actions[24:first]
    noise = stream(0, "online", 1)
    expected = torch.cat([torch.randn(1, 4, generator=noise).clamp(-1, 1).reshape(2, 2) for _ in range(4)])
    steps = len(episode) - 1
    assert torch.equal(episode[:steps], expected[:steps])
    moved = rows.observations[25:first] - rows.observations[24 : first - 1]
    assert torch.allclose(moved[:, :2], expected[:steps], atol=1e-6)
    assert len({int(last) for last in rows.last}) == 4  # two of the data, two that were played
    assert ["episode_return" in each for each in measured] == [(i + 1) % ONLINE["every"] == 0 for i in range(4)]
    played = measured[ONLINE["every"] - 1]
    over = bool(rows.observations[first - 1, 0] > 2)
    assert (played["episode_return"], played["episode_over"]) == (float(over - steps), float(over))
    assert int(reward.starts.max()) > 24


def test_a_run_with_episodes_is_bitwise_the_one_that_was_killed(tmp_path: Path) -> None:
    tree = of_critics(tmp_path).model_dump(mode="json", exclude_none=True)
    of_run = validate(Recipe, {**tree, "reward": {**tree["reward"], "online": ONLINE}}, "recipe")
    run(of_run, tmp_path / "whole")
    with pytest.raises(Killed):
        run(resuming(of_run), tmp_path / "parts", callbacks=[killed_after(5)])
    run(resuming(of_run), tmp_path / "parts")
    same_runs(tmp_path / "whole", tmp_path / "parts")
    assert "replay" in str(final(tmp_path / "parts")["reward"].keys())


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("cube-singel", "there is no environment 'cube-singel', did you mean 'cube-single'"),
        ("test_online:broken", "environment test_online:broken: cannot be made.*no display"),
        ("test_episodes:Walk", r"environment test_episodes:Walk: observations \[1\], in the data \[3\]"),
    ],
)
def test_environments_that_do_not_fit_are_refused_before_the_first_step(tmp_path: Path, environment: str, message: str) -> None:
    data = str(replay(tmp_path / "data.npz"))
    settings = QFunction(data=data, horizon=2, online={"environment": environment}, **SMALL)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        settings.build()
