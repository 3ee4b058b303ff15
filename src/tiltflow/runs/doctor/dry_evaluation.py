"""An evaluation without numbers: what draws, decodes and scores its samples, on tensors that have shapes and no memory.

Numbers that are computed of samples that are there, such as diversity, need little beside networks, and are left out.
"""

# Mutation tests: none: forecasts

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tiltflow.control.path_kl import tuned_paths
from tiltflow.evaluation.log_ratio import by_flow_matching
from tiltflow.evaluation.samples import Asked, Instruments, Samples
from tiltflow.rewards import Reward
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.doctor.dry_run import ENOUGH, Subject, extended, parts_without_memory
from tiltflow.runs.doctor.shapes import Counter, Peak, Replayed, Shapes, shaped
from tiltflow.runs.evaluate import asked_of_paths
from tiltflow.runs.reached import states_of

FEW = 2
"""Steps of a sampler, of which an evaluation keeps the last state alone."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation needs of a recipe.

    Args:
        asked: the samples that are measured.
        instruments: what they are measured with.
        apart: whether pictures that are moved to the CPU leave the memory that is asked about.
    """

    run: CommonRecipe
    asked: Asked
    instruments: Instruments
    apart: bool


def peak_of_evaluation(subject: Subject, measured: Measured) -> Peak:
    """The largest memory of an evaluation after the training, beside the weights. After the first few batches of samples each
    one adds the same, so that no more are drawn for prompts."""
    asked, size = measured.asked, measured.run.evaluation.at_once
    count = math.ceil(len(asked) / size)
    if asked.kind != "prompt" or count <= ENOUGH:
        return _largest(_parts_of_evaluation(subject, measured))
    fewer, more = (
        _parts_of_evaluation(subject, replace(measured, asked=Asked.of_prompts(asked.items[:1], some * size)))
        for some in (ENOUGH - 1, ENOUGH)
    )
    return _largest(extended(fewer, more, count))


def _largest(peaks: Mapping[str, Peak]) -> Peak:
    return max(peaks.values(), key=lambda peak: peak.total)


def _parts_of_evaluation(subject: Subject, measured: Measured) -> dict[str, Peak]:
    """The peaks of the parts of an evaluation."""
    run, asked, settings = measured.run, measured.asked, measured.run.evaluation
    found = dict[str, Peak]()
    short = {"num_inference_steps": FEW, "scheduler": None}
    run = run.model_copy(update={"method": run.method.model_copy(update={"num_inference_steps": FEW})})
    points = [point.model_copy(update=short) for point in settings.points or ()]
    with Shapes(), Counter() as memory, torch.no_grad():

        def ended(part: str) -> None:
            found[part] = memory.peaks.pop("", Peak({}))  # not there if the part made nothing

        parts = parts_without_memory(subject, memory)
        changed = {"_pictures": _elsewhere(parts.decoder)} if measured.apart else {}
        base, tuned = (parts.of_flow(flow, changed) for flow in (parts.base, parts.tuned))

        def replayed(function: Callable[[Tensor], Tensor], what: str, *, numbers: bool = False) -> Replayed:
            return Replayed(function, memory, what, numbers=numbers, otherwise=subject.measured_reward)

        judge, extract = measured.instruments.judge, measured.instruments.extract
        rewards: dict[str, Reward] = {
            name: replayed(reward, "reward", numbers=True) for name, reward in measured.instruments.rewards.items()
        }
        instruments = replace(measured.instruments, rewards=rewards, device="cpu")
        looks = [look for look in (extract, None if judge is None else judge.probabilities) if look is not None]
        first = list[tuple[Tensor, dict[str, Tensor]]]()
        for point in points:
            for model in (base, tuned):
                x, latents = instruments.draw(model, asked.items, point, seed=0, batch_size=settings.at_once)
                values = instruments.scores(x, asked, latents)
                for look in looks:
                    instruments.look(replayed(look, "features"), x)
                if len(first) < 2:
                    first.append((x, values))
        ended("samples")
        (of_base, base_rewards), (of_tuned, tuned_rewards) = first
        samples = Samples(of_base, of_tuned, base_rewards, tuned_rewards, next(iter(base_rewards.values())), asked)
        states = states_of(run, tuned, samples, instruments)
        ended("states")
        chosen = asked_of_paths(asked)
        paths = tuned_paths(tuned, base, chosen.items, points[0], seed=0, batch_size=settings.at_once)
        pictures = tuned.decode(paths.ends, batch_size=settings.at_once)
        instruments.scores(pictures, chosen, paths.ends)
        del pictures, paths
        ended("paths")
        states = states.affordable(settings.first.num_inference_steps)
        condition, _ = tuned.conditions(states.asked.items)
        ours, theirs = (model.flow.bind(condition) for model in (tuned, base))
        by_flow_matching(ours, theirs, states.x, torch.Generator(), draws=1, batch_size=settings.at_once)
        ended("log ratio")
    return found


def _elsewhere(decoder: Replayed) -> Callable[..., Tensor]:
    """A function that decodes latents and moves the pictures out of the memory that is counted."""

    def pictures(self: Any, latents: Tensor, batch_size: int) -> Tensor:
        for part in latents.split(batch_size):
            decoder(part, batch_size=batch_size)
        with _disable_current_modes():
            return shaped((len(latents), *self.sample_shape), latents.dtype)

    return pictures
