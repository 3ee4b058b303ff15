r"""Weights of a chain's paths: the density of the base's paths over that of the paths that were drawn, in closed form.

Two chains that differ in their velocities alone take the same Gaussian steps around other means, so the densities of their
paths have the ratio

    log dP_tuned / dP_base = sum_k  w_k . e_k + |w_k|^2 / 2     where the tuned chain drew the noise e_k,
                             sum_k  w_k . e_k - |w_k|^2 / 2     where the base's did,

with the controls w_k = v_scale_k (v_tuned - v_base) / std_k. It is that of the chain that was run, not of an SDE in the limit
of small steps. If a share s of the paths is drawn from the base and the others from the tuned chain, each weighs

    exp(r / beta) / (s + (1 - s) dP_tuned / dP_base)

whichever it was drawn from (the balance heuristic, Veach and Guibas 1995): the weighted ends have the law of the base chain's
ends, tilted by exp(r / beta), for every s and every tuned chain. With s > 0 no weight is more than 1 / s of that under the base
alone.
"""

# Mutation tests: test_path_reweighted.py

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.flows.field import VelocityField, Which
from tiltflow.flows.interpolant import expand
from tiltflow.samplers.chain import Chain
from tiltflow.streams import Noise, normal
from tiltflow.timing import phase


@dataclass(frozen=True)
class WeightedPaths:
    """Paths of which only the ends and the weights are kept.

    Args:
        ends: x_K [batch, *event].
        log_ratio: log dP_tuned / dP_base of each path, float64 [batch]; None where the tuned chain was not evaluated.
        costs: sum_k |w_k|^2 / 2 of each path, float64 [batch]; their mean over the tuned chain's paths is its path KL.
    """

    ends: Tensor
    log_ratio: Tensor | None
    costs: Tensor

    def select(self, which: Which) -> WeightedPaths:
        """Some of the paths."""
        log_ratio = None if self.log_ratio is None else self.log_ratio[which]
        return WeightedPaths(self.ends[which], log_ratio, self.costs[which])

    @classmethod
    def joined(cls, parts: Sequence[WeightedPaths]) -> WeightedPaths:
        """The paths of all parts, in order."""
        if len(parts) == 1:
            return parts[0]
        ratios = [part.log_ratio for part in parts if part.log_ratio is not None]
        ends, costs = (torch.cat([getattr(part, name) for part in parts]) for name in ("ends", "costs"))
        return cls(ends, torch.cat(ratios) if ratios else None, costs)


@torch.no_grad()
@phase("rollout")
def draw_paths(
    chain: Chain,
    tuned: VelocityField | None,
    base: VelocityField,
    x: Tensor,
    of_base: Tensor,
    generator: Noise,
) -> WeightedPaths:
    """Paths from x [batch, *event]. A step without noise cannot be controlled: the base takes it.

    Args:
        tuned: None if all paths are of the base, and nothing has to be known of the tuned chain.
        of_base: True for the paths that the base's chain draws, [batch]; the tuned chain draws the others.
    """
    log_ratio, costs = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
    sign = torch.where(of_base, -1.0, 1.0)
    for k in range(len(chain)):
        std = chain.std[k].item()
        v = chain.velocity(k, base, x)
        if std == 0:
            x = chain.mean(k, x, v)
            continue
        noise = base.project(normal(x.shape, generator, x.dtype))
        if tuned is not None:
            of_tuned = chain.velocity(k, tuned, x)
            w = (chain.control_scale[k].item() * (of_tuned - v)).flatten(1).double()
            cost = w.square().sum(1) / 2
            log_ratio += (w * noise.flatten(1)).sum(1) + sign * cost
            costs += cost
            v = torch.where(expand(of_base, x) > 0, v, of_tuned)
        x = chain.mean(k, x, v) + std * noise
    return WeightedPaths(x, None if tuned is None else log_ratio, costs)


def log_proposal(log_ratio: Tensor, share: Tensor) -> Tensor:
    """log(s + (1 - s) dP_tuned / dP_base): the density of the paths that were drawn over that of the base's, [batch].

    Args:
        share: s, the share of the base's paths among those that were drawn, [] or [batch].
    """
    share = share.to(log_ratio)
    return torch.logaddexp(share.log(), torch.log1p(-share) + log_ratio)


def relative_sizes(
    log_tilt: Tensor, log_ratio: Tensor, drawn: Tensor, shares: Sequence[float], members: Sequence[Tensor]
) -> Tensor:
    """The effective sample size for each path that a round would have with other `shares` of base paths: [shares], 0 to 1.

    With W = exp(r / beta) and q_s = s + (1 - s) dP_tuned / dP_base it is E_base[W]^2 / E_base[W^2 / q_s]; both means are over
    the paths at hand, each weighing 1 / q of its own round. Of several groups, the harmonic mean.

    Args:
        log_tilt: r / beta [batch].
        log_ratio: log dP_tuned / dP_base [batch].
        drawn: log q of the paths at hand [batch], by `log_proposal`.
        shares: the shares s that are asked about.
        members: the indices of each group of paths with a base law of its own.
    """
    found = []
    for share in shares:
        log_q = log_proposal(log_ratio, torch.tensor(share))
        inverse = []
        for group in members:
            log_w, count = (log_tilt - drawn)[group], math.log(len(group))
            log_square = torch.logsumexp(log_w + (log_tilt - log_q)[group], 0) - count
            inverse.append((log_square - 2 * (torch.logsumexp(log_w, 0) - count)).exp())
        found.append(1 / torch.stack(inverse).mean())
    return torch.stack(found)
