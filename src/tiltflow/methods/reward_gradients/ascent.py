"""Methods that raise the reward by its gradient through steps of a sampler: its settings, and what they need."""

# Mutation tests: none: settings alone, in test_draft.py and test_refl.py

from __future__ import annotations

from typing import Annotated, Any, Self

import torch
from pydantic import Field, model_validator

from tiltflow.methods import MethodSettings
from tiltflow.samplers.sampling import Sampling, SolverName
from tiltflow.training.method import Needs
from tiltflow.training.reward_ascent import check_chain


class Ascent(MethodSettings):
    """Part of the settings of every method that raises the reward by its gradient alone."""

    solver: SolverName = "euler"
    """The sampler that samples are drawn by, with or without noise: a chain of Gaussian steps of `Sampling`."""
    num_inference_steps: Annotated[int, Field(ge=1)] = 20
    """Steps of the sampler, from noise to data."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Above 1, more steps are near the noise; see `time_grid`."""
    eta: Annotated[float, Field(ge=0, le=1)] = 1.0
    """The noise of the `ddim`, `ddim-half-way`, `tcd` and `euler-maruyama` solvers: 0 is deterministic, 1 is DDPM."""

    @model_validator(mode="after")
    def _check_sampler(self) -> Self:
        check_chain(self.sampling)
        return self

    @property
    def sampling(self) -> Sampling:
        """The sampler that samples are drawn by."""
        steps: dict[str, Any] = {"num_inference_steps": self.num_inference_steps, "shift": self.shift}
        return Sampling(solver=self.solver, eta=self.eta, **steps)

    @property
    def needs(self) -> Needs:
        """The gradient of the reward."""
        return Needs(reward_gradient=True)

    def new_state(self, event_shape: tuple[int, ...], seed: int, device: torch.device) -> None:
        """No state is kept."""
