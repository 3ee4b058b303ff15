"""What a steering draws from: a model that is asked for one condition, and the reward of its samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.evaluation.samples import with_latents
from tiltflow.models.protocol import GenerativeModel
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.checked import score
from tiltflow.rewards.functions.latents import decoded_from
from tiltflow.rewards.functions.prompted import told
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream


@dataclass
class Source:
    """A model, asked for one condition, and the reward of its samples.

    Args:
        item: what samples are asked for; None of a model without conditions.
        batch_size: how many samples the network sees at a time.
        seed: of all that is drawn for this condition.
        reward_evaluations: how many samples the reward has been computed of.
    """

    model: GenerativeModel
    reward: Reward
    item: Item | None
    sampling: Sampling
    batch_size: int
    seed: int
    reward_evaluations: int = 0

    def generator(self, *name: str | int, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator of this name."""
        return stream(self.seed, *name, device=device)

    def items(self, count: int) -> list[Item]:
        """The condition, once for each sample."""
        return [self.item or Item("")] * count

    def told(self, count: int) -> Reward:
        """The reward, told what so many samples are."""
        return self.reward if self.item is None else told(self.reward, self.items(count))

    def independent(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw independent samples [count, *sample_shape] of the model by its own sampler, and their rewards [count], float64,
        both on the CPU. Raises NonFiniteError for rewards that are not finite."""
        x, latents = with_latents(
            [self.reward],
            self.model,
            self.items(count),
            seed=self.generator("samples").initial_seed(),
            sampling=self.sampling,
            batch_size=self.batch_size,
        )
        self.reward_evaluations += count
        reward = decoded_from(self.told(count), latents)
        return x, score(reward, x, self.batch_size, self.model.device).double()
