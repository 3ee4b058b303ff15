"""The memoryless SDE."""

# Mutation tests: test_sampler.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.samplers.chain import Chain, sde
from tiltflow.samplers.solver import ChainSolver
from tiltflow.samplers.solvers.euler import euler


def memoryless_sigma(t: Tensor) -> Tensor:
    """sqrt(2 eta) = sqrt(2 (1 - t) / t) on the linear path; infinite at t = 0."""
    return (2 * (1 - t) / t).sqrt()


def memoryless(times: Tensor, *, denoise: bool = True) -> Chain:
    r"""Memoryless first jump, then Euler-Maruyama with exact kappa and sigma^2 = 2 eta.

    The first step draws x_{t_1} = t_1 x1hat(x_0) + (1 - t_1) eps afresh: for an exact model x1hat does not depend on pure
    noise, so the chain forgets x_0 exactly, nothing is infinite, and there is no offset to tune. With `denoise` the last
    step follows the ODE without noise (its std would be h sqrt(2 / (1 - h))); it is not controlled.
    """
    after_jump = sde(times[1:], memoryless_sigma)
    t, s = times[0], times[1]
    chain = Chain(
        times,
        torch.cat([s[None], after_jump.x_scale]),
        torch.cat([(s * (1 - t))[None], after_jump.v_scale]),
        torch.cat([(1 - s)[None], after_jump.std]),
    )
    return chain.with_last_step_of(euler(times)) if denoise else chain


class Memoryless(ChainSolver):
    """The memoryless SDE, whose samples forget the noise they start from."""

    has_noise = True
    is_memoryless = True

    def chain(self, times: Tensor) -> Chain:
        return memoryless(times)
