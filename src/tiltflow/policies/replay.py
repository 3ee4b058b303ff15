"""A replay buffer: transitions of a data set, and of episodes that are added to them."""

# Mutation tests: test_online.py

from __future__ import annotations

from typing import Any

import torch

from tiltflow.policies.transitions import Transitions


class Replay:
    """Transitions with rewards, which grow.

    Args:
        data: those at the beginning. Raises InputError if none of their episodes is as long as `horizon`.
    """

    def __init__(self, data: Transitions, horizon: int):
        self.data, self.horizon = data, horizon
        self.transitions, self.starts = data, data.starts(horizon)
        """All rows, and those at which chunks begin."""
        self.updates = 0
        """How often was learned from them."""

    @property
    def added(self) -> int:
        """Rows that were added to the data."""
        return len(self.transitions.last) - len(self.data.last)

    def add(self, episode: Transitions) -> None:
        """Add an episode, of which nothing is learned if it is shorter than a chunk."""
        self.transitions = self.transitions.joined(episode.to(self.transitions.last.device))
        self.starts = self.transitions.starts(self.horizon)

    def state_dict(self) -> dict[str, Any]:
        """The rows that were added, none where there are none, and the number of updates."""
        tensors: dict[str, Any] = vars(self.transitions)
        rows = {name: value[-self.added :] for name, value in tensors.items()} if self.added else {}
        return {"updates": self.updates, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        self.updates, self.transitions = int(state["updates"]), self.data
        if state["rows"]:
            rows: dict[str, Any] = {name: value.to(self.data.last.device) for name, value in state["rows"].items()}
            self.transitions = self.data.joined(Transitions(**rows | {"last": rows["last"] - len(self.data.last)}))
        self.starts = self.transitions.starts(self.horizon)


def episode_of(observations: list[Any], actions: list[Any], rewards: list[float], over: bool) -> Transitions:
    """The rows of an episode of n steps, n at least 1: as in `transitions`, the last has the last observation and no step.

    Args:
        observations: n + 1 of them [observation].
        actions: n of them [action].
        over: whether the last step ended the task, and not the time for it.
    """
    seen, taken = (
        torch.stack([torch.as_tensor(each, dtype=torch.float32) for each in all_of]) for all_of in (observations, actions)
    )
    masks = torch.ones(len(seen))
    masks[-2] = float(not over)
    return Transitions(
        seen,
        torch.cat([taken, torch.zeros_like(taken[:1])]),
        torch.full((len(seen),), len(seen) - 1),
        torch.tensor([*rewards, 0.0]),
        masks,
    )
