"""The memoryless SDE as its paper prints it."""

# Mutation tests: test_sampler.py

from __future__ import annotations

from torch import Tensor

from tiltflow.samplers.chain import Chain
from tiltflow.samplers.solver import ChainSolver


def memoryless_offset(times: Tensor) -> Chain:
    """The scheme of 2409.08861, appendix G, on a uniform grid of step h: drift 2 v - x / (t + h) and
    sigma^2 = 2 (1 - t + h) / (t + h). The drift preserves the marginals for sigma^2 = 2 eta only: biased at order h."""
    t, h = times[:-1], times.diff()
    return Chain(times, 1 - h / (t + h), 2 * h, (h * 2 * (1 - t + h) / (t + h)).sqrt())


class MemorylessOffset(ChainSolver):
    """The scheme of 2409.08861, appendix G."""

    has_noise = True
    is_memoryless = True
    bias = "is biased at the order of its step, and remembers a little of its start"

    def chain(self, times: Tensor) -> Chain:
        return memoryless_offset(times)
