"""The path KL: how far the trajectories of a tuned sampler are from those of the base, in nats."""

# Mutation tests: test_sampler.py test_run.py

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.field import Velocity
from tiltflow.models.protocol import GenerativeModel
from tiltflow.samplers.chain import Chain
from tiltflow.samplers.rollout import rollout
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream


@torch.no_grad()
def path_costs(chain: Chain, tuned: Velocity, base: Velocity, x: Tensor, generator: torch.Generator) -> Tensor:
    """sum_k |w_k|^2 / 2 along fresh paths of the tuned chain from x [batch, *event], in nats: [batch], float64. Its mean is the
    KL divergence of the tuned paths from those of the base, which is at least that of the samples they end in."""
    path = rollout(chain, tuned, x, generator)
    costs = torch.zeros(len(x), dtype=torch.float64)
    for k, (state, v) in enumerate(zip(path.states, path.velocities, strict=False)):
        change = v - base(state, chain.times[k])
        costs += chain.control_scale[k].item() ** 2 / 2 * change.flatten(1).double().square().sum(1).cpu()
    return costs


@torch.no_grad()
def path_kl(
    tuned: GenerativeModel, base: GenerativeModel, items: Sequence[Item], grid: Sampling, *, seed: int, batch_size: int
) -> Tensor:
    """`path_costs` of samples of these items, one each, by the memoryless samplers of both models, without guidance: [items].

    Args:
        grid: whose steps and shift the sampler has; two steps at least, for the last one is not controlled.
    """
    steps = max(2, grid.num_inference_steps)
    chain = Sampling(num_inference_steps=steps, shift=grid.shift, spacing=grid.spacing).chain(tuned.grid)
    generator = stream(seed, "path kl", device=base.device)
    x = base.noise(items, generator, chain.times[0])
    condition, _ = tuned.conditions(items)
    ours, theirs = (in_chunks(model.flow.bind(condition), batch_size) for model in (tuned, base))
    return path_costs(chain, ours, theirs, x, generator)
