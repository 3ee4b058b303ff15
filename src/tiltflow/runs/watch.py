"""How a run's monitor looks at the model while it trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.monitor import Look, look_at, spread, spread_of_target, target_measures
from tiltflow.evaluation.samples import Asked, Instruments, kept
from tiltflow.models.protocol import GenerativeModel
from tiltflow.rewards import LearnedReward
from tiltflow.runs.looks import Watcher
from tiltflow.runs.recipe import RunSettings
from tiltflow.streams import stream

IN_GROUP, CONFIDENCE, VARIETY = "the judge's group", "the judge's confidence", "variety"
"""What a monitor measures beside rewards."""
Measures = dict[str, Tensor]


@torch.no_grad()
def make_watcher(
    run: RunSettings,
    base: GenerativeModel,
    tuned: GenerativeModel,
    instruments: Instruments,
    asked: Asked,
    save_best: Callable[[], None],
) -> Watcher:
    """Looks by the reward, by held-out rewards, by what a judge sees that was never part of the reward, and by how much samples
    differ: of a prompt, or all.

    The best look is that by the judge, or else by the first held-out reward, or else by the variety. The target law is known
    where its samples are of classes or have no condition, and the temperature is.

    Raises InputError for a reward that learns.
    """
    if any(isinstance(reward, LearnedReward) for reward in instruments.rewards.values()):
        raise InputError("training.monitor: the reward learns along the way, so looks at it cannot be compared; leave it out")
    settings = run.evaluation

    def measure(model: GenerativeModel) -> tuple[Measures, Tensor, Asked]:
        x = model.draw(
            asked.items,
            seed=stream(run.seed, "monitor").initial_seed(),  # other noise than the evaluation's
            sampling=settings.first.sampling,
            guidance_scale=settings.first.guidance_scale,
            batch_size=settings.at_once,
        )
        found, groups = instruments.scores(x, asked), asked
        if asked.kind != "prompt":  # of a prompt that has too few, the others are no sample
            which, _, groups = kept(asked, found, found)
            x, found = x[which], {name: values[which] for name, values in found.items()}
        measures = {"reward": found.pop(instruments.own)}
        if instruments.judge is not None:
            p = instruments.look(instruments.judge.probabilities, x)
            if settings.group:
                measures[IN_GROUP] = p[:, list(settings.group)].sum(1)
            measures[CONFIDENCE] = p.amax(1)
        return measures | found, compared(instruments, x, clamped=model.has_decoder), groups

    def look(step: int) -> Look:
        found, features, groups = measure(tuned)
        return look_at(step, found | {VARIETY: variety(features, groups)}, groups.together)

    of_base, features, groups = measure(base)
    target = None
    if groups.kind != "prompt" and run.training.target_kl is None:  # a KL budget names the target law at the end
        tilt = run.method.target(run.training.max_train_steps, base.grid).log_tilt(of_base["reward"])
        under_target = of_base | {VARIETY: spread_of_target(features, tilt, groups.groups)}
        target = target_measures(under_target, tilt, groups.groups)
    first = look_at(0, of_base | {VARIETY: variety(features, groups)}, groups.together)
    return Watcher(first=first, look=look, save_best=save_best, best_by=next(iter(first.held_out)), target=target)


def compared(instruments: Instruments, x: Tensor, *, clamped: bool) -> Tensor:
    """What of samples is compared: the judge's features, or other ones, or the samples themselves.

    Args:
        clamped: samples are pictures of about [-1, 1], of which nothing beyond is seen.
    """
    if instruments.judge is not None:
        return instruments.look(instruments.judge.features, x)
    if instruments.extract is not None:
        return instruments.features(x, instruments.extract)
    return x.clamp(-1, 1) if clamped else x


def variety(features: Tensor, asked: Asked) -> Tensor:
    """How far each sample is from the mean, squared: that of its prompt, or of all [n]."""
    size = asked.size if asked.kind == "prompt" else len(features)
    return torch.cat([spread(part) for part in features.split(size)])
