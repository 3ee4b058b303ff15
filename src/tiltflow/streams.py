"""Randomness: every draw comes from a generator named by what it is for. Nothing touches torch's global generator."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


def stream(seed: int, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on (seed, name) alone, so a draw does not move when an unrelated one is added.

    >>> a, b = stream(0, "noise", 3), stream(0, "noise", 3)
    >>> torch.equal(torch.randn(4, generator=a), torch.randn(4, generator=b))
    True
    """
    digest = hashlib.blake2b(repr((seed, *name)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class Rows:
    """A generator of the numbers of some rows of a batch of `size`: those that they have where all rows are drawn together."""

    generator: torch.Generator
    size: int
    rows: slice


Noise = torch.Generator | Rows


def normal(shape: Sequence[int], generator: Noise, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers on the device of the generator, drawn in float32 and then converted to `dtype`, so that a model
    gets the same noise in any precision."""
    if isinstance(generator, Rows):
        return normal((generator.size, *shape[1:]), generator.generator, dtype)[generator.rows]
    return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=torch.float32).to(dtype)


class Buildable(Protocol):
    """Settings of a network."""

    def build(self) -> nn.Module: ...


def new_network(settings: Buildable, seed: int) -> nn.Module:
    """Build a network with initial weights that depend on its settings and `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "weights").initial_seed())
        network = settings.build()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
