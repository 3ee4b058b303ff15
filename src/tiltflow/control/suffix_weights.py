r"""Weights that let paths of an earlier policy stand for those of the present one.

What a step regresses on depends on the path after it, given x_k. So of a path that the chain drew with velocities v', term k
of a sum has under the velocities v the mean of W_k times it, with the ratio of the densities of the steps from k on,

    log W_k = sum_{j >= k} delta_j . eps_j - |delta_j|^2 / 2,      delta_j = v_scale_j (v - v')(x_j, t_j) / std_j,

eps_j the noise that was drawn. The steps before k do not enter: they say where the term is regressed, not on what, and a
regression has the same minimiser wherever its points come from. So the late steps of a path, which the policy hardly changes,
keep weights near 1 for long.
"""

# Mutation tests: test_suffix_weights.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.flows.field import Velocity
from tiltflow.samplers.rollout import Act, Trajectory


@torch.no_grad()
def suffix_weights(path: Trajectory, velocity: Velocity, act: Act | None = None) -> Tensor:
    """W_k of each step and sample under the velocities of `velocity`, made those that act by `act` if it is given:
    [steps, batch], float64."""
    ratios = []
    for k, (old, t, scale) in enumerate(zip(path.drawn_by, path.chain.times, path.chain.control_scale, strict=False)):
        x = path.states[k]
        delta = velocity(x, t)
        delta = delta if act is None else act(x, t, delta)
        delta = (scale.item() * (delta - old)).flatten(1).double()
        ratios.append((delta * (path.noise(k).flatten(1) - delta / 2)).sum(1))
    return torch.stack(ratios).flip(0).cumsum(0).flip(0).exp()
