"""Samples of earlier batches, each with its reward and the tilt of the law that it was drawn from, to learn from again.

They are told apart by condition: samples of an earlier batch are of use where their prompt, or their class, comes again. The
first batch, drawn from the base, is never forgotten.
"""

# Mutation tests: none: bookkeeping, in test_replay.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tiltflow.flows.field import VelocityField


@dataclass(frozen=True)
class Kept:
    """The samples of a batch.

    Args:
        x: [batch, *event].
        rewards: [batch], float64.
        group: number of each sample's condition [batch].
        names: of the conditions; see `VelocityField.name_of`.
        tilt: the inverse temperature of the law that they were drawn from.
    """

    x: Tensor
    rewards: Tensor
    group: Tensor
    names: list[str]
    tilt: float


@dataclass(frozen=True)
class Recalled:
    """Samples of several batches, under the conditions of the present one.

    Args:
        x: [n, *event].
        rewards: [n], float64.
        tilts: of the laws that they were drawn from [n], float64.
        group: number of each sample's condition among the present ones [n].
        where: a sample of the present batch with the same condition [n]; itself, for those of that batch.
    """

    x: Tensor
    rewards: Tensor
    tilts: Tensor
    group: Tensor
    where: Tensor

    @property
    def groups(self) -> list[Tensor]:
        """Indices of the samples of each condition."""
        return [(self.group == g).nonzero()[:, 0] for g in range(int(self.group.max()) + 1)]


@dataclass
class Replay:
    """Batches, the first and the latest of them."""

    batches: list[Kept] = field(default_factory=list)

    def add(self, x: Tensor, rewards: Tensor, tilt: float, flow: VelocityField, most: int) -> Recalled:
        """Keep the samples of a batch, forget what is more than `most` batches with it, and recall all with its conditions.

        Args:
            x: [batch, *event].
            rewards: [batch].
            tilt: of their law.
            flow: bound to the conditions of the batch.
        """
        members = flow.groups(len(x), x.device)
        group = torch.empty(len(x), dtype=torch.long, device=x.device)
        for number, some in enumerate(members):
            group[some] = number
        names = [flow.name_of(int(some[0])) for some in members]
        self.batches.append(Kept(x, rewards.double(), group, names, tilt))
        while len(self.batches) > most:
            del self.batches[min(1, most - 1)]
        earlier = self._of(self.batches[:-1], members, names)
        own = Recalled(
            x, rewards.double(), torch.full((len(x),), tilt, dtype=torch.float64), group, torch.arange(len(x)).to(group)
        )
        return Recalled(*(torch.cat(each) for each in zip(*(vars(one).values() for one in [*earlier, own]), strict=True)))

    def earlier(self, flow: VelocityField, count: int, device: torch.device) -> list[Recalled]:
        """The samples of each batch that is kept, of the conditions that a flow is bound to for `count` samples."""
        members = flow.groups(count, device)
        return self._of(self.batches, members, [flow.name_of(int(some[0])) for some in members])

    @staticmethod
    def _of(batches: Sequence[Kept], members: Sequence[Tensor], names: Sequence[str]) -> list[Recalled]:
        """The samples of each batch whose condition is one of these."""
        device, found = members[0].device, []
        for batch in batches:
            present = torch.tensor([names.index(name) if name in names else -1 for name in batch.names], device=device)
            group = present[batch.group]
            some = (group >= 0).nonzero()[:, 0]
            where = torch.zeros_like(group)
            for number, own in enumerate(members):
                of_group = (group == number).nonzero()[:, 0]
                where[of_group] = own[torch.arange(len(of_group), device=device) % len(own)]
            tilts = torch.full((len(some),), batch.tilt, dtype=torch.float64)
            found.append(Recalled(batch.x[some], batch.rewards[some], tilts, group[some], where[some]))
        return found

    def state_dict(self) -> list[dict[str, Any]]:
        """The state that `load_state_dict` takes."""
        return [vars(batch) for batch in self.batches]

    def load_state_dict(self, state: Sequence[dict[str, Any]], device: torch.device) -> None:
        """Resume from a state, on a device."""

        def put(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        self.batches = [Kept(**{key: put(value) for key, value in batch.items()}) for batch in state]
