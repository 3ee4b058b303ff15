"""How far training has come by the states of the tuned model: the tilt that its law has, and the balance of a method that has a
law of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltflow.control.path_weights import WeightedPaths
from tiltflow.evaluation import achieved_tilt as tilts
from tiltflow.evaluation.log_ratio import END, EVALUATIONS
from tiltflow.evaluation.samples import Asked, Instruments, Samples
from tiltflow.flows.chunks import in_chunks
from tiltflow.laws.target import Target
from tiltflow.models.protocol import GenerativeModel
from tiltflow.runs.recipe import RunSettings
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.streams import stream

MOST, FEWEST, MOST_DECODED = 1024, 32, 256
"""Samples for the achieved tilt, and states that are drawn where samples are decoded."""

TILT_OF_PATHS = ("achieved_tilt_path", "achieved_tilt_path_error", "achieved_tilt_path_r2")


@dataclass(frozen=True)
class States:
    """States of the tuned model, drawn without guidance, in the groups of `asked`.

    Args:
        x: [n, *event].
        rewards: [n].
        sampling: how they were drawn.
    """

    asked: Asked
    x: Tensor
    rewards: Tensor
    sampling: Sampling

    def some(self, most: int) -> States:
        """The first states of each group, at least two of each and about `most` in all."""
        size, each = len(self.x) // self.asked.groups, max(2, most // self.asked.groups)
        if each >= size:
            return self
        first = torch.arange(self.asked.groups, device=self.x.device)[:, None] * size
        which = (first + torch.arange(each, device=self.x.device)).flatten()
        return replace(self, asked=self.asked.some(each), x=self.x[which], rewards=self.rewards[which])

    def affordable(self, steps: int) -> States:
        """As many that the achieved tilt costs no more network evaluations than drawing samples in so many steps did."""
        return self.some(min(MOST, max(FEWEST, len(self.x) * steps // EVALUATIONS)))


def states_of(run: RunSettings, tuned: GenerativeModel, samples: Samples, instruments: Instruments) -> States:
    """The samples of the tuned model, or, where these are decoded, fresh states of the training's own sampler."""
    asked, settings = samples.asked, run.evaluation
    if not tuned.has_decoder:
        x, rewards = (each.to(tuned.device) for each in (samples.tuned, samples.tuned_rewards[instruments.own]))
        if len(x) != len(asked):  # others were left out than of the base
            firsts = asked.items[:: asked.size]
            asked = replace(asked, items=tuple(item for item in firsts for _ in range(len(x) // asked.groups)))
        return States(asked, x, rewards, settings.first.sampling)
    asked = asked.some(max(2, (MOST_DECODED if tuned.prompted else MOST) // asked.groups))
    generator = stream(run.seed, "states", device=tuned.device)
    condition, _ = tuned.conditions(asked.items)
    start = tuned.noise(asked.items, generator, run.method.sampling.times(tuned.grid)[0])
    flow = in_chunks(tuned.flow.bind(condition), settings.at_once)
    x = sample(flow, start, run.method.sampling, generator, start=tuned.grid)
    rewards = instruments.scores(tuned.decode(x, batch_size=settings.at_once), asked, x)[instruments.own]
    return States(asked, x, rewards.to(x.device), run.method.sampling)


@torch.no_grad()
def of_achieved_tilt(
    run: RunSettings,
    target: Target,
    base: GenerativeModel,
    tuned: GenerativeModel,
    states: States,
    tilted: Callable[[Tensor, Asked], Tensor],
) -> dict[str, Any]:
    """The entries of the achieved tilt in a summary. None, and `achieved_tilt_absent` says why, where it is not known.

    Args:
        tilted: rewards of samples -> (normalised) rewards that the target law tilts by.
    """
    if run.training.guidance_mode == "full":
        return absent("The guided velocity is the field of no law, so that the tilt of its samples is not known.")
    if target.maximises:
        return absent("The method raises the mean reward, and no tilt was asked for.")
    times, states = states.sampling.times(tuned.grid), states.affordable(run.evaluation.first.num_inference_steps)
    asked = states.asked
    condition, _ = tuned.conditions(asked.items)
    found = tilts.measure(
        tuned.flow.bind(condition),
        base.flow.bind(condition),
        states.x,
        target.log_tilt(tilted(states.rewards.cpu(), asked)),
        stream(run.seed, "achieved tilt", device=base.device),
        groups=asked.groups,
        strata=asked.kind != "prompt",
        start=times[0].item(),
        end=min(END, times[-2].item()),
        batch_size=run.evaluation.at_once,
    )
    if found is None:
        of_group = "" if asked.groups == 1 else f" of each {asked.kind}"
        return absent(f"The reward is the same for all samples{of_group}, so that nothing can be tilted by it.")
    return found.entries() | {"achieved_tilt_samples": len(states.x), "achieved_tilt_absent": None}


@torch.no_grad()
def tilt_of_paths(
    run: RunSettings,
    target: Target,
    tuned: GenerativeModel,
    asked: Asked,
    paths: WeightedPaths,
    instruments: Instruments,
    tilted: Callable[[Tensor, Asked], Tensor],
) -> dict[str, Any]:
    """The entries of the achieved tilt of the paths of a sampler in a summary: of their log ratio to the base's paths, which is
    that of the chain as it is run. In many steps it is r / beta without any noise, up to a constant, if the control is optimal.
    None where the reward does not vary.

    Args:
        asked: what the paths are of.
        tilted: rewards of samples -> (normalised) rewards that the target law tilts by.
    """
    x = tuned.decode(paths.ends, batch_size=run.evaluation.at_once) if tuned.has_decoder else paths.ends
    log_tilt = target.log_tilt(tilted(instruments.scores(x, asked, paths.ends)[instruments.own], asked))
    assert paths.log_ratio is not None
    found = tilts.regression(paths.log_ratio[None], log_tilt, asked.groups, strata=asked.kind != "prompt")
    if found is None:
        return dict.fromkeys(TILT_OF_PATHS)
    slope, r2 = found
    return dict(zip(TILT_OF_PATHS, (slope.value, slope.standard_error, None if r2 is None else r2.value), strict=True))


def absent(why: str) -> dict[str, Any]:
    """The entries of an achieved tilt that is not known."""
    return dict.fromkeys(tilts.KEYS) | {"achieved_tilt_absent": why}


def balance(run: RunSettings, target: Target, base: GenerativeModel, tuned: GenerativeModel, states: States) -> dict[str, Any]:
    """How near a method with a law of its own is to that law. Not of guided samples, whose law it is not."""
    if target.balance is None or run.training.guidance_mode not in (None, "none"):
        return {}
    condition, _ = tuned.conditions(states.asked.items)
    found = target.balance.measure(
        tuned.flow.bind(condition),
        base.flow.bind(condition),
        states.x,
        states.rewards,
        stream(run.seed, "balance", device=base.device),
        start=base.grid,
        batch_size=run.evaluation.at_once,
    )
    if found is None:
        return {}
    return found.named("own_law_balance") | {"own_law_balance_expected": target.balance.expected}
