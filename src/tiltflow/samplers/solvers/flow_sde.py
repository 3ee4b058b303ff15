"""Euler-Maruyama of the SDE of Flow-GRPO, with any noise."""

# Mutation tests: test_sampler.py test_group_policies.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.samplers.chain import Chain, sde
from tiltflow.samplers.solver import ChainSolver
from tiltflow.samplers.solvers.euler import euler


def flow_sde(times: Tensor, eta: float) -> Chain:
    """dX = (v + sigma^2 (t v - x) / (2 (1 - t))) dt + sigma dB with sigma = a sqrt((1 - t) / t), a = sqrt(2) eta (2505.05470).
    At t = 0, where that is infinite, its value after the first step. The last step follows the ODE."""
    after = torch.where(times[:-1] > 0, times[:-1], times[1])
    return sde(times, lambda t: eta * (2 * (1 - after) / after).sqrt()).with_last_step_of(euler(times))


class FlowSde(ChainSolver):
    """The SDE of Flow-GRPO; eta scales the noise: 1 is that of the memoryless SDE, 0.495 is the published one (a = 0.7)."""

    uses_eta = True

    @property
    def has_noise(self) -> bool:
        return self.eta > 0

    @property
    def is_memoryless(self) -> bool:
        return self.eta == 1

    def chain(self, times: Tensor) -> Chain:
        return euler(times) if self.eta == 0 else flow_sde(times, self.eta)
