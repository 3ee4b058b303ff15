"""Euler-Maruyama of a diffusion in its own time."""

# Mutation tests: test_sampler.py test_lqg.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Spacing, variance_preserving
from tiltflow.samplers.solver import ChainSolver
from tiltflow.samplers.solvers.euler import euler


def euler_maruyama(times: Tensor, eta: float = 1.0) -> Chain:
    r"""Euler-Maruyama of a variance-preserving diffusion in its own coordinates X and its own time,

    dX = (X / 2 + (1 + eta^2) / 2 score(X)) dtau + eta dB,     tau = 2 log alpha                    (2011.13456, eq. 6)

    on the steps of tau that `times` imply (uniform ones by `EulerMaruyama`): what a continuous-time formula for the score as
    the action means on a grid, and the chain whose optimum the problem `lqg` knows exactly. Needs times above 0. At eta = 0
    its energy is that of `euler`.
    """
    alpha, beta = variance_preserving(times)
    scale, step = alpha + beta, 2 * (alpha[1:] / alpha[:-1]).log()
    pull = (1 + eta**2) / 2 * step / beta[:-1]  # the score of X is -x0hat / beta, with x0hat = x - t v on the linear path
    x_scale = (scale[:-1] * (1 + step / 2) - pull) / scale[1:]
    price = euler(times).energy if eta == 0 else None
    return Chain(times, x_scale, pull * times[:-1] / scale[1:], eta * step.sqrt() / scale[1:], price)


class EulerMaruyama(ChainSolver):
    """Euler-Maruyama of a variance-preserving diffusion, in uniform steps of its own time; eta scales the noise."""

    uses_eta = True

    @property
    def has_noise(self) -> bool:
        return self.eta > 0

    @property
    def is_memoryless(self) -> bool:
        return self.eta == 1

    def times(self, num_inference_steps: int, *, start: float = 0.0, shift: float = 1.0, spacing: Spacing = "even") -> Tensor:
        """Uniform in tau, whatever `shift` and `spacing` are. Raises InputError at start 0, where tau is infinite."""
        if start <= 0:
            raise InputError("solver euler-maruyama needs a diffusion model, which starts above t = 0; use memoryless here")
        alpha = variance_preserving(torch.tensor([start], dtype=torch.float64))[0] ** torch.linspace(
            1, 0, num_inference_steps + 1, dtype=torch.float64
        )
        return alpha / (alpha + (1 - alpha**2).sqrt())

    def chain(self, times: Tensor) -> Chain:
        return euler_maruyama(times, self.eta)
