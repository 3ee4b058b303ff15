r"""Whether a network is the velocity field of the law that it samples: a wrong clock, direction or prediction type shows here.

On the linear path x_t = t x_1 + (1 - t) x_0 the velocity is E[x_1 - x_0 | x_t]. So nothing that is known of x_t may tell of
what it leaves, x_1 - x_0 - v: no constant and no multiple of x_t. And the denoised sample x_t + (1 - t) v is as near to x_1 as
anything can be, so nearer than the best affine function of x_t, and ever nearer as t grows. Both are looked at on samples x_1
of the model itself, with fresh noise x_0.

Samples of a wrong field are not those of its law, and may be consistent with it all the same: a field of a Gaussian around 0
that is read backwards is the field of another one. With data of the user for x_1 it is certain.
"""

# Mutation tests: test_consistency.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
"""So many numbers are looked at, in this many samples: the larger a sample, the fewer of them say as much."""
WORST, DIFFERENT = 1.1, 0.08
"""Above both, a field is not that of the samples. Exact ones stay below 1.02 and 0.04, trained ones below 1.07; planted wrong
clocks are above 1.16 and 0.09 (`tests/test_consistency.py`)."""
WRONG_CLOCK = (
    "does it take times up to 1000 (Flow(time_scale=1000)), was its time 0 data (time_direction='data-to-noise'), or does it"
    " predict something else (prediction)? docs/your-own-model.md"
)


@dataclass(frozen=True)
class Consistency:
    """What was found at TIMES.

    Args:
        errors: E|x_1 - denoised|^2 over the variance of x_1, at each time.
        worst: the largest ratio of such an error to that of the best affine function of x_t.
        difference: of the affine part of the field from that of x_1 - x_0: 0 if they are the same, 1 if they have nothing in
            common.
    """

    errors: Sequence[float]
    worst: float
    difference: float

    @property
    def wrong(self) -> bool:
        """Whether the field is clearly not that of the samples."""
        return not (self.worst <= WORST or self.difference <= DIFFERENT)  # what is not a number is wrong too


def samples_needed(event_shape: tuple[int, ...]) -> int:
    """How many samples say enough."""
    return min(max(NUMBERS // max(torch.Size(event_shape).numel(), 1), FEWEST), MOST)


@torch.no_grad()
def consistency(model: Model, data: Tensor | None = None, *, seed: int = 0) -> Consistency:
    """Look at a model, on its own samples or on `data` [n, *event], of which the first few are used.

    Raises InputError for data of another shape.
    """
    count = samples_needed(model.event_shape)
    if data is None:
        few = Sampling(solver="heun", num_inference_steps=8)
        x1 = model.sample(count, seed=stream(seed, "consistency").initial_seed(), sampling=few)
    elif not isinstance(data, Tensor) or data.shape[1:] != model.event_shape or len(data) < FEWEST:
        got = list(data.shape) if isinstance(data, Tensor) else type(data).__name__
        raise InputError(f"data must be {FEWEST} or more samples of shape {list(model.event_shape)}, got {got}")
    else:
        x1 = data[:count]
    x1 = x1.to(model.device)
    generator = stream(seed, "consistency", "noise", device=model.device)
    flow = in_chunks(model.bound(model.labels(len(x1))), 64)
    errors, ratios, apart, ours, theirs = [], [], 0.0, 0.0, 0.0
    with eval_mode(model.flow.network):
        for number in TIMES:
            t = torch.tensor(number, dtype=torch.float64)
            x0 = normal(x1.shape, generator, x1.dtype)
            x = expand(t, x1) * x1 + expand(1 - t, x0) * x0
            u, v = (each.flatten(1).double() for each in (x1 - x0, flow(x, t)))
            x, left = x.flatten(1).double(), u - v
            centred = x - x.mean(0)
            size = centred.square().mean()
            slope, own = ((centred * (each - each.mean(0))).mean() / size for each in (u, v))
            rest = u - u.mean(0) - slope * centred
            errors.append((left.square().mean() * (1 - number) ** 2 / x1.double().var(0).mean()).item())
            ratios.append((left.square().mean() / rest.square().mean()).item())
            # the mean of what is left, squared, without what the noise of so few samples adds
            mean = (left.mean(0).square().mean() - left.var(0).mean() / len(x)).clamp(min=0)
            apart += float((slope - own) ** 2 * size + mean)
            ours += float(slope**2 * size + u.mean(0).square().mean())
            theirs += float(own**2 * size + v.mean(0).square().mean())
    return Consistency(errors, max(ratios, key=lambda r: r if r == r else float("inf")), apart**0.5 / (ours**0.5 + theirs**0.5))
