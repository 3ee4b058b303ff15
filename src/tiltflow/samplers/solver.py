"""Solvers as values: how a velocity field becomes samples, and the properties of each.

A solver is a chain of Gaussian steps (`ChainSolver`), with or without noise, or it integrates the probability-flow ODE in
some other way (`OdeSolver`): several evaluations a step, several steps of memory, or a function of yours. Of both, the visited
states and velocities are kept, which is all that a policy gradient needs. A `StochasticSolver` has noise and is no chain: it
draws samples, and is not tuned.

Each one is a file in `tiltflow.samplers.solvers`, which a recipe names: `dpm-solver++` is the class `DpmSolverPlusPlus` in
`dpm_solver_plus_plus.py`.
"""

# Mutation tests: test_sampler.py

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, cast

from torch import Tensor

from tiltflow.errors import did_you_mean
from tiltflow.flows.field import Velocity
from tiltflow.plugins import find, import_function, names
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Spacing, time_grid

SOLVERS = "samplers.solvers"
OdeFunction = Callable[[Velocity, Tensor, Tensor], list[Tensor]]
"""(velocity, x [batch, *event] at the first time, times [K + 1]) -> the K + 1 states at those times, x first. It may evaluate
the velocity wherever and as often as it likes."""


@dataclass(frozen=True)
class BaseSolver:
    """Properties of a solver.

    Args:
        eta: the scale of its noise, from 0 to 1, of a solver that has one (`uses_eta`).
    """

    eta: float = 1.0

    uses_eta: ClassVar[bool] = False
    order: ClassVar[int | None] = 1
    """The errors fall with the step h as h^order, or faster; None if unknown."""
    bias: ClassVar[str] = ""
    """A further reason why a law tuned on it is not p_base exp(r / beta): the end of a sentence about the solver."""

    @property
    def has_noise(self) -> bool:
        """True if its steps are random."""
        return False

    @property
    def is_memoryless(self) -> bool:
        """True if samples do not depend on the noise they start from, if that is pure and the steps are small: this makes a
        tilt of the paths one of the samples (2409.08861, Theorem 1)."""
        return False

    def times(self, num_inference_steps: int, *, start: float = 0.0, shift: float = 1.0, spacing: Spacing = "even") -> Tensor:
        """Its grid from `start` to 1: [num_inference_steps + 1], float64; see `time_grid`."""
        return time_grid(num_inference_steps, start=start, shift=shift, spacing=spacing)


class ChainSolver(BaseSolver, ABC):
    """A solver that is a chain of Gaussian steps."""

    @abstractmethod
    def chain(self, times: Tensor) -> Chain:
        """The chain on a grid [K + 1]."""


class OdeSolver(BaseSolver, ABC):
    """A solver of the probability-flow ODE that is no chain of Gaussian steps."""

    @abstractmethod
    def states(self, velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
        """See `OdeFunction`."""


class StochasticSolver(BaseSolver, ABC):
    """A solver with random steps that are not Gaussian in the state before: to sample with, not to tune."""

    @property
    def has_noise(self) -> bool:
        return True

    @abstractmethod
    def states(self, velocity: Velocity, x: Tensor, times: Tensor, noise: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The K + 1 states at `times` [K + 1], x [batch, *event] first.

        Args:
            noise: x -> fresh noise of the model, of its shape.
        """


@dataclass(frozen=True)
class FunctionSolver(OdeSolver):
    """An `OdeFunction` of yours.

    Args:
        path: `package.module:function`. Nothing is imported before it is needed.
    """

    path: str = ""

    order = None

    def states(self, velocity: Velocity, x: Tensor, times: Tensor) -> list[Tensor]:
        """Raises InputError if the function cannot be imported."""
        return cast(OdeFunction, import_function(self.path, "solver"))(velocity, x, times)


Solver = ChainSolver | OdeSolver | StochasticSolver


@cache  # of names that are known: settings are made in every iteration, and a folder is read for it
def check_name(solver: str) -> str:
    """The name of a solver, or `package.module:function`. Raises ValueError, with the nearest name, for anything else."""
    known = names(SOLVERS)
    if solver not in known and ":" not in solver:
        raise ValueError(f"there is no solver {solver!r}{did_you_mean(solver, known)}")
    return solver


def check_memoryless(solver: str) -> str:
    """The name of a solver whose noise is memoryless at eta = 1. Raises ValueError for any other."""
    if not solver_named(check_name(solver)).is_memoryless:
        known = [name for name in names(SOLVERS) if solver_named(name).is_memoryless]
        raise ValueError(f"must be a memoryless solver ({', '.join(known)}), is {solver!r}")
    return solver


def solver_named(name: str, eta: float = 1.0) -> Solver:
    """The solver with this name, or of the function at `package.module:function`."""
    if ":" in name:
        return FunctionSolver(path=name)
    solver: Solver = find(SOLVERS, name)(eta)
    return solver
