"""Observations, the condition of policies: rows of a data set of transitions, some of which are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, overload

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.policies.transitions import load_transitions
from tiltflow.settings import PathOrName, Settings
from tiltflow.streams import stream


class Observations(Settings):
    """Observations of a data set, each of which a policy has a law of actions for."""

    name: Literal["observations"] = "observations"
    data: PathOrName
    """An .npz file of transitions, as OGBench writes them."""
    num_held_out: Annotated[int, Field(ge=1)] = 256
    """Observations that are drawn at random for the evaluation, and not tuned on: at most half of all."""

    def items(self, class_names: Sequence[str], seed: int = 0) -> tuple[Sequence[Item], Sequence[Item]]:
        """Return (observations to tune on, observations held out). Raises InputError if the data cannot be read."""
        observations = load_transitions(self.data).observations
        order = torch.randperm(len(observations), generator=stream(seed, "held-out observations"))
        count = min(self.num_held_out, len(order) // 2)
        return Rows(observations, order[count:]), Rows(observations, order[:count])


@dataclass(frozen=True)
class Rows(Sequence[Item]):
    """Observations [rows, observation] as items, made when they are asked for: a data set may have millions.

    Args:
        which: the rows that are items, and their order.
    """

    observations: Tensor
    which: Tensor

    def __len__(self) -> int:
        return len(self.which)

    @overload
    def __getitem__(self, i: int) -> Item: ...

    @overload
    def __getitem__(self, i: slice) -> list[Item]: ...

    def __getitem__(self, i: int | slice) -> Item | list[Item]:
        if isinstance(i, slice):
            return self._items(self.which[i])
        return self._items(self.which[i][None])[0]  # an IndexError at the end, which ends iteration

    def at(self, places: Tensor) -> list[Item]:
        """The items at these places, int64 [count]."""
        return self._items(self.which[places.cpu()])

    def _items(self, rows: Tensor) -> list[Item]:
        seen = self.observations[rows].tolist()
        return [Item(f"observation {row}", {"observation": tuple(each)}) for row, each in zip(rows.tolist(), seen, strict=True)]


def observed(items: Sequence[Item], observation_dim: int) -> Tensor:
    """The observations [items, observation] of items. Raises InputError for items without, and for another size."""
    found = [item.metadata["observation"] for item in items if "observation" in item.metadata]
    if len(found) < len(items):
        raise InputError("conditions: a policy draws actions for observations; use {name: observations, data: ..}")
    size = len(found[0])
    if size != observation_dim:
        raise InputError(f"conditions: observations of {size} numbers, and the policy sees {observation_dim}")
    return torch.from_numpy(np.array(found, np.float32))  # torch.tensor takes several times as long
