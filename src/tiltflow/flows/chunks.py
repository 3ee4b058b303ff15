"""A batch in chunks: less memory at a time, and a share of the work for each process."""

# Mutation tests: test_flow.py test_conditions.py

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow import processes
from tiltflow.flows.field import VelocityField, Wrapper


@dataclass(frozen=True)
class Chunked(Wrapper):
    """A field that all processes evaluate together, each on at most `size` samples at a time.

    Args:
        own: whether each process evaluates samples of its own instead, as many as every other one.
    """

    size: int | None
    own: bool = False

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        parts = processes.cut(slice(0, len(x)), self.size) if self.own else processes.shares(len(x), self.size)
        if parts == [slice(0, len(x))]:
            return self.flow(x, t)
        found = [self.flow.select(part)(x[part], t[part] if t.ndim else t) for part in parts]
        return torch.cat(found) if self.own else processes.gathered(found, len(x))


def in_chunks(flow: VelocityField, size: int | None = None, *, own: bool = False) -> VelocityField:
    """`flow`, evaluated by all processes and on at most `size` samples at a time: less time and memory, the same result.

    Args:
        own: whether each process evaluates samples of its own instead.
    """
    return flow if size is None and (own or processes.count() == 1) else Chunked(flow, size, own)
