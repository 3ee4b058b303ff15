"""What a steering draws from: a model that is asked for one condition, and the reward of its samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.evaluation.samples import with_latents
from tiltflow.flows.chunks import in_chunks
from tiltflow.flows.field import VelocityField
from tiltflow.flows.guided import Guided
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards import Reward
from tiltflow.rewards.functions.checked import score
from tiltflow.rewards.functions.latents import decoded_from
from tiltflow.rewards.functions.prompted import told
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.draw import Decoded


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

    def field(self, count: int) -> VelocityField:
        """The velocity field of so many samples, guided as the model is, evaluated on `batch_size` of them at a time."""
        if self.item is None:
            return in_chunks(self.model.flow, self.batch_size)
        condition, negative = self.model.conditions(self.items(count))
        field: VelocityField = self.model.flow.bind(condition)
        if negative is not None and self.model.guidance_scale > 1:
            keeps_norm = isinstance(self.model, TextToImage) and self.model.guidance_keeps_norm
            field = Guided(field, field.bind(negative), self.model.guidance_scale, keeps_norm)
        return in_chunks(field, self.batch_size)

    def noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Starting points [count, *event] of the model's grid to clean data."""
        return self.model.noise(self.items(count), generator, self.sampling.times(self.model.grid)[0])

    @torch.no_grad()
    def decoded(self, x: Tensor) -> Tensor:
        """Samples [count, *sample_shape] of states."""
        return torch.cat([self.model.decode(part, batch_size=self.batch_size) for part in x.split(self.batch_size)])

    def of_states(self, count: int) -> Reward:
        """The reward of so many states [count, *event]."""
        return Decoded(self.model, self.told(count), self.batch_size) if self.model.has_decoder else self.told(count)

    def scored(self, x: Tensor) -> Tensor:
        """The rewards [count] of states x [count, *event], float64, on the CPU. Raises NonFiniteError for such rewards."""
        self.reward_evaluations += len(x)
        return score(self.of_states(len(x)), x, self.batch_size, self.model.device).double()
