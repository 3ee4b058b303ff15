"""The start of each iteration: which items are drawn, their conditions, their noise, and the reward of what they become."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.conditions.observations import Rows
from tiltflow.flows.field import VelocityField, Which
from tiltflow.flows.guided import Guided
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards import RemoteReward, Reward, select
from tiltflow.rewards.functions.checked import values_of
from tiltflow.rewards.functions.latents import decoded_from, seen_by
from tiltflow.rewards.functions.normalised import PerPrompt
from tiltflow.rewards.functions.prompted import told
from tiltflow.streams import stream
from tiltflow.training.batch import Drawn
from tiltflow.training.method import Method
from tiltflow.training.settings import Training


@dataclass(frozen=True)
class Decoded:
    """A reward of samples, as one of states: differentiable, through the decoder of the model."""

    model: GenerativeModel
    reward: Reward
    batch_size: int

    def select(self, which: Which) -> Decoded:
        """The reward of these samples of the batch."""
        return replace(self, reward=select(self.reward, which))

    def decoded(self, x: Tensor) -> Tensor:
        """What the reward sees of states x."""
        return self.model.decode(x, batch_size=self.batch_size)

    def __call__(self, x: Tensor) -> Tensor:
        reward = decoded_from(self.reward, x)
        return values_of(reward, self.decoded(x) if "samples" in seen_by(reward) else x)


def at_once(reward: Reward) -> int | None:
    """How many samples decoder and server see together, if a reward is on another machine: parts of a batch that are multiples
    of it are seen as they are in the whole batch."""
    if isinstance(reward, Decoded):
        size = at_once(reward.reward)
        return None if size is None else math.lcm(size, reward.batch_size)
    if isinstance(reward, PerPrompt):
        return at_once(reward.reward)
    return reward.request_size if isinstance(reward, RemoteReward) else None


class Items(Protocol):
    """Draw the items of an iteration, one for each sample, from a generator, after so many that were drawn before."""

    def __call__(self, generator: torch.Generator, drawn: int, /) -> list[Item]: ...


@dataclass(frozen=True)
class InTurn:
    """`size` samples, as many of each item as of another; the rest, if they do not divide it, at random."""

    items: Sequence[Item]
    size: int

    def __call__(self, generator: torch.Generator, drawn: int) -> list[Item]:
        order = torch.randperm(len(self.items), generator=generator, device=generator.device)[: self.size].tolist()
        return [self.items[order[i % len(order)]] for i in range(self.size)]


@dataclass(frozen=True)
class AtRandom:
    """`size` samples, each of an item drawn from all: a data set may have millions of rows, too many to shuffle each time."""

    items: Rows
    size: int

    def __call__(self, generator: torch.Generator, drawn: int) -> list[Item]:
        return self.items.at(torch.randint(len(self.items), (self.size,), generator=generator, device=generator.device))


@dataclass(frozen=True)
class InEpochs:
    """The next `size` samples of an endless row: all items once, shuffled, then all again, shuffled anew."""

    items: Sequence[Item]
    size: int
    seed: int

    def __call__(self, generator: torch.Generator, drawn: int) -> list[Item]:
        row, (epoch, begin) = list[Item](), divmod(drawn, len(self.items))
        while len(row) < begin + self.size:
            order = torch.randperm(len(self.items), generator=stream(self.seed, "epoch", epoch)).tolist()
            row += [self.items[i] for i in order]
            epoch += 1
        return row[begin : begin + self.size]


@dataclass(frozen=True)
class Repeated:
    """Each of some items `each` times in a row."""

    of: Items
    each: int

    def __call__(self, generator: torch.Generator, drawn: int) -> list[Item]:
        return [item for item in self.of(generator, drawn // self.each) for _ in range(self.each)]


@dataclass(frozen=True)
class Batches:
    """Draws a batch from a generator, after `drawn` samples that were drawn before; see `tiltflow.training.batch.Ordered`."""

    draw: Callable[[torch.Generator, int], Drawn]
    drawn: int = 0

    def __call__(self, generator: torch.Generator) -> Drawn:
        return self.draw(generator, self.drawn)

    def at(self, drawn: int) -> Batches:
        return replace(self, drawn=drawn)


def batches(
    model: GenerativeModel, items: Sequence[Item], reward: Reward, method: Method, training: Training, *, seed: int = 0
) -> Batches:
    """Draw the start of an iteration: items, their conditions, and noise.

    Args:
        items: what samples are asked for; none for an unconditional model.
        seed: of the order of items in epochs.
    """
    size, first = training.samples_per_step, method.sampling.times(model.grid)[0]
    choose: Items = InTurn(items, size)
    if training.prompts_per_step is not None and training.num_generations is not None:
        count = training.prompts_per_step
        at_random: Items = AtRandom(items, count) if isinstance(items, Rows) else InTurn(items, count)
        some = InEpochs(items, count, seed) if training.prompt_order == "epochs" else at_random
        choose = Repeated(some, training.num_generations)
    decode_batch_size = training.decode_batch_size or training.micro_batch_size or size
    keeps_norm = isinstance(model, TextToImage) and model.guidance_keeps_norm

    def of_states(of_samples: Reward) -> Reward:
        return Decoded(model, of_samples, decode_batch_size) if model.has_decoder else of_samples

    def draw(generator: torch.Generator, drawn: int) -> Drawn:
        if not items:
            x = model.noise([Item("")] * size, generator, first)
            return Drawn(x, reward=of_states(reward)) if model.has_decoder else Drawn(x)
        some = choose(generator, drawn)
        condition, negative = model.conditions(some)
        x, of_items = model.noise(some, generator, first), of_states(told(reward, some))

        def guide(flow: VelocityField) -> Guided:
            scale = max(1.0, model.guidance_scale)  # less is none, as in diffusers
            return Guided(flow, flow.bind(negative), scale, keeps_norm)

        def bound(flow: VelocityField) -> VelocityField:
            conditional = flow.bind(condition)
            return guide(conditional) if training.guidance_mode == "full" else conditional

        guided = guide if training.guidance_mode == "rollout" else None
        return Drawn(x, bound, guided, of_items, [item.text for item in some])

    return Batches(draw)
