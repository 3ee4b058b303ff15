"""DDPM's posterior sampling."""

from __future__ import annotations

from torch import Tensor

from tiltflow.samplers.chain import Chain
from tiltflow.samplers.solver import ChainSolver
from tiltflow.samplers.solvers.ddim import ddim


class Ddpm(ChainSolver):
    """DDPM's posterior steps (2006.11239): `ddim` at eta 1."""

    has_noise = True
    is_memoryless = True

    def chain(self, times: Tensor) -> Chain:
        return ddim(times, eta=1.0)
