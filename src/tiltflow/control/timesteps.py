"""The steps of a trajectory that enter a loss: fewer of them are a cheaper estimate of the same sum."""

# Mutation tests: test_adjoint_matching.py

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.settings import Settings

Fraction = Annotated[float, Field(ge=0, le=1)]


class Stratum(Settings):
    """`count` different steps, drawn anew at each iteration from the part [start, end) of the grid."""

    start: Fraction = 0.0
    """Start of the part: 0 is noise."""
    end: Fraction = 1.0
    """End of the part: 1 is data."""
    count: Annotated[int, Field(ge=1)]
    """Number of steps drawn from the part."""


def choose_timesteps(
    strata: Sequence[Stratum] | None, steps: int, total: int, batch: int, generator: torch.Generator, *, share: int = 1
) -> Tensor:
    """[count, batch]: the steps that enter the loss.

    Args:
        strata: so many steps from each part of the grid of `total` steps; None for all.
        steps: of the grid, only the first so many can be chosen.
        share: so many samples in a row have the same steps.
    """
    rows = []
    for stratum in strata or (Stratum(count=steps),):
        low, high = round(stratum.start * total), round(stratum.end * total)
        inside = max(min(high, steps) - low, 0)
        keys = torch.rand(inside, -(-batch // share), generator=generator, device=generator.device)
        chosen = low + keys.argsort(dim=0)[: min(stratum.count, inside)]
        rows.append(chosen.repeat_interleave(share, dim=1)[:, :batch])
    return torch.cat(rows)
