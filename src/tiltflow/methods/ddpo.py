r"""DDPO: policy gradients on the steps of a sampler, without anything that holds the model near the base (arXiv 2305.13301).

With A the reward of a sample, standardised among those of its prompt, class or batch, and p_k the Gaussian density of step k,

    score-function       the gradient of - sum_k A log p_k                              (one update on each batch)
    importance-sampling  the gradient of - sum_k min(rho_k A, clip(rho_k, 1 +- c) A),   rho_k = p_k / p_k when it was drawn.

It maximises the mean reward, and has no law: how far it goes is decided by the number of steps and their size.
"""

# Mutation tests: test_group_policies.py

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from tiltflow.errors import InputError
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods.policies.group_policy import GroupPolicy
from tiltflow.methods.policies.policy_gradient import DDPO_OPTIMIZER, NO_LAW
from tiltflow.samplers.grid import Start
from tiltflow.samplers.sampling import SolverName


class Ddpo(GroupPolicy):
    """DDPO. Any reward; raises its mean, and aims at no law."""

    name: Literal["ddpo"] = "ddpo"
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Changes nothing of the training: the temperature of the tilted law that reports put beside the run."""
    solver: SolverName = "ddpm"
    """Any solver whose steps have noise: ddpm, ddim, memoryless, euler-maruyama."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 50
    """Steps of the sampler that is tuned, from noise to data."""

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published ones."""
        return DDPO_OPTIMIZER

    @property
    def temperature(self) -> None:
        """It has none."""
        return None

    def at_temperature(self, beta: float) -> Self:
        """Raises InputError."""
        raise InputError("Ddpo has no temperature")

    @property
    def _priced(self) -> bool:
        return False

    @property
    def _pull(self) -> float:
        return 1.0

    def target(self, steps: int, start: Start = 0.0) -> Target:
        """No law."""
        return exponential_tilt(self.beta, [NO_LAW], reaches="none")
