"""Checks of your own parts against theory: a solver, interpolant, reward, utility, model or method. Every built-in passes.

Each is a function that raises AssertionError, with one sentence, at the first thing that is not so:

>>> from tiltflow.samplers.solvers.heun import Heun
>>> check_solver(Heun())
"""

from tiltflow.testing.interpolants import check_interpolant
from tiltflow.testing.methods import check_method
from tiltflow.testing.models import check_model
from tiltflow.testing.rewards import check_reward
from tiltflow.testing.solvers import check_solver
from tiltflow.testing.utilities import check_utility

__all__ = ["check_interpolant", "check_method", "check_model", "check_reward", "check_solver", "check_utility"]
