"""Episodes of a policy in an environment: how often it succeeds, with an interval, and what its rewards return."""

# Mutation tests: test_episodes.py

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.models.policy import Policy
from tiltflow.policies.environments import Environment
from tiltflow.rewards.functions.bradley_terry import share_interval
from tiltflow.streams import stream

Values = Callable[[Tensor, Tensor], Tensor]
"""(observations [n, observation], chunks of actions [n, horizon * action]) -> their values [n]."""


class Watch(Protocol):
    """What sees an episode, at its beginning and after each step."""

    def __call__(self, environment: Environment, observation: Any, info: Mapping[str, Any], over: bool) -> None:
        """See the environment, what was observed, and what else it told; `over` after the last step."""
        ...


class Actor(Protocol):
    """What plays: a policy, or one that chooses among the actions of a policy."""

    def act(self, observations: Any, *, seed: int = 0, batch_size: int = 256) -> Tensor:
        """Draw a chunk of actions for each of these observations [n, observation]: [n, horizon, action], on the CPU."""
        ...


@dataclass(frozen=True)
class BestOf:
    """The policy that draws several chunks of another one for each observation, and takes the one of the largest value."""

    policy: Policy
    values: Values
    count: int

    def act(self, observations: Any, *, seed: int = 0, batch_size: int = 256) -> Tensor:
        """See `Actor`."""
        seen = torch.as_tensor(observations, dtype=torch.float32).repeat_interleave(self.count, 0)
        drawn = self.policy.act(seen, seed=seed, batch_size=batch_size)
        values = self.values(seen, drawn.flatten(1)).reshape(-1, self.count)
        best: Tensor = drawn.unflatten(0, tuple(values.shape))[torch.arange(len(values)), values.argmax(1)]
        return best


@dataclass(frozen=True)
class Episode:
    """What an episode came to.

    Args:
        success: whether the environment said so at its end.
        returned: the sum of its rewards.
        steps: how long it was.
        value: of its first chunk, as it was estimated; None if it was not.
        discounted: the sum of its rewards, discounted to the first step.
        over: whether the task was over at the end, and not the time.
    """

    success: bool
    returned: float
    steps: int
    value: float | None = None
    discounted: float | None = None
    over: bool = True


@dataclass(frozen=True)
class Valued:
    """An estimate of the value of chunks, and the discount of a step that it is for."""

    values: Values
    discount: float


def play_episodes(
    policy: Actor,
    make: Callable[[], Environment],
    count: int,
    *,
    seed: int = 0,
    at_once: int = 10,
    valued: Valued | None = None,
    watches: Sequence[Watch] = (),
) -> list[Episode]:
    """Play episodes: a chunk of actions is drawn for an observation, clipped to [-1, 1], and taken one action after another.

    Args:
        make: makes an environment.
        at_once: environments that are played side by side, so that the network sees several observations. An episode depends
            on its number and the seed, and on the others of its round in the last bits of what the network computes.
        valued: estimates the value of the first chunk, to be compared with the discounted return.
        watches: see the first episodes, one each.

    Raises InputError if the environment has other observations or actions than the policy.
    """
    environments = [make() for _ in range(min(at_once, count))]
    found: list[Episode] = []
    for begin in range(0, count, len(environments)):
        found += _round(policy, environments[: count - begin], begin, seed, valued, watches[begin:])
    return found


def _round(
    policy: Actor, environments: Sequence[Environment], begin: int, seed: int, valued: Valued | None, watches: Sequence[Watch]
) -> list[Episode]:
    seeds = [stream(seed, "episode", begin + i).initial_seed() % 2**31 for i in range(len(environments))]
    discount = None if valued is None else valued.discount
    watching = [watches[i] if i < len(watches) else None for i in range(len(seeds))]
    lanes, turn = [_Lane(*one, discount) for one in zip(environments, seeds, watching, strict=True)], 0
    while going := [lane for lane in lanes if not lane.over]:
        observations = np.stack([np.asarray(lane.observation, dtype=np.float32) for lane in going])
        noise = stream(seed, "act", begin, turn).initial_seed()
        drawn = policy.act(torch.from_numpy(observations), seed=noise, batch_size=len(going))
        if valued is not None and turn == 0:
            estimates = valued.values(torch.from_numpy(observations), drawn.clamp(-1, 1).flatten(1)).tolist()
            for lane, value in zip(going, estimates, strict=True):
                lane.value = value
        for lane, chunk in zip(going, drawn.clamp(-1, 1).numpy(), strict=True):
            lane.take(chunk)
        turn += 1
    return [lane.episode() for lane in lanes]


class _Lane:
    """An episode that is being played."""

    def __init__(self, environment: Environment, seed: int, watch: Watch | None, discount: float | None):
        self.environment, self.watch, self.discount = environment, watch, discount
        self.observation, info = environment.reset(seed=seed)
        if watch is not None:
            watch(environment, self.observation, info, False)
        self.over, self.success, self.returned, self.steps = False, False, 0.0, 0
        self.value: float | None = None
        self.discounted, self.terminated = 0.0, False

    def take(self, chunk: Any) -> None:
        """Take the actions of a chunk, as long as the episode lasts."""
        for action in chunk:
            try:
                self.observation, reward, terminated, truncated, info = self.environment.step(action)
            except (ValueError, IndexError) as error:
                raise InputError(f"the environment does not take actions of {len(action)} numbers ({error})") from None
            self.discounted += (self.discount or 1.0) ** self.steps * float(reward)
            self.steps, self.returned, self.terminated = self.steps + 1, self.returned + float(reward), bool(terminated)
            self.over, self.success = terminated or truncated, self.success or bool(info.get("success", terminated))
            if self.watch is not None:
                self.watch(self.environment, self.observation, info, self.over)
            if self.over:
                return

    def episode(self) -> Episode:
        """What it came to."""
        more = (self.value, None if self.discount is None else self.discounted, self.terminated)
        return Episode(self.success, self.returned, self.steps, *more)


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
        **_of_values(episodes),
    }


def _of_values(episodes: Sequence[Episode]) -> dict[str, Any]:
    """The mean estimate of the value at the start, and its mean error, less the discounted return, with the standard error:
    over the episodes whose task was over, as the rest of another's return is not known. Nothing where none was estimated."""
    known = [(each.value, each.discounted) for each in episodes if each.value is not None and each.discounted is not None]
    if not known:
        return {}
    ended = [(each.value, each.discounted) for each in episodes if each.over and each.value is not None]
    errors = np.array(ended, dtype=float).reshape(-1, 2) @ [1.0, -1.0]
    several = len(errors) > 1
    return {
        "value": float(np.mean([value for value, _ in known])),
        "discounted_return": float(np.mean([returned for _, returned in known])),
        "value_error": float(errors.mean()) if len(errors) else None,
        "value_error_error": float(errors.std(ddof=1) / math.sqrt(len(errors))) if several else None,
        "episodes_with_known_return": len(errors),
    }
