"""A batch in chunks: less memory at a time, and a share of the work for each process."""

# Mutation tests: test_flow.py test_conditions.py

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tiltflow import processes
from tiltflow.flows.field import VelocityField, Wrapper


@dataclass(frozen=True)
class Chunked(Wrapper):
    """A field that all processes evaluate together, each on at most `size` samples at a time."""

    size: int | None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        parts = processes.shares(len(x), self.size)
        return processes.gathered([self.flow.select(part)(x[part], t[part] if t.ndim else t) for part in parts], len(x))


def in_chunks(flow: VelocityField, size: int | None = None) -> VelocityField:
    """`flow`, evaluated by all processes and on at most `size` samples at a time: less time and memory, the same result."""
    return flow if size is None and processes.count() == 1 else Chunked(flow, size)
