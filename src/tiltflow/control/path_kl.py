"""The paths of a tuned sampler beside those of the base: the path KL, how far they are apart in nats, and their log ratio."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tiltflow.conditions import Item
from tiltflow.control.path_weights import WeightedPaths, draw_paths
from tiltflow.flows.chunks import in_chunks
from tiltflow.models.protocol import GenerativeModel
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream


@torch.no_grad()
def tuned_paths(
    tuned: GenerativeModel, base: GenerativeModel, items: Sequence[Item], grid: Sampling, *, seed: int, batch_size: int
) -> WeightedPaths:
    """Fresh paths of the tuned model's memoryless sampler, without guidance, for samples of these items, one each. The mean of
    their `costs` is the KL divergence of its paths from those of the base's, which is at least that of the samples they end in.

    Args:
        grid: whose steps and shift the sampler has; two steps at least, for the last one is not controlled.
    """
    steps = max(2, grid.num_inference_steps)
    chain = Sampling(num_inference_steps=steps, shift=grid.shift, spacing=grid.spacing).chain(tuned.grid)
    generator = stream(seed, "path kl", device=base.device)
    x = base.noise(items, generator, chain.times[0])
    condition, _ = tuned.conditions(items)
    ours, theirs = (in_chunks(model.flow.bind(condition), batch_size) for model in (tuned, base))
    return draw_paths(chain, ours, theirs, x, torch.zeros(len(x), dtype=torch.bool, device=x.device), generator)
