r"""Samples mixed with fresh noise: where conditional flow matching regresses a velocity.

The target of one path, u = x_1 - x_0, is a noisy value of the velocity E[u | x_t]. Where x_t could as well have come from
other samples of the same batch, their mean says the same with less noise: if the sample of a path was drawn uniformly from a
set, then given x_t and that set it is number i with probability

    p_i ~ exp(-|x_t - t x_1i|^2 / (2 (1 - t)^2)),

so that E[f_i | x_t, set] = sum_i p_i f_i for any function f of the sample. This is Rao-Blackwell's theorem: the mean of a
regression's target stays, and its variance never grows. Near the noise, where p is spread over many samples, little is left
of it; near the data p is 1 for the path's own sample, and nothing changes.
"""

# Mutation tests: test_orw_cfm_w2.py test_noising.py

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tiltflow import processes
from tiltflow.flows.field import VelocityField
from tiltflow.flows.interpolant import expand
from tiltflow.samplers.grid import Start, spread_times
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import normal


class Points(NamedTuple):
    """Points of paths from noise to samples.

    Args:
        which: the sample at the end of each path [count].
        x: x_t = t x_1 + (1 - t) x_0, [count, *event].
        t: times [count], float64.
        u: x_1 - x_0, the velocity of each path [count, *event].
    """

    which: Tensor
    x: Tensor
    t: Tensor
    u: Tensor


@dataclass(frozen=True)
class Noising:
    """Pairs of noise and samples with a time each, of which this process has the noise of its share; `points` mixes them.

    Args:
        samples: x_1 [batch, *event].
        which: the sample of each pair [count].
        noise: x_0 of the pairs of this process's share [own, *event].
        times: [count], float64.
        kl_weights: of |v - v_base|^2, summed over dimensions: with them its mean is the KL divergence of the law of the samples
            from the base's, by Girsanov's theorem, if v and v_base are the fields of these laws: t / (1 - t), and 0 after the
            last time at which the sampler asks for a velocity [count], float64.
    """

    samples: Tensor
    which: Tensor
    noise: Tensor
    times: Tensor
    kl_weights: Tensor

    @property
    def own(self) -> slice:
        """The pairs of this process's share."""
        return processes.shares(len(self.which))[0]

    def points(self, part: slice) -> Points:
        """The points of these pairs, which are in this process's share."""
        first = self.own.start
        which, x0, t = self.which[part], self.noise[part.start - first : part.stop - first], self.times[part]
        x1 = self.samples[which]
        return Points(which, expand(1 - t, x0) * x0 + expand(t, x0) * x1, t, x1 - x0)


def shuffled(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` indices of `count` samples: each once before any is there twice."""
    rounds = range(-(-size // count))
    return torch.cat([torch.randperm(count, generator=generator, device=generator.device) for _ in rounds])[:size]


def resampled(weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` indices of samples with these weights [count], in random order: number i is there size w_i / sum w times, rounded
    up or down so that the mean is right. By one uniform number for all (systematic resampling)."""
    device = weights.device
    levels = (torch.arange(size, device=device) + torch.rand(1, generator=generator, device=device)).double() / size
    steps = weights.double().cpu().cumsum(0).to(device)  # a sum that steers decisions: in one order
    which = torch.searchsorted(steps[:-1] / steps[-1], levels, right=True)  # so the last sample has all that is left
    return which[torch.randperm(size, generator=generator, device=device)]


def noising(
    flow: VelocityField,
    samples: Tensor,
    which: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    start: Start = 0.0,
    end: float = 1.0,
    pair: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Noising:
    """Draw noise and a time for each of some samples: one time in each of equally many parts of the time axis, spread as the
    steps of the sampler are. That is the same mean as of independent times, with less noise. Every process draws all noise, and
    keeps that of its share.

    Args:
        flow: bound to the conditions of the samples; its noise is drawn.
        samples: [batch, *event].
        which: indices of the samples [count].
        sampling: whose shift, and time of the first step from `start`, the times have.
        end: the end of the times.
        pair: (x_0, x_1) [count, *event] -> the index of the noise of each sample; as drawn by default.
    """
    size = len(which)
    own = processes.shares(size)[0]
    x0 = normal((size, *samples.shape[1:]), generator, samples.dtype)
    if pair is not None:
        x0 = x0[pair(x0, samples[which])]
    x0 = x0 if processes.count() == 1 else x0[own].clone()  # a copy: nothing is left of the others
    x0 = flow.select(which[own]).project(x0)
    parts = torch.arange(size, device=samples.device)
    uniform = parts + torch.rand(size, generator=generator, device=samples.device, dtype=torch.float64)
    first = sampling.times(start)[0].item()
    t, edges = (
        first + (end - first) * spread_times(u / size, shift=sampling.shift)
        for u in (uniform, torch.arange(size + 1, device=samples.device, dtype=torch.float64))
    )
    last = sampling.times(start)[-2].item()
    # a mean with these shares of the time axis is that over uniform times
    kl_weights = torch.where(t <= last, size * edges.diff() * t / (1 - t), 0.0)
    return Noising(samples, which, x0, t, kl_weights)


def posterior(points: Points, samples: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """Probability of each sample to be the end of a path, given the point on it: [count, batch], float64, rows of sum 1.

    Args:
        points: of paths whose sample was drawn uniformly from those of its group.
        samples: x_1 [batch, *event].
        groups: indices of the samples that share a condition, for each condition; a path ends in one of its own group.
    """
    # float64: what differs between samples is divided by what vanishes at the end of the path
    x1, x, t = samples.flatten(1).double(), points.x.flatten(1).double(), points.t.double()[:, None]
    gains = t * (x @ x1.T) - t.square() / 2 * x1.square().sum(1)  # -|x_t - t x_1|^2 / 2, but for what all samples share
    logits = gains / (1 - t).square().clamp(min=1e-12)
    if groups[1:]:
        group = torch.empty(len(samples), dtype=torch.long, device=x.device)
        for number, members in enumerate(groups):
            group[members] = number
        logits = logits.masked_fill(group[points.which][:, None] != group, -torch.inf)
    return logits.softmax(1)


class Smoothed(NamedTuple):
    """Points of paths, with the means of what is known of their samples, given the point.

    Args:
        points: their u is that of each path's own sample.
        values: means of some values of the samples [count, k].
        pull: mean of their gain times u [count, *event].
        first: the number of the first of them among all pairs.
    """

    points: Points
    values: Tensor
    pull: Tensor
    first: int

    def part(self, rows: slice) -> Smoothed:
        """These alone, by their numbers among all pairs."""
        own = slice(rows.start - self.first, rows.stop - self.first)
        return Smoothed(Points(*(each[own] for each in self.points)), self.values[own], self.pull[own], rows.start)


def smoothed(pairs: Noising, values: Tensor, gain: Tensor, groups: Tensor, size: int) -> Smoothed:
    """The points of this process's share of the pairs, each seen among the samples of `size` pairs of all, whose samples are in
    random order.

    Args:
        values: of the sample of each pair [count, k], float64.
        gain: of the sample of each pair [count], float64.
        groups: number of the condition of each sample [count]; only those of the same one are seen together.
    """
    own = pairs.own
    points, means = pairs.points(own), values[own]
    pull = expand(gain[own], points.u) * points.u
    if size > 1:
        means = means.clone()
        for some in groups.sort(stable=True).indices.split(size):
            here = (some >= own.start) & (some < own.stop)
            rows, x1 = some[here] - own.start, pairs.samples[pairs.which[some]]
            part = Points(torch.arange(len(some), device=some.device)[here], *(each[rows] for each in points[1:]))
            members = [(groups[some] == g).nonzero()[:, 0] for g in groups[some].unique()]
            p = posterior(part, x1, members)
            # u of sample j at the point of path i is u_i + (x_1j - x_1i) / (1 - t_i)
            c, flat = gain[some], x1.flatten(1).double()
            away = (p @ (c[:, None] * flat) - (p @ c)[:, None] * flat[here]) / (1 - part.t)[:, None]
            pull[rows] = ((p @ c)[:, None] * part.u.flatten(1) + away).to(x1).reshape(part.u.shape)
            means[rows] = p @ values[some]
    return Smoothed(points, means, pull, own.start)
