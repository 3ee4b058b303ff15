"""Sequential Monte Carlo: particles that are weighted by the reward along the way, and resampled (Feynman-Kac steering)."""

# Mutation tests: test_steering.py

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.flows.eval_mode import eval_mode
from tiltflow.samplers.chain import step
from tiltflow.settings import Settings
from tiltflow.steering import Chosen, SteeredLaw
from tiltflow.steering.drawing.resampling import effective_sample_size, systematic
from tiltflow.steering.drawing.source import Source

Potential = Literal["difference", "max", "sum"]
FEWEST_PARTICLES = 16
"""Particles of a system where fewer samples are asked for and nothing else is said."""


class Smc(Settings):
    """Feynman-Kac steering: particles are weighted by the reward of the sample that the model predicts, and resampled."""

    name: Literal["smc"] = "smc"
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Temperature, in units of reward."""
    num_particles: Annotated[int, Field(ge=2)] | None = None
    """Particles that compete with each other; by default the samples of a condition, and at least 16. With fewer than the
    samples there are several systems, each by itself."""
    potential: Potential = "difference"
    """What weighs a particle on the way: difference, the reward that is predicted now; max, the sum over the times until now of
    the largest until then; sum, that of the sums until then. At the end it is the reward of the sample itself."""
    every: Annotated[int, Field(ge=1)] = 5
    """Steps of the solver between rewards of predicted samples."""
    resample_below: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Particles are resampled where their effective sample size falls below this share of their number."""

    def law(self, num_samples: int) -> SteeredLaw:
        """The tilt as the number of particles grows, for any potential."""
        particles = self._particles(num_samples)
        return SteeredLaw(f"p_base(x) exp(r(x) / beta) up to O(1 / {particles}): {particles} particles", self.beta)

    def check(self, source: Source) -> None:
        """Raise InputError for a sampler that is no chain with noise."""
        sampling = source.sampling
        if not (sampling.is_chain and sampling.has_noise):
            raise InputError(
                f"solver {sampling.solver} has no noise of a chain's steps, without which copies of a particle stay copies: use"
                " solver memoryless"
            )

    def draw(self, source: Source, num_samples: int) -> Chosen:
        """Draw as many systems as are needed, and choose from each by its weights."""
        particles = self._particles(num_samples)
        systems = math.ceil(num_samples / particles)
        x, found = self.population(source, systems, particles)
        log_normalisers = found.log_normalisers()
        kept = systematic(found.log_weights, math.ceil(num_samples / systems), source.generator("choice"))
        kept = (kept + particles * torch.arange(systems)[:, None]).T.flatten()[:num_samples]
        return Chosen(
            source.decoded(x[kept.to(x.device)]).cpu(),
            found.rewards.flatten()[kept],
            systems * particles,
            found.effective_sample_sizes().sum().item(),
            log_normalisers.logsumexp(0).item() - math.log(systems),
        )

    def _particles(self, num_samples: int) -> int:
        return self.num_particles or max(num_samples, FEWEST_PARTICLES)

    @torch.no_grad()
    def population(self, source: Source, systems: int, particles: int) -> tuple[Tensor, Population]:
        """Run systems of particles beside each other: their states at the end [systems * particles, *event], and weights."""
        chain, field = source.sampling.chain(source.model.grid), source.field(systems * particles)
        noise, choice = source.generator("noise", device=source.model.device), source.generator("resampling")
        x, found = source.noise(systems * particles, noise), Population.start(systems, particles)
        noisy = [k for k in range(len(chain)) if chain.std[k:].any()]  # after the last of them copies would stay copies
        with eval_mode(source.model.flow.network):
            for k in range(len(chain)):
                v = field(x, chain.times[k])
                if k in noisy[self.every :: self.every]:
                    predicted = x + (1 - chain.times[k].item()) * v
                    found.weigh(source.scored(predicted).reshape(systems, particles), self.beta, self.potential)
                    kept = found.resampled(self.resample_below, choice)
                    if kept is not None:
                        x, v = x[kept.to(x.device)], v[kept.to(x.device)]
                x = step(chain, k, x, v, noise, field.project)
            found.end(source.scored(x).reshape(systems, particles), self.beta)
        return x, found


@dataclass
class Population:
    """The weights of systems of particles, all [systems, particles] in float64 on the CPU.

    Args:
        log_weights: since the last resampling.
        log_potential: log of the product of all weights so far, of each particle's path.
        peak, total: the largest reward, and the sum of rewards, on each particle's path.
        rewards: the last ones.
        first: the place of each particle's ancestor at the start.
        log_mean: log of the mean weights of all resamplings so far, [systems].
    """

    log_weights: Tensor
    log_potential: Tensor
    peak: Tensor
    total: Tensor
    rewards: Tensor
    first: Tensor
    log_mean: Tensor

    @classmethod
    def start(cls, systems: int, particles: int) -> Population:
        """Particles of equal weights."""
        zero = torch.zeros(systems, particles, dtype=torch.float64)
        first = torch.arange(particles).expand(systems, -1)
        return cls(zero, zero, zero - math.inf, zero, zero, first, zero[:, 0])

    def weigh(self, rewards: Tensor, beta: float, potential: Potential) -> None:
        """Weigh the particles by rewards of what they are predicted to become."""
        self.peak, self.total = self.peak.maximum(rewards), self.total + rewards
        if potential == "difference":
            self._to(rewards / beta)
        else:
            self._to(self.log_potential + (self.peak if potential == "max" else self.total) / beta)

    def end(self, rewards: Tensor, beta: float) -> None:
        """Weigh them by the rewards of what they are, whatever weighed them on the way: so paths have weights exp(r / beta)."""
        self.rewards = rewards
        self._to(rewards / beta)

    def _to(self, log_potential: Tensor) -> None:
        self.log_weights = self.log_weights + log_potential - self.log_potential
        self.log_potential = log_potential

    def resampled(self, below: float, generator: torch.Generator) -> Tensor | None:
        """Resample the systems whose effective sample size is below this share; which particles [systems * particles] are kept,
        or None where no system is resampled."""
        systems, particles = self.log_weights.shape
        few = effective_sample_size(self.log_weights) < below * particles
        if not few.any():
            return None
        own = torch.arange(particles).expand(systems, -1)
        kept = torch.where(few[:, None], systematic(self.log_weights, particles, generator), own)
        self.log_mean = torch.where(few, self.log_normalisers(), self.log_mean)
        self.log_weights = torch.where(few[:, None], 0.0, self.log_weights)
        for name in ("log_potential", "peak", "total", "first"):
            setattr(self, name, getattr(self, name).gather(1, kept))
        return (kept + particles * torch.arange(systems)[:, None]).flatten()

    def log_normalisers(self) -> Tensor:
        """Estimates [systems] of log E exp(r / beta) over the base, after `end`; their exponentials are unbiased."""
        return self.log_mean + self.log_weights.logsumexp(1) - math.log(self.log_weights.shape[1])

    def effective_sample_sizes(self) -> Tensor:
        """1 / sum W^2 [systems], W the weight of all descendants of a particle of the start: particles / size - 1 is the
        relative variance of the normaliser, times their number (Lee and Whiteley 2018)."""
        weights = self.log_weights.softmax(1)
        return 1 / torch.zeros_like(weights).scatter_add(1, self.first, weights).square().sum(1)
