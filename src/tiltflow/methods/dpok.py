r"""DPOK: policy gradients with a price on the KL of every step from the base (arXiv 2305.16381).

With the reward r of a sample, compared with the mean of the others of its prompt, class or batch, it raises

    E[ r(x_1) - beta sum_k e_k / 2 |v - v_base|^2 (x_k, t_k) ]

by PPO's clipped ratio. The published gradient of the second term is that of each step's own KL (`kl_gradient: per-step`): it
leaves out what a step does to the KL of later ones, and settles at a milder law. Other than published: the baseline is the mean
of the others, and no value function of a network; any baseline leaves the gradient as it is.
"""

# Mutation tests: test_group_policies.py

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tiltflow.methods.policies.group_policy import PricedPolicy
from tiltflow.samplers.sampling import SolverName


class Dpok(PricedPolicy):
    """DPOK. Any reward; aims at p_base(x) exp(r(x) / beta), as published to first order in 1 / beta."""

    name: Literal["dpok"] = "dpok"
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the tilt, in units of reward; published are 0.001 (beta = 0.01 on 10 times ImageReward) and, in the code,
    0.0001."""
    solver: SolverName = "ddpm"
    """Any solver whose steps have noise: ddpm, ddim, memoryless, euler-maruyama, flow-sde."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 50
    """Steps of the sampler that is tuned, from noise to data."""
    num_passes: Annotated[int, Field(ge=1)] = 5
    """Optimizer steps on each batch of trajectories, each on its own draw of time steps."""

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published ones."""
        return {"learning_rate": 1e-5, "max_grad_norm": 0.1}

    @property
    def _standardize(self) -> bool:
        return False
