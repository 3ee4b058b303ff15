"""Episodes of the policy as it is, played while it is trained: an environment, how often, and what is played."""

# Mutation tests: test_online.py

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.policies.environments import Environment, make_any
from tiltflow.policies.replay import episode_of
from tiltflow.policies.transitions import Transitions
from tiltflow.settings import FunctionOrName, Settings
from tiltflow.streams import stream

Count = Annotated[int, Field(ge=1)]
Act = Callable[[Tensor, torch.Generator], Tensor]
"""(observations [n, observation], generator) -> chunks of actions [n, horizon * action] in [-1, 1]."""


class Online(Settings):
    """Episodes that are played between updates, one at a time and whole, so that a run can go on from a checkpoint."""

    environment: FunctionOrName
    """Name of an environment of OGBench; or `package.module:function`, which makes one of gymnasium."""
    task: Count = 1
    """Number of its task, of OGBench."""
    sparse: bool = False
    """Rewards of -1 until the task is over, of OGBench: as the data have them."""
    every: Count = 200
    """Updates from one episode to the next: as many as an episode has steps, for one step an update."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the episodes."""

    def make(self, observation: int, action: int) -> Environment:
        """Make the environment. Raises InputError if it cannot be made, or has other observations or actions than the data."""
        found: Any = make_any(self.environment, self.task, sparse=self.sparse)
        first, _ = found.reset(seed=0)
        if first.shape != (observation,):
            raise InputError(f"environment {self.environment}: observations {list(first.shape)}, in the data [{observation}]")
        if found.action_space.shape != (action,):
            raise InputError(
                f"environment {self.environment}: actions {list(found.action_space.shape)}, in the data [{action}]"
            )
        return found  # type: ignore[no-any-return]

    def play(self, environment: Environment, act: Act, number: int, action: int, device: torch.device) -> Transitions:
        """Play an episode, which depends on its number, the seed and the policy alone.

        Args:
            act: draws a chunk of actions, which are taken one after another.
            action: numbers of an action.
            device: of the generator.
        """
        generator = stream(self.seed, "online", number, device=device)
        seen, _ = environment.reset(seed=stream(self.seed, "online episode", number).initial_seed() % 2**31)
        observations, actions, rewards, terminated, truncated = [seen], list[Any](), list[float](), False, False
        while not (terminated or truncated):
            chunk = act(torch.as_tensor(seen, dtype=torch.float32)[None], generator).cpu()[0]
            for one in chunk.unflatten(0, (-1, action)).numpy():
                seen, reward, terminated, truncated, _ = environment.step(one)
                for values, value in ((observations, seen), (actions, one), (rewards, float(reward))):
                    values.append(value)
                if terminated or truncated:
                    break
        return episode_of(observations, actions, rewards, terminated)
