r"""Flow-GRPO: policy gradients on the SDE of a flow, with advantages that are standardised in a group (arXiv 2505.05470).

With A the reward of a sample, standardised among those of its prompt, class or batch, it lowers

    sum_k [ - min(rho_k A, clip(rho_k) A) + beta e_k / 2 |v - v_base|^2 ],

e_k the energy of a step: the KL of a step from the base is in closed form, and its gradient is that of each step's own. With a
window, as in Flow-GRPO-Fast and MixGRPO (arXiv 2507.21802), some steps alone have noise and are learned; the others follow the
ODE.
"""

# Mutation tests: test_group_policies.py

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from tiltflow.control.timesteps import Stratum
from tiltflow.errors import InputError
from tiltflow.flows.field import VelocityField
from tiltflow.methods.policies.group_policy import PricedPolicy
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import Act, Trajectory, rollout
from tiltflow.samplers.sampling import SolverName
from tiltflow.samplers.solvers.euler import euler
from tiltflow.samplers.stored import Storage
from tiltflow.streams import Noise
from tiltflow.training.batch import Batch

Count = Annotated[int, Field(ge=1)]


class FlowGrpo(PricedPolicy):
    """Flow-GRPO. Any reward; aims at a tilt whose temperature the spread of the rewards sets, unless advantages are centred."""

    name: Literal["flow-grpo"] = "flow-grpo"
    beta: Annotated[float, Field(gt=0)] = 0.04
    """Price of a nat of path KL, in standard deviations of the reward; in units of reward for centred advantages. Published are
    0.04 and 0.01, of a KL that is a mean over dimensions."""
    advantages: Literal["standardized", "centered"] = "standardized"
    """standardized: in units of the standard deviation of the group. centered: in units of reward, with which beta is a
    temperature; with `training.per_prompt_normalization`, in units of the standard deviation of the base's rewards."""
    solver: SolverName = "flow-sde"
    """Any solver whose steps have noise: flow-sde, memoryless, ddpm, ddim."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.495
    """Noise of the solver: the published 0.7 is 0.7 / sqrt(2) here; 1 is memoryless, for which the tuned field may be sampled
    with other noise, or none."""
    num_inference_steps: Annotated[int, Field(ge=2)] = 10
    """Steps of the sampler that is tuned, from noise to data."""
    sde_window_size: Count | None = None
    """So many steps in a row have noise, drawn anew for each batch among `sde_window_range`; by default all of that."""
    sde_window_range: tuple[int, int] | None = None
    """The steps that may have noise: the first of them, counted from 0, and the one after the last; by default all, or with
    a window the first half."""

    @model_validator(mode="after")
    def _check_window(self) -> Self:
        first, end = self._range
        if not 0 <= first < end <= self.num_inference_steps:
            raise ValueError(f"sde_window_range must be within 0 and num_inference_steps ({self.num_inference_steps})")
        if self.sde_window_size is not None and self.sde_window_size > end - first:
            raise ValueError(f"sde_window_size must be at most {end - first}, the steps of sde_window_range")
        windowed = self.sde_window_range is not None or self.sde_window_size is not None
        if windowed and self.train_timesteps is not None:
            raise ValueError("train_timesteps: the steps of the window are learned; leave one of the two out")
        return self

    @property
    def _range(self) -> tuple[int, int]:
        """The steps that may have noise."""
        steps = self.num_inference_steps
        return self.sde_window_range or (0, steps if self.sde_window_size is None else max(steps // 2, 1))

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published one."""
        return {"learning_rate": 3e-4}

    @property
    def temperature(self) -> float | None:
        """beta of centred advantages; those that are standardised have none."""
        return None if self._standardize else self.beta

    def at_temperature(self, beta: float) -> Self:
        """See `MethodSettings`. Raises InputError with standardised advantages."""
        if self._standardize:
            raise InputError("flow-grpo has no temperature with standardized advantages; use method.advantages centered")
        return super().at_temperature(beta)

    @property
    def _standardize(self) -> bool:
        return self.advantages == "standardized"

    @property
    def _strata(self) -> tuple[Stratum, ...] | None:
        """The steps of the window."""
        if self.sde_window_range is None:
            return self.train_timesteps
        (first, end), total = self.sde_window_range, self.num_inference_steps
        return (Stratum(start=first / total, end=end / total, count=end - first),)

    def _limits(self, start: Start) -> list[str]:
        """That of a window too."""
        first, end = self._range
        caveats = super()._limits(start)
        if first > 0:
            caveats.append(f"The first {first} steps have no noise: what they have decided is not tilted.")
        if end < self.num_inference_steps or self.sde_window_size is not None:
            caveats.append("Steps without noise are not learned: a part of the tilt is out of reach.")
        return caveats

    def _chain(self, start: Start) -> Chain:
        """The chain, without noise outside the window."""
        chain, (first, end) = super()._chain(start), self._range
        k = torch.arange(len(chain))
        inside, ode = (k >= first) & (k < end), euler(chain.times)
        pairs = ((chain.x_scale, ode.x_scale), (chain.v_scale, ode.v_scale), (chain.std, ode.std))
        x_scale, v_scale, std = (torch.where(inside, ours, without) for ours, without in pairs)
        return Chain(chain.times, x_scale, v_scale, std, torch.where(inside, chain.energy, 0.0))

    def _simulate(
        self, tuned: VelocityField, x: Tensor, generator: Noise, start: Start, act: Act | None, storage: Storage
    ) -> Trajectory:
        return rollout(self._chain(start), tuned, x, generator, act=act, storage=storage)

    def gradients(self, batch: Batch, state: Any) -> Iterator[dict[str, float]]:
        """One iteration, in a window of its own; see `GroupPolicy.gradients`."""
        yield from super(FlowGrpo, self._in_a_window(batch.generator)).gradients(batch, state)

    def _in_a_window(self, generator: torch.Generator) -> Self:
        """The method with the window of an iteration."""
        if self.sde_window_size is None:
            return self
        (first, end), size = self._range, self.sde_window_size
        first += int(torch.randint(end - first - size + 1, (), generator=generator, device=generator.device))
        return self.model_copy(update={"sde_window_range": (first, first + size), "sde_window_size": None})
