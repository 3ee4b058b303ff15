"""DDIM whose last step goes half the way to data, as in the code that the authors of Adjoint Matching released."""

# Mutation tests: test_official_code.py test_sampler.py

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import variance_preserving
from tiltflow.samplers.solvers.ddim import Ddim, ddim


def ddim_half_way(times: Tensor, eta: float = 0.0) -> Chain:
    """`ddim`, whose last step goes to where alpha^2 is the mean of its values at both ends of the step, so that it has noise,
    and is controlled. What it ends in, variance preserving and with that noise, stands for the sample at the last time."""
    square = variance_preserving(times[-2:])[0].square().mean()
    there = square.sqrt() / (square.sqrt() + (1 - square).sqrt())
    chain = ddim(torch.cat([times[:-1], there[None]]), eta)
    scale = torch.ones_like(chain.std)
    scale[-1] = torch.hypot(times[-1], 1 - times[-1]) / torch.hypot(there, 1 - there)
    return replace(
        chain,
        times=times,
        x_scale=scale * chain.x_scale,
        v_scale=scale * chain.v_scale,
        std=scale * chain.std,
        price=chain.energy,
    )


class DdimHalfWay(Ddim):
    """DDIM, DDPM at eta 1, whose last step goes half the way to data."""

    bias = "stops half of its last step before the data, so that samples keep some noise"

    def chain(self, times: Tensor) -> Chain:
        return ddim_half_way(times, self.eta)
