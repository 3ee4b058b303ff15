"""Episodes of a policy in an environment: how often it succeeds, with an interval, and what its rewards return."""

# Mutation tests: test_episodes.py

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tiltflow.errors import InputError
from tiltflow.models.policy import Policy
from tiltflow.policies.environments import Environment
from tiltflow.rewards.functions.bradley_terry import share_interval
from tiltflow.streams import stream


@dataclass(frozen=True)
class Episode:
    """What an episode came to.

    Args:
        success: whether the environment said so at its end.
        returned: the sum of its rewards.
        steps: how long it was.
    """

    success: bool
    returned: float
    steps: int


def play_episodes(
    policy: Policy, make: Callable[[], Environment], count: int, *, seed: int = 0, at_once: int = 10
) -> list[Episode]:
    """Play episodes: a chunk of actions is drawn for an observation, clipped to [-1, 1], and taken one action after another.

    Args:
        make: makes an environment.
        at_once: environments that are played side by side, so that the network sees several observations. An episode depends
            on its number and the seed, and on the others of its round in the last bits of what the network computes.

    Raises InputError if the environment has other observations or actions than the policy.
    """
    environments = [make() for _ in range(min(at_once, count))]
    found: list[Episode] = []
    for begin in range(0, count, len(environments)):
        found += _round(policy, environments[: count - begin], begin, seed)
    return found


def _round(policy: Policy, environments: Sequence[Environment], begin: int, seed: int) -> list[Episode]:
    seeds = [stream(seed, "episode", begin + i).initial_seed() % 2**31 for i in range(len(environments))]
    lanes, turn = [_Lane(*pair) for pair in zip(environments, seeds, strict=True)], 0
    while going := [lane for lane in lanes if not lane.over]:
        observations = np.stack([np.asarray(lane.observation, dtype=np.float32) for lane in going])
        noise = stream(seed, "act", begin, turn).initial_seed()
        drawn = policy.act(torch.from_numpy(observations), seed=noise, batch_size=len(going))
        for lane, chunk in zip(going, drawn.clamp(-1, 1).numpy(), strict=True):
            lane.take(chunk)
        turn += 1
    return [Episode(lane.success, lane.returned, lane.steps) for lane in lanes]


class _Lane:
    """An episode that is being played."""

    def __init__(self, environment: Environment, seed: int):
        self.environment = environment
        self.observation, _ = environment.reset(seed=seed)
        self.over, self.success, self.returned, self.steps = False, False, 0.0, 0

    def take(self, chunk: Any) -> None:
        """Take the actions of a chunk, as long as the episode lasts."""
        for action in chunk:
            try:
                self.observation, reward, terminated, truncated, info = self.environment.step(action)
            except (ValueError, IndexError) as error:
                raise InputError(f"the environment does not take actions of {len(action)} numbers ({error})") from None
            self.steps, self.returned = self.steps + 1, self.returned + float(reward)
            self.over, self.success = terminated or truncated, self.success or bool(info.get("success", terminated))
            if self.over:
                return


def summary_of(episodes: Sequence[Episode]) -> dict[str, Any]:
    """The success rate with Wilson's interval of 95 %, the mean return with its standard error, and the mean length."""
    count, successes = len(episodes), sum(episode.success for episode in episodes)
    low, high = share_interval(successes, count)
    returns = np.array([episode.returned for episode in episodes])
    return {
        "episodes": count,
        "successes": successes,
        "success_rate": successes / count,
        "success_rate_interval": [max(low, 0.0), min(high, 1.0)],
        "return": float(returns.mean()),
        "return_error": float(returns.std(ddof=1) / math.sqrt(count)) if count > 1 else None,
        "steps": float(np.mean([episode.steps for episode in episodes])),
    }
