"""Multistep consistency sampling."""

# Mutation tests: test_sampler.py

from __future__ import annotations

import torch
from torch import Tensor

from tiltflow.samplers.chain import Chain
from tiltflow.samplers.solver import ChainSolver


def consistency(times: Tensor) -> Chain:
    """Multistep consistency sampling (2303.01469, algorithm 1): each step jumps to the denoised sample and adds fresh noise,
    x' = t' x1hat + (1 - t') eps with x1hat = x + (1 - t) v; the last one stays there.

    For a consistency model, whose x1hat is a sample and not a mean; the samples of any other are means, and vary too little.
    """
    t, s = times[:-1], times[1:]
    return Chain(times, s, s * (1 - t), torch.where(s < 1, 1 - s, torch.zeros_like(s)))


class Consistency(ChainSolver):
    """Multistep consistency sampling, as latent consistency models (LCM) are sampled."""

    has_noise = True
    is_memoryless = True
    order = 0  # smaller steps bring no law nearer but that of the model that it is for
    bias = "draws the law of a model that was distilled to it, and of no other"

    def chain(self, times: Tensor) -> Chain:
        return consistency(times)
