r"""Consistency of a network with its own samples: a wrong time scale, time direction or prediction type shows here.

On the linear path x_t = t x_1 + (1 - t) x_0 the velocity is v = E[x_1 - x_0 | x_t]. So the residual x_1 - x_0 - v is
uncorrelated with every function of x_t, in particular with a constant and with x_t itself. And the denoised sample
x_t + (1 - t) v is the least-squares estimate of x_1, so its error is below that of the best affine function of x_t. Both are
checked on samples x_1 of the model itself, with fresh noise x_0.

A wrong field may be consistent with its own samples all the same: the field of a centred Gaussian with time reversed is the
field of another Gaussian. With the user's data as x_1 the check is conclusive.
"""

# Mutation tests: test_consistency.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.flows.interpolant import expand
from tiltflow.models.model import Model
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import normal, stream

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
NUMBERS, FEWEST, MOST = 8192, 32, 1024
"""Total numbers to look at, and the least and greatest number of samples: the larger a sample, the fewer are needed."""
WORST, DIFFERENT, FAR = 1.03, 0.055, 1.5
"""Thresholds of `worst` and `difference`; above both, or with `worst` above FAR, the field does not belong to the samples.
Exact fields stay below 1.02 and 0.04, those that ship below 1.2 and 0.045; planted wrong clocks and predictions are above 1.04
and 0.065, or above 2 (`tests/test_consistency.py`)."""
WRONG_CLOCK = (
    "does it take times up to 1000 (Flow(time_scale=1000)), or timesteps as i / 1000 (time_scale=1 / 1000), was its time 0 data"
    " (time_direction='data-to-noise'), or does it predict something else (prediction)? docs/your-own-model.md"
)


@dataclass(frozen=True)
class Consistency:
    """Result of the check at TIMES.

    Args:
        errors: E|x_1 - denoised|^2 over the variance of x_1, at each time.
        worst: largest ratio of such an error to that of the best affine function of x_t.
        difference: relative difference between the affine parts of the field and of x_1 - x_0: 0 if equal, 1 if unrelated.
    """

    errors: Sequence[float]
    worst: float
    difference: float

    @property
    def wrong(self) -> bool:
        """True if the field clearly does not belong to the samples."""
        return not (self.worst <= WORST or (self.worst <= FAR and self.difference <= DIFFERENT))  # NaN is wrong too


def samples_needed(event_shape: tuple[int, ...]) -> int:
    """Return the number of samples to use."""
    return min(max(NUMBERS // max(torch.Size(event_shape).numel(), 1), FEWEST), MOST)


@torch.no_grad()
def consistency(model: Model, data: Tensor | None = None, *, seed: int = 0) -> Consistency:
    """Check a model on its own samples, or on the first of `data` [n, *event].

    Raises InputError for data of another shape.
    """
    count = samples_needed(model.event_shape)
    if data is None:
        few = Sampling(solver="heun", num_inference_steps=8)
        seeded = stream(seed, "consistency").initial_seed()
        undecoded = replace(model, decoder=None)
        x1 = undecoded.drawn(count, model.example_conditions(count), seed=seeded, sampling=few, batch_size=256)
    elif not isinstance(data, Tensor) or data.shape[1:] != model.event_shape or len(data) < FEWEST:
        got = list(data.shape) if isinstance(data, Tensor) else type(data).__name__
        raise InputError(f"data must be {FEWEST} or more samples of shape {list(model.event_shape)}, got {got}")
    else:
        x1 = data[:count]
    x1 = x1.to(model.device)
    generator = stream(seed, "consistency", "noise", device=model.device)
    bound = model.bound(model.example_conditions(len(x1)))
    flow = in_chunks(bound, 64)
    errors, ratios, apart, ours, theirs = [], [], 0.0, 0.0, 0.0
    with eval_mode(model.flow.network):
        for number in TIMES:
            t = torch.tensor(number, dtype=torch.float64)
            x0 = bound.project(normal(x1.shape, generator, x1.dtype))
            x = expand(t, x1) * x1 + expand(1 - t, x0) * x0
            u, v = (each.flatten(1).double() for each in (x1 - x0, flow(x, t)))
            x, left = x.flatten(1).double(), u - v
            centred = x - x.mean(0)
            size = centred.square().mean()
            slope, own = ((centred * (each - each.mean(0))).mean() / size for each in (u, v))
            rest = u - u.mean(0) - slope * centred
            errors.append((left.square().mean() * (1 - number) ** 2 / x1.double().var(0).mean()).item())
            ratios.append((left.square().mean() / rest.square().mean()).item())
            # squared mean of the residual, less its bias from finitely many samples
            mean = (left.mean(0).square().mean() - left.var(0).mean() / len(x)).clamp(min=0)
            apart += float((slope - own) ** 2 * size + mean)
            ours += float(slope**2 * size + u.mean(0).square().mean())
            theirs += float(own**2 * size + v.mean(0).square().mean())
    return Consistency(errors, max(ratios, key=lambda r: r if r == r else float("inf")), apart**0.5 / (ours**0.5 + theirs**0.5))
