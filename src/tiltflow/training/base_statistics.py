"""What the rewards of the base are like for each prompt or class, measured once for `per_prompt_normalization`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.conditions.prompts import key_of
from tiltflow.evaluation.samples import with_latents
from tiltflow.models.protocol import GenerativeModel
from tiltflow.rewards import Metadata, Reward
from tiltflow.rewards.functions.checked import score
from tiltflow.rewards.functions.latents import decoded_from
from tiltflow.rewards.functions.normalised import PerPrompt
from tiltflow.rewards.functions.prompted import told
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream
from tiltflow.training.settings import Training

LEAST_STD = 1e-4
"""Added to the standard deviation that a reward is divided by."""
NO_PULL = 1e30
"""The standard deviation of a prompt for whose samples the reward is hardly ever finite: they count as all alike."""


@dataclass(frozen=True)
class BaseStatistics:
    """The mean and the standard deviation of the base's rewards for prompts, of these metadata; each prompt is sampled once, as
    in training."""

    training: Training
    sampling: Sampling
    base: GenerativeModel
    reward: Reward
    seed: int
    known: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], metadata: Sequence[Metadata] | None = None) -> tuple[Tensor, Tensor]:
        """(means, standard deviations), both [len(prompts)] in float64."""
        several = [Item(text, dict(more)) for text, more in zip(prompts, metadata or [{}] * len(prompts), strict=True)]
        keys = [json.dumps([prompt.text, key_of(prompt.metadata)]) for prompt in several]
        for key, prompt in dict(zip(keys, several, strict=True)).items():
            if key not in self.known:
                self.known[key] = self.measured(prompt)
        mean, std = zip(*(self.known[key] for key in keys), strict=True)
        return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)

    @torch.no_grad()
    def measured(self, prompt: Item) -> tuple[float, float]:
        """(mean, standard deviation) of one prompt."""
        training = self.training
        count, size = training.per_prompt_normalization, training.micro_batch_size or training.samples_per_step
        assert count is not None
        x, latents = with_latents(
            [self.reward],
            self.base,
            [prompt] * count,
            seed=stream(self.seed, "baseline", prompt.text).initial_seed(),
            sampling=self.sampling,
            guidance_scale=1 if training.guidance_mode == "none" else None,
            batch_size=size,
        )
        reward = decoded_from(told(self.reward, [prompt] * count), latents)
        values = score(reward, x, size, self.base.device, training.non_finite_rewards).double()
        values = values[values.isfinite()]
        if len(values) < 2:
            return 0.0, NO_PULL
        # a prompt whose rewards are all alike has nothing to tell: it must not divide by zero
        return values.mean().item(), values.std().item() + LEAST_STD

    def state_dict(self) -> dict[str, Any]:
        """See `tiltflow.rewards.functions.normalised.Statistics`."""
        return {key: list(both) for key, both in self.known.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.known.clear()
        self.known.update({key: (mean, std) for key, (mean, std) in state.items()})


def normalizer(training: Training, sampling: Sampling, reward: Reward, seed: int) -> Callable[[GenerativeModel], Reward] | None:
    """What makes of the untuned model the reward that `per_prompt_normalization` asks for; None if it is not asked for."""
    if training.per_prompt_normalization is None:
        return None
    return lambda untuned: PerPrompt(reward, BaseStatistics(training, sampling, untuned, reward, seed))
