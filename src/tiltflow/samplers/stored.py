"""Tensors of the steps of a batch, such as the states of paths, stored where and in which dtype is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor


class Stored(Sequence[Tensor]):
    """Tensors of steps, [batch, *event] each: what is read is on the device and in the dtype of what was written.

    Args:
        data: [steps, batch, *event], the memory that they lie in.
        like: has the device and the dtype of what is read.
    """

    def __init__(self, data: Tensor, like: Tensor):
        self.data, self.like = data, like.new_empty(0)

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, which: int) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice) -> Stored: ...
    def __getitem__(self, which: int | slice) -> Tensor | Stored:
        """A step; or some of them, in the same memory."""
        return Stored(self.data[which], self.like) if isinstance(which, slice) else self.data[which].to(self.like)

    def __setitem__(self, k: int, value: Tensor) -> None:
        self.data[k] = value

    def of(self, which: slice) -> Stored:
        """These samples of the batch, in the same memory."""
        return Stored(self.data[:, which], self.like)

    def at(self, k: Tensor, i: Tensor) -> Tensor:
        """The steps k [pairs] of the samples i [pairs]: [pairs, *event]."""
        return self.data[k.to(self.data.device), i.to(self.data.device)].to(self.like)

    def keep(self, kept: Tensor) -> Stored:
        """Leave out all other samples, in place; see `exchange`."""
        kept = kept.to(self.data.device)
        return self.exchange(len(kept), lambda k: self.data[k, kept])

    def exchange(self, count: int, steps: Callable[[int], Tensor]) -> Stored:
        """Put so many samples, no more than there are, in the place of these: there is no room for a copy. What else is in this
        memory is lost.

        Args:
            steps: k -> their step k [count, *event], which may depend on this one's and on later ones.
        """
        data, flat = self.data, self.data.view(-1)
        size = data[0, :1].numel() * count
        for k in range(len(data)):  # a step is written to where only itself and steps before it were
            flat[k * size : (k + 1) * size] = steps(k).view(-1)
        return Stored(flat[: len(data) * size].view(len(data), count, *data.shape[2:]), self.like)


@dataclass(frozen=True)
class Storage:
    """How trajectories are stored: on the device and in the dtype that they are computed in, unless others are given."""

    dtype: torch.dtype | None = None
    device: str | None = None

    def new(self, steps: int, like: Tensor) -> Stored:
        """Room for so many tensors like this one [batch, *event]."""
        return Stored(like.new_empty((steps, *like.shape), dtype=self.dtype, device=self.device), like)


AS_COMPUTED = Storage()
"""Nothing is rounded or moved."""
