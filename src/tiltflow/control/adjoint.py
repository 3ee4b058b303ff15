r"""The lean and the full adjoint of a sampler's chain (arXiv 2409.08861, eq. 30-39), in their exact discrete forms.

With m_k(x) = x_scale_k x + v_scale_k v_base(x, t_k) the mean of the base chain and g = -r / beta the terminal cost,

    a_K = grad g(x_K),      a_k = J_{m_k}(x_k)^T a_{k+1}.

It needs vector-Jacobian products of the base network alone, one step in memory at a time.

A running reward f is a source. With h_k = t_{k+1} - t_k and x_{k+1} = m_k(x) + std_k (w + eps), the cost to go and, by the
envelope theorem, its gradient are

    V_k(x) = min_w |w|^2 / 2 - h_k f(x, t_k) / beta + E V_{k+1}(x_{k+1}),
    grad V_k(x) = J_{m_k}(x)^T E grad V_{k+1}(x_{k+1}) - h_k grad f(x, t_k) / beta,

so a_k = J_{m_k}(x_k)^T a_{k+1} - h_k grad f(x_k, t_k) / beta: eq. 38 with its f, a cost, -f / beta here. The control of step k
regresses on a_{k+1}, which has f of the later steps alone: x_k is there before that control acts.

The full adjoint is the gradient in x_k of all that the controlled path has still to pay, with the noise held fixed,

    a_k = J_{m_tuned_k}(x_k)^T a_{k+1} + (J_{v_tuned} - J_{v_base})(x_k, t_k)^T c_k,
    c_k = control_scale_k^2 (v_tuned - v_base),

whose second term is the gradient of |w_k|^2 / 2. Half the regression on it has the gradient of E sum_k |w_k|^2 / 2 - r / beta
in the weights, to rounding that of back-propagation through the chain: the discrete adjoint. Eq. 30, the continuous adjoint, is
its limit of small steps. At the optimal control what it has more than the lean one has mean 0 given x_k, so both have one fixed
point.

Near the noise the adjoint is mostly noise: a product of random Jacobians. As the optimal control of step k is
w_k = -std_k E[a_{k+1} | x_k], the learned control can stand in for part of it, as in TD(lambda):

    a_k = J_{m_k}(x_k)^T (lambda_k a_{k+1} - (1 - lambda_k) w_k / std_k),      lambda_k = exp(-bootstrap std_k^2).

At the optimal control both terms have the same expectation given x_k, so a network that can represent it has the same fixed
point for every lambda_k. One that cannot hands its own errors on to the earlier steps instead of the adjoint's noise, and ends
elsewhere. Less is carried on where a step adds much noise, and what is left after a stretch of time does not depend on the
step size.
"""

# Mutation tests: test_adjoint.py test_adjoint_matching.py

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tiltflow import offload
from tiltflow.control.objective import Objective
from tiltflow.flows.field import VelocityField
from tiltflow.flows.linearize import linearize
from tiltflow.rewards import NonFiniteRewards
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.samplers.chain import Chain
from tiltflow.timing import phase

Pairing = Literal["after", "before", "before-diffusion", "right"]


@dataclass(frozen=True)
class LeanAdjoint:
    """Result of the backward pass along a batch of trajectories.

    `targets[k]` is the adjoint that step k regresses on, `base_velocities[k]` is v_base(x_k, t_k), both [batch, *event];
    None for the steps before the first one asked for. `end` is the sample whose reward was taken, `rewards` is [batch].
    """

    targets: list[Tensor | None]
    base_velocities: list[Tensor | None]
    end: Tensor
    rewards: Tensor


@phase("adjoint")
def lean_adjoint(
    chain: Chain,
    base: VelocityField,
    states: Sequence[Tensor],
    objective: Objective,
    beta: float,
    *,
    pairing: Pairing = "after",
    reward_at: Literal["end", "denoised"] = "end",
    first: int = 0,
    right: Chain | None = None,
    tuned_velocities: Sequence[Tensor] | None = None,
    bootstrap: float = 0.0,
    tuned: VelocityField | None = None,
    non_finite: NonFiniteRewards = "error",
    taken: Callable[[int, Tensor, Tensor], None] | None = None,
) -> LeanAdjoint:
    """Run the adjoint backwards along a batch of trajectories, down to the target of step `first`.

    Args:
        states: x_0 .. x_K, each [batch, *event]; without x_K if the last step has no noise, for that step is the base's
            own and is taken here.
        objective: the reward of the end, and the running reward, if there is one.
        beta: temperature of the tilt, in units of reward.
        pairing: which adjoint step k regresses on. "after" is a_{k+1}: the regression then has the optimal control of the
            chain as its exact fixed point. "before" is a_k: off by O(h), which depends on the coordinates of the states.
            "before-diffusion" is that of variance-preserving states, as in the authors' code. "right" is a_k with the
            Jacobian, and the running reward, at the end of each step, as printed in eq. 41 of the paper: off by O(h); it
            needs `right`, the chain of the same sampler one step later in time.
        reward_at: where the gradient of the reward is taken if the last step is noisy: at x_K, or at the base's denoised
            estimate x_{K-1} + (1 - t_{K-1}) v_base(x_{K-1}), as the paper does.
        tuned_velocities: v_tuned(x_k, t_k) of the controlled steps, [batch, *event] each, needed with bootstrap > 0.
        bootstrap: how fast the adjoint is replaced by its estimate from the learned control, per unit of variance added.
        tuned: the controlled velocity, for the full adjoint; the lean one without.
        non_finite: `drop` gives NaN for rewards that are NaN or infinite; the adjoints of these samples mean nothing.
        taken: gets k, its target and its base velocity as soon as nothing else needs them, or the tuned velocity of k; they
            are then None in the result.
    """
    last = len(chain) - 1
    targets: list[Tensor | None] = [None] * len(chain)
    base_velocities: list[Tensor | None] = [None] * len(chain)

    def done(k: int) -> None:
        target, velocity = targets[k], base_velocities[k]
        if taken is not None and target is not None and velocity is not None:
            taken(k, target, velocity)
            targets[k] = base_velocities[k] = None

    again = offload.makes_room()  # by another evaluation: its graph would stay, and the weights with it
    if again:
        with torch.no_grad():
            v = base(states[last], chain.times[last])
    else:
        v, pullback = linearize(base, states[last], chain.times[last])
    base_velocities[last] = v
    if chain.std[last] == 0:
        end = chain.mean(last, states[last], v)
    elif reward_at == "denoised":
        end = states[last] + (1 - chain.times[last].item()) * v
    else:
        end = states[last + 1]
    rewards, gradient = value_and_gradient(objective.terminal, end, non_finite)
    a = -gradient / beta

    if pairing == "right":
        assert right is not None, "the printed recursion needs the chain one step later"
        for k in range(last, first - 1, -1):
            v, at_end = linearize(base, states[k + 1], right.times[k])
            a = right.x_scale[k].item() * a + at_end(right.v_scale[k].item() * a)
            if objective.running is not None:
                a = a - objective.gradient(states[k + 1], right.times, k) / beta
            targets[k] = a
            if k < last:
                base_velocities[k + 1] = v
                done(k + 1)
    else:
        for k in range(last, first - 1, -1):
            if pairing == "after":
                targets[k] = a
                if k == first:
                    break
            if k < last or again:
                v, pullback = linearize(base, states[k], chain.times[k])
                base_velocities[k] = v
            if bootstrap > 0 and chain.std[k] > 0:
                assert tuned_velocities is not None, "bootstrapping needs the velocities of the tuned flow"
                variance = chain.std[k] ** 2
                learned = (chain.v_scale[k] / variance).item() * (v - tuned_velocities[k])
                a = learned + torch.exp(-bootstrap * variance).item() * (a - learned)
            if tuned is None or chain.std[k] == 0:
                a = chain.x_scale[k].item() * a + pullback(chain.v_scale[k].item() * a)
            else:
                v_tuned, of_tuned = linearize(tuned, states[k], chain.times[k])
                cost = (chain.control_scale[k] ** 2).item() * (v_tuned - v)
                a = chain.x_scale[k].item() * a + of_tuned(chain.v_scale[k].item() * a + cost) - pullback(cost)
            if objective.running is not None:
                a = a - objective.gradient(states[k], chain.times, k) / beta
            if pairing == "before":
                targets[k] = a
            if pairing == "before-diffusion":
                norm = torch.hypot(chain.times[k : k + 2], 1 - chain.times[k : k + 2])
                targets[k] = (norm[0] / norm[1]).item() * a
            if k > first:
                done(k)
    if base_velocities[first] is None:
        with torch.no_grad():
            base_velocities[first] = base(states[first], chain.times[first])
    done(first)
    return LeanAdjoint(targets, base_velocities, end, rewards)
