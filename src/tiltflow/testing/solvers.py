"""A solver against a Gaussian: order, noise and memory are as it claims."""

# Mutation tests: test_testing.py

from __future__ import annotations

import math

import torch
from torch import Tensor

from tiltflow.samplers.solver import ChainSolver, OdeSolver, Solver, StochasticSolver
from tiltflow.testing.gaussian import MEAN, law_of, law_of_states, spread, velocity

COARSE, FINE = 40, 80
SLACK = 0.25
"""Margin by which a measured order may fall below the claimed one, at finite steps."""


def check_solver(solver: Solver) -> None:
    """Check that a solver converges at its order, has noise, and forgets its start, as it says.

    On N(0.7, 0.5^2), from t = 0.1 to 0.9, where nothing is singular: the law at the end of a chain, or the map of the ODE.

    Raises AssertionError.
    """
    inner = [0.1 + 0.8 * torch.linspace(0, 1, steps + 1, dtype=torch.float64) for steps in (COARSE, FINE)]
    coarse, fine = (error(solver, times) for times in inner)
    assert math.isfinite(fine), "the solver gives numbers that are not finite"
    measured = math.log2(coarse / fine) if fine > 1e-12 else math.inf
    assert solver.order is None or measured > solver.order - SLACK, (
        f"the solver says that its order is {solver.order}, and its error falls as h^{measured:.2f}: {coarse:.2g} at"
        f" {COARSE} steps, {fine:.2g} at {FINE}"
    )
    if isinstance(solver, ChainSolver):
        chain = solver.chain(solver.times(COARSE, start=1e-3))
        noise = bool((chain.std > 0).any())
        assert noise == solver.has_noise, f"the solver claims has_noise = {solver.has_noise}, but its steps say {noise}"
        left = abs(law_of(chain)[2])
        assert (left < 2e-3) == solver.is_memoryless, (
            f"the solver says is_memoryless = {solver.is_memoryless}, and {left:.1%} of its start is left at the end"
        )
    elif isinstance(solver, OdeSolver):
        assert not solver.has_noise, "an ODE solver has no noise"
    else:
        assert solver.has_noise == (solver.eta > 0), "a stochastic solver has noise, but for eta = 0"


def error(solver: Solver, times: Tensor) -> float:
    """The error at the end of a grid: of the mean and the variance of a law, or of the points of an ODE."""
    if isinstance(solver, ChainSolver):
        mean, variance, _ = law_of(solver.chain(times))
    if isinstance(solver, StochasticSolver):
        mean, variance = law_of_states(solver, times)
    if not isinstance(solver, OdeSolver):
        return max(abs(mean - MEAN * times[-1].item()), abs(variance - spread(times[-1]).item() ** 2))
    x = torch.tensor([-1.5, 0.2, 1.0], dtype=torch.float64)
    exact = MEAN * times[-1] + spread(times[-1]) / spread(times[0]) * (x - MEAN * times[0])
    states = solver.states(velocity, x, times)
    assert len(states) == len(times), f"the solver must give a state for each of {len(times)} times, got {len(states)}"
    return (states[-1] - exact).abs().max().item()
