"""Self-distillation: flow matching of a model on samples of its own, at times near the noise.

Its minimiser at time t is E_q[x_1 - x_0 | x_t], the field of the law q of the samples: it changes no law that is its own
field's already, and carries no reward. With a control on the times after `end` it makes the law of x_end, step by step, the
noising of the law that the control reaches.
"""

# Mutation tests: test_self_distillation.py

from __future__ import annotations

from torch import Tensor

from tiltflow.samplers.sampling import Sampling
from tiltflow.training.batch import Batch
from tiltflow.training.noising import noising, posterior


def self_distillation(batch: Batch, samples: Tensor, which: Tensor, sampling: Sampling, *, end: float, scale: float) -> None:
    """Accumulate the gradient of scale |v(x_t, t) - E[x_1 - x_0 | x_t]|^2, summed over dimensions and points, over the size of
    the batch. The mean is over the samples of the batch that share a condition: see `tiltflow.training.noising`.

    Args:
        samples: of the model [batch, *event], the ends x_1 of the paths.
        which: the sample of each point [count].
        sampling: whose first time and spread the times have, up to `end`.
    """
    pairs = noising(batch.tuned, samples, which, sampling, batch.generator, start=batch.start, end=end)
    groups = batch.tuned.groups(len(samples), samples.device)

    def terms_of(part: slice) -> dict[str, Tensor]:
        points = pairs.points(part)
        x1 = (posterior(points, samples, groups).to(samples) @ samples.flatten(1)).reshape(points.x.shape)
        t = points.t.to(samples).reshape(-1, *(1 for _ in samples.shape[1:]))
        misfit = batch.tuned.select(points.which)(points.x, points.t) - (x1 - points.x) / (1 - t)
        return {"loss": scale * misfit.flatten(1).square().sum(1)}

    batch.accumulate(terms_of, len(which), over=len(samples))
