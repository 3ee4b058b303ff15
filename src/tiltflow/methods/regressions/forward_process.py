r"""Regression of the velocity at samples that are noised afresh: what the methods of the forward process share.

No gradient of the reward, no likelihood: samples x_1 by an ODE or with noise, their rewards, and steps of v at
x_t = t x_1 + (1 - t) x_0, x_0 fresh noise, towards v + d, held fixed, with

    d = c (u - v_residual) + sum_j a_j (v_j - v),     u = x_1 - x_0,

c and a_j numbers of each sample, which follow from its reward, and v_j, v_residual fields: of the base, of the model as it was,
or v itself.
"""

# Mutation tests: test_tilt_matching.py test_advantage_regressions.py

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from tiltflow.flows.field import VelocityField
from tiltflow.flows.interpolant import expand
from tiltflow.methods.regressions.drawn_samples import Count, DrawnSamples
from tiltflow.training.batch import Batch
from tiltflow.training.noising import noising, resampled, smoothed

Pull = tuple[Tensor, VelocityField]
"""a_j of each sample [n], float64, and v_j."""


class Learned(NamedTuple):
    """Samples to learn from.

    Args:
        x: [n, *event].
        group: number of the condition of each [n].
        gain: c of each [n], float64.
        pulls: a_j and v_j.
        residual: v_residual; None for v itself.
    """

    x: Tensor
    group: Tensor
    gain: Tensor
    pulls: Sequence[Pull] = ()
    residual: VelocityField | None = None


class Regression(DrawnSamples):
    """Part of the settings of every method that regresses the velocity at samples that are noised afresh.

    Any solver may draw them. What it gets wrong, these methods take for the model's own law, and learn: an ODE in few steps is
    the better one of an exact field, and a memoryless solver of a network with errors, which noise makes it forget.
    """

    may_have_noise: ClassVar[bool] = True

    neighbours: Count = 1
    """Samples whose mean, weighted by how likely each of them ends at x_t, stands for the one that x_t was made from: the same
    target with less noise near the start of the path (arXiv 2302.00670). 1 for none."""
    regression_batch_size: Count | None = None
    """Samples in each of these steps; by default as many as the batch has."""

    def _regress(self, batch: Batch, some: Learned, size: int) -> dict[str, float]:
        """Accumulate the gradient of E|v - sg(v + d)|^2, with fresh noise and times.

        Args:
            batch: bound to the conditions of the samples.
            size: how many samples a step has, where no `regression_batch_size` is set.
        """
        size, coefficients = self.regression_batch_size or size, torch.stack([some.gain, *(a for a, _ in some.pulls)])
        share = coefficients.abs().sum(0)  # samples that count for nothing are not drawn, and none counts for much
        which = resampled(share.to(some.x.device), size, batch.generator)
        pairs = noising(batch.tuned, some.x, which, self.sampling, batch.generator, start=batch.start)
        drawn = which.cpu()
        values = (coefficients[:, drawn] * share.mean() / share[drawn]).to(which.device)
        among = smoothed(pairs, values.T, values[0], some.group[which], self.neighbours)
        fields = {id(one): one for one in (some.residual, *(of for _, of in some.pulls)) if one is not None}

        def terms_of(part: slice) -> dict[str, Tensor]:
            (i, x, t, _), numbers, cu, _ = among.part(part)
            c, *pulls = numbers.T
            with torch.no_grad():
                fixed = {key: one.select(i)(x, t) for key, one in fields.items()}
            v = batch.tuned.select(i)(x, t)
            now = v.detach()
            step = cu - expand(c, x) * fixed.get(id(some.residual), now)
            for a, (_, one) in zip(pulls, some.pulls, strict=True):
                step = step + expand(a, x) * (fixed[id(one)] - now)
            # in the network's own prediction, in which pretraining weighed errors
            scale = batch.tuned.prediction_scale(t).to(x) ** 2 / x[0].numel()
            return {"loss": scale * (v - (now + step)).flatten(1).square().sum(1)}

        return batch.accumulate(terms_of, size, over=size)


def numbered(members: Sequence[Tensor], count: int) -> Tensor:
    """The number of the condition of each sample [count], of the samples of each condition."""
    group = torch.empty(count, dtype=torch.long, device=members[0].device)
    for number, some in enumerate(members):
        group[some] = number
    return group
