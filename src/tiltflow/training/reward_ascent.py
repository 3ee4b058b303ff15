r"""Ascent of the reward of samples through the steps that made them: the gradient in the weights of E r(x_K).

With x_{k+1} = x_scale_k x_k + v_scale_k v(x_k, t_k) + std_k eps_k, the noise and the state before the first step held fixed,

    grad E r(x_K) = E sum_k v_scale_k (d v(x_k, t_k) / d weights)^T a_{k+1},
    a_K = grad r(x_K),      a_k = x_scale_k a_{k+1} + v_scale_k J_v(x_k, t_k)^T a_{k+1},

J_v the Jacobian of the tuned velocity itself. States are kept and each step is evaluated once more, so that the graph of one
evaluation is in memory at a time: what is known as checkpointing, one step long.
"""

# Mutation tests: test_draft.py test_refl.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.flows.field import VelocityField
from tiltflow.rewards.functions.checked import finite_only, value_and_gradient
from tiltflow.samplers.chain import Chain, step
from tiltflow.samplers.sampling import Sampling
from tiltflow.samplers.stored import Stored
from tiltflow.timing import phase
from tiltflow.training.batch import Batch


def check_chain(sampling: Sampling) -> None:
    """Raises ValueError if a sampler is no chain of Gaussian steps."""
    if not sampling.is_chain:
        raise ValueError(
            f"solver {sampling.solver!r} is no chain of Gaussian steps, through which the gradient goes; use euler, ddim or"
            " memoryless"
        )


@torch.no_grad()
@phase("rollout")
def follow(batch: Batch, chain: Chain, x: Tensor, first: int = 0) -> tuple[Stored, Tensor]:
    """Take the steps of a chain from states x [own, *event] of the samples of this process, by the tuned field, guided where
    samples are. Returns the states before each of the steps from `first` on, and those after the last one."""
    field, guided = batch.own_field(batch.tuned)
    states = batch.storage.new(len(chain) - first, x)
    for k in range(len(chain)):
        if k >= first:
            states[k - first] = x
        x = step(chain, k, x, (guided or field)(x, chain.times[k]), batch.own_noise, field.project)
    return states, x


def ascend(
    batch: Batch, chain: Chain, states: Stored, end: Tensor, *, shares: int = 1, cap: float | None = None
) -> dict[str, float]:
    """Add the gradient of minus the mean reward, divided by `shares`, to the tuned parameters. Returns what was measured.

    Args:
        chain: the steps that the gradient goes through.
        states, end: from `follow`: the states before each of them, and after the last.
        cap: samples have no gradient where their reward is not below it.

    Raises what `value_and_gradient` does, and NonFiniteError if fewer than two rewards are finite.
    """
    adjoint = torch.zeros_like(end, dtype=torch.promote_types(end.dtype, torch.float32))

    def rated(some: Batch, part: slice) -> tuple[Tensor]:
        own = batch.own_part(part)
        rewards, gradient = value_and_gradient(some.reward, end[own], some.non_finite)
        adjoint[own] = gradient
        if cap is not None:
            adjoint[own][rewards >= cap] = 0
        return (rewards,)

    (rewards,) = batch.map(rated)
    if (kept := finite_only(rewards)) is not None:
        rewards = rewards[kept]
    counted, over = batch.counted(kept), len(rewards) * shares
    tuned = _acting(batch).select(batch.own)
    for k in reversed(range(len(chain))):
        adjoint = _through(batch, chain, k, tuned, states[k], adjoint, counted, over)
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "loss": -rewards.mean().item(),
        **({} if kept is None else {"dropped": float(len(batch) - len(rewards))}),
    }


def _acting(batch: Batch) -> VelocityField:
    """The field that samples are drawn from, whose gradient is taken: guided, where they are."""
    return batch.tuned if batch.guide is None else batch.guide(batch.tuned)


def _through(
    batch: Batch, chain: Chain, k: int, tuned: VelocityField, states: Tensor, adjoint: Tensor, counted: Tensor, over: int
) -> Tensor:
    """Add the gradient of step k. Returns a_k of a_{k+1} [own, *event]; nothing that means anything for the first step, which
    nothing asks."""
    asked = list[tuple[Tensor, Tensor]]()

    def terms_of(part: Tensor) -> dict[str, Tensor]:
        x = states[part].requires_grad_(k > 0)
        asked.append((part, x))
        v = tuned.select(part)(x, chain.times[k])
        return {"loss": -chain.v_scale[k].item() * (v * adjoint[part]).flatten(1).sum(1)}

    batch.accumulate_own(terms_of, counted, over)
    before = chain.x_scale[k].item() * adjoint
    for part, x in asked:
        if x.grad is not None:  # of the mean; 0 for what stands in for samples of other processes
            before.index_add_(0, part, -over * x.grad.to(before))
    return before
