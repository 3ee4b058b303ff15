"""DPM-Solver++(2M)."""

# Mutation tests: test_sampler.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.flows.field import Velocity
from tiltflow.samplers.solver import OdeSolver


def dpm_solver(velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
    """The probability-flow ODE by DPM-Solver++(2M) (2211.01095, algorithm 2): order 2 at one evaluation a step.

    It extrapolates the denoised sample x1hat linearly in log(t / (1 - t)). The first step, and the last one to t = 1, where
    that is infinite, are of order 1.
    """
    states, before = [x], x
    log_snr = torch.logit(times)
    for k in range(len(times) - 1):
        t, s = times[k].item(), times[k + 1].item()
        x1 = x + (1 - t) * velocity(x, times[k])
        ahead = x1
        if k > 0 and s < 1:
            ahead = x1 + ((log_snr[k + 1] - log_snr[k]) / (2 * (log_snr[k] - log_snr[k - 1]))).item() * (x1 - before)
        x, before = (1 - s) / (1 - t) * x + (s - t * (1 - s) / (1 - t)) * ahead, x1
        states.append(x)
    return states


class DpmSolverPlusPlus(OdeSolver):
    """The probability-flow ODE by DPM-Solver++(2M)."""

    order = 2

    def states(self, velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
        return dpm_solver(velocity, x, times)
