"""Sampling: the settings that say which solver draws samples, and on which grid."""

# Mutation tests: test_sampler.py

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import OwnGrid, Spacing, Start, split, variance_preserving
from tiltflow.samplers.solver import ChainSolver, Solver, check_memoryless, check_name, solver_named
from tiltflow.samplers.solvers.tcd import Tcd
from tiltflow.settings import External, Settings

SolverName = Annotated[str, AfterValidator(check_name), External(only_functions=True)]
"""The name of a solver, or `package.module:function`."""
MemorylessSolver = Annotated[str, AfterValidator(check_memoryless), External(only_functions=True)]
"""The name of a solver whose samples forget the noise they start from."""


class Sampling(Settings):
    """Settings of a sampler: a solver and its grid."""

    solver: SolverName = "memoryless"
    """memoryless, memoryless-offset, ddpm, ddim, ddim-half-way, consistency, tcd, flow-sde, euler, euler-maruyama, heun,
    stochastic-heun, dpm-solver++, or `package.module:function`, an ODE solver of your own."""
    num_inference_steps: Annotated[int, Field(ge=1)] = 40
    """Steps from noise to data."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, steps are smaller near the noise; see `time_grid`."""
    spacing: Spacing = "even"
    """middle: before that shift, steps are smaller in the middle of the time, where a tilt moves samples from mode to mode."""
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The noise of the `ddim`, `ddim-half-way`, `tcd`, `flow-sde`, `euler-maruyama` and `stochastic-heun` solvers: 0 is
    deterministic, 1 is DDPM, and all that stochastic-heun has. With a scheduler it is that of its DDIM, and 0 by default."""
    scheduler: str | None = None
    """Instead of a solver, and of pipelines alone: draw in the own steps of a scheduler of diffusers. default: the pipeline's,
    as its folder has it, whatever model.scheduler changes; or another class, such as DDIMScheduler, with its settings."""

    @model_validator(mode="before")
    @classmethod
    def _scheduler_takes_its_own_steps(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("scheduler") is None:
            return values
        for name, own in (("solver", "euler"), ("shift", 1.0), ("spacing", "even")):
            if values.get(name, own) != own:
                raise ValueError(f"a scheduler takes its own steps; leave {name} out")
        return {"solver": "euler", "eta": 0.0, **values}

    def build(self, start: Start = 0.0) -> Solver:
        """The solver, as a value; one that needs the clock of the model has it from the model's own grid."""
        solver = solver_named(self.solver, self.eta)
        return replace(solver, clock=start.clock) if isinstance(start, OwnGrid) and isinstance(solver, Tcd) else solver

    @property
    def is_chain(self) -> bool:
        """True for a chain of Gaussian steps, with or without noise."""
        return isinstance(self.build(), ChainSolver)

    @property
    def has_noise(self) -> bool:
        """True if its steps are random."""
        return self.build().has_noise

    def limits(self, start: Start = 0.0) -> list[str]:
        """Reasons why a method that controls this sampler, from time `start` on, does not aim at p_base exp(r / beta) exactly:
        one sentence each; none for the memoryless samplers from pure noise."""
        solver = self.build()
        if not solver.has_noise:
            return [
                f"The solver {self.solver} has no noise, so there is no path KL: what is paid for is the transport of the"
                " samples, and the optimum of that is not the tilted law."
            ]
        begin = self.times(start)[0] if callable(start) else torch.tensor(start, dtype=torch.float64)
        reasons, signal = [], variance_preserving(begin)[0].item() ** 2
        if not solver.is_memoryless:
            with_eta = f" with eta = {self.eta:g}" if solver.uses_eta else ""
            reasons.append(
                f"The solver {self.solver}{with_eta} is not memoryless: a sample depends on the noise that it"
                " started from, which training cannot tilt (initial-value bias)."
            )
        if solver.bias:
            reasons.append(f"The solver {self.solver} {solver.bias}.")
        if signal > 1e-3:
            reasons.append(
                f"The model's noise end still holds {signal:.1%} of the data's variance, which training cannot tilt"
                " (initial-value bias)."
            )
        return reasons

    def times(self, start: Start = 0.0) -> Tensor:
        """The grid from `start` to 1: [num_inference_steps + 1], float64.

        Raises InputError for euler-maruyama at start 0: the time of that process is infinite there; for a shift or a spacing of
        a model that has its own grid; and for a scheduler, which has times of its own.
        """
        if self.scheduler is not None:
            raise InputError(f"scheduler {self.scheduler}: only pipelines of diffusers have one; leave it out")
        if callable(start):
            if self.shift != 1:
                raise InputError(f"shift {self.shift:g}: the model has its own time grid; leave shift at 1")
            if self.spacing != "even":
                raise InputError(f"spacing {self.spacing}: the model has its own time grid; leave spacing at even")
            return start(self.num_inference_steps)
        return self.build().times(self.num_inference_steps, start=start, shift=self.shift, spacing=self.spacing)

    def chain(self, start: Start = 0.0, *, substeps: int = 1) -> Chain:
        """The chain of this solver from time `start`, each step split into so many of equal length. Raises ValueError for a
        solver that is not one."""
        solver = self.build(start)
        if not isinstance(solver, ChainSolver):
            raise ValueError(f"{self.solver} is no chain of Gaussian steps")
        return solver.chain(split(self.times(start), substeps))


def check_sampling(sampling: Any) -> None:
    """Raises InputError if it is neither a Sampling nor None."""
    if sampling is not None and not isinstance(sampling, Sampling):
        raise InputError(f"sampling must be a Sampling(solver=.., num_inference_steps=..), is {sampling!r}")
