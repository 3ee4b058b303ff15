"""Steered samples: the loop over conditions, what they cost, and what a person should know of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.evaluation.importance_weights import FEW_IN_GROUP
from tiltflow.flows.counting import CountEvaluations
from tiltflow.models.protocol import GenerativeModel
from tiltflow.rewards import Reward
from tiltflow.samplers.sampling import Sampling
from tiltflow.steering import Chosen, Steering
from tiltflow.steering.drawing.source import Source
from tiltflow.streams import stream
from tiltflow.user_code import tried


@dataclass(frozen=True)
class Steered:
    """Steered samples, those of each condition one after the other.

    Args:
        samples: [n, *sample_shape], on the CPU.
        rewards: [n], float64.
        conditions: the text of each sample's condition, [n]; empty of a model without conditions.
        law: the law of the samples, in words.
        temperature: beta of p_base exp(r / beta), where that is what is aimed at.
        effective_sample_sizes: for each condition, how many independent samples of the law that is aimed at its candidates are
            worth.
        log_normalisers: for each condition, an estimate of log E exp(r / beta) over the base, or None.
        network_evaluations: how many samples the network was evaluated on.
        reward_evaluations: how many samples the reward was computed of.
        notes: what a person should know.
    """

    samples: Tensor
    rewards: Tensor
    conditions: tuple[str, ...]
    law: str
    temperature: float | None
    effective_sample_sizes: tuple[float, ...]
    log_normalisers: tuple[float | None, ...]
    network_evaluations: int
    reward_evaluations: int
    notes: tuple[str, ...]


def steered(
    model: GenerativeModel,
    reward: Reward,
    steering: Steering,
    items: Sequence[Item],
    num_samples: int,
    *,
    batch_size: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    watch: Callable[[int, int], None] = lambda done, conditions: None,
) -> Steered:
    """Draw `num_samples` steered samples of each item.

    Args:
        items: none for a model without conditions.
        watch: is told how many of the conditions are done.

    Raises InputError for what does not fit, and where the reward fails.
    """
    asked: list[Item | None] = list(items) or [None]
    sources = [
        Source(model, reward, item, sampling or model.sampling, batch_size, stream(seed, "steering", i).initial_seed())
        for i, item in enumerate(asked)
    ]
    found = list[Chosen]()
    with tried(steering.name), CountEvaluations(model.flow.network) as count:
        steering.check(sources[0])
        for source in sources:
            watch(len(found), len(sources))
            found.append(steering.draw(source, num_samples))
    law = steering.law(num_samples)
    return Steered(
        samples=torch.cat([each.samples for each in found]),
        rewards=torch.cat([each.rewards for each in found]),
        conditions=tuple(item.text for item in items for _ in range(num_samples)),
        law=law.words,
        temperature=law.temperature,
        effective_sample_sizes=tuple(each.effective_sample_size for each in found),
        log_normalisers=tuple(each.log_normaliser for each in found),
        network_evaluations=count.total,
        reward_evaluations=sum(source.reward_evaluations for source in sources),
        notes=tuple(filter(None, map(collapsed, found, asked))),
    )


def collapsed(chosen: Chosen, item: Item | None) -> str:
    """What to say where few candidates carry the law; "" where enough do."""
    size, candidates = chosen.effective_sample_size, chosen.candidates
    if size >= min(FEW_IN_GROUP, len(chosen.samples)):
        return ""
    of = "" if item is None else f" of {item.text!r}"
    return (
        f"The {candidates} candidates{of} are worth {size:.1f} samples of the law that is aimed at: those that were chosen are"
        " copies of few, or few of another law. More candidates or a larger beta would help."
    )
