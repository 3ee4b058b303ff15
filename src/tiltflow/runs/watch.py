"""How a run's monitor looks at the model while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.evaluation.molecules import are_molecules, connected, plain
from tiltflow.evaluation.monitor import Look, look_at, spread, spread_of_target, surprise, target_measures
from tiltflow.evaluation.pictures import are_pictures, colour_entropy, edge_energy, is_video, motion
from tiltflow.evaluation.samples import Asked, Instruments, kept
from tiltflow.models.protocol import GenerativeModel
from tiltflow.rewards import LearnedReward
from tiltflow.rewards.functions.frames import of_frames
from tiltflow.runs.looks import Watcher
from tiltflow.runs.recipe import RunSettings
from tiltflow.streams import stream

IN_GROUP, CONFIDENCE, VARIETY = "the judge's group", "the judge's confidence", "variety"
CLASSES, EDGES, COLOURS, MOTION = "the entropy of the judge's classes", "edge energy", "colour entropy", "motion"
VALID = "the share of valid molecules"
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
    """Looks by the reward, by held-out rewards, by what a judge sees that was never part of the reward, by how much samples
    differ, of a prompt or all, and by how much is in pictures.

    The best look is that by the judge, or else by the first held-out reward, or else by the variety. The target law is known
    where its samples are of classes or have no condition, and the temperature is.

    Raises InputError for a reward that learns.
    """
    if any(isinstance(reward, LearnedReward) for reward in instruments.rewards.values()):
        raise InputError("training.monitor: the reward learns along the way, so looks at it cannot be compared; leave it out")
    settings = run.evaluation

    def measure(model: GenerativeModel) -> tuple[Measures, Content, Asked]:
        seed = stream(run.seed, "monitor").initial_seed()  # other noise than the evaluation's
        x, latents = instruments.draw(model, asked.items, settings.first, seed=seed, batch_size=settings.at_once)
        found, groups = instruments.scores(x, asked, latents), asked
        if asked.kind != "prompt":  # of a prompt that has too few, the others are no sample
            which, _, groups = kept(asked, found, found)
            x, found = x[which], {name: values[which] for name, values in found.items()}
        measures = {"reward": found.pop(instruments.own)}
        classes = in_group = None
        if instruments.judge is not None:
            p = instruments.look(instruments.judge.probabilities, x)
            if settings.group:
                measures[IN_GROUP] = p[:, list(settings.group)].sum(1)
            measures[CONFIDENCE], classes = p.max(1)
            if settings.group:
                in_group = torch.isin(classes, torch.tensor(settings.group))
        features = compared(instruments, x, clamped=model.has_decoder)
        return measures | found, Content(features, classes, in_group, in_pictures(x)), groups

    def look(step: int) -> Look:
        found, seen, groups = measure(tuned)
        return look_at(step, found | seen.diversity(groups), groups.together)

    of_base, seen, groups = measure(base)
    target, law = None, run.method.target(run.training.max_train_steps, base.grid)
    # a KL budget names the target law at the end
    if groups.kind != "prompt" and run.training.target_kl is None and not law.maximises:
        tilt = law.log_tilt(of_base["reward"])
        target = target_measures(of_base | seen.diversity_of_target(tilt, groups), tilt, groups.groups)
    first = look_at(0, of_base | seen.diversity(groups), groups.together)
    return Watcher(first=first, look=look, save_best=save_best, best_by=next(iter(first.held_out)), target=target)


@dataclass(frozen=True)
class Content:
    """What says how much there is in the samples of a look.

    Args:
        features: [n, ...].
        classes: the judge's class of each sample [n], if there is a judge.
        group: whether it is one of the judge's group [n], if there is one: which of its classes is left is then another
            question than how many of the samples are in it, which is what the reward may be for.
        pictures: what is in each, if they are pictures or videos.
    """

    features: Tensor
    classes: Tensor | None
    group: Tensor | None
    pictures: Measures

    def diversity(self, asked: Asked) -> Measures:
        """How far each sample is from the mean, squared, that of its prompt or of all; how rare its class is; what is in it."""
        size = asked.size if asked.kind == "prompt" else len(self.features)
        return self._named(torch.cat([spread(part) for part in self.features.split(size)]))

    def diversity_of_target(self, log_tilt: Tensor, asked: Asked) -> Measures:
        """The same of base samples, as it is under the target law: the weighted means are those of the target law."""
        weights = ImportanceWeights.from_log_tilt(log_tilt, asked.groups).weights
        return self._named(spread_of_target(self.features, log_tilt, asked.groups), weights)

    def _named(self, spreads: Tensor, weights: Tensor | None = None) -> Measures:
        found = {VARIETY: spreads}
        if self.classes is not None:
            found[CLASSES] = surprise(self.classes, weights)
            if self.group is not None:  # H(class | in the group) = H(class) - H(in the group)
                found[CLASSES] -= surprise(self.group.long(), weights)
        return found | self.pictures


def in_pictures(x: Tensor) -> Measures:
    """What is in each of the samples x [n, ...] that are pictures or videos, and which molecules are valid; nothing of
    others."""
    if are_molecules(x):
        return {VALID: connected(x)}
    measures = {EDGES: of_frames(edge_energy), COLOURS: of_frames(colour_entropy)}
    if is_video(x.shape[1:]):  # which are large: one at a time
        return {name: torch.cat([measure(one) for one in x.split(1)]) for name, measure in {**measures, MOTION: motion}.items()}
    return {name: measure(x) for name, measure in measures.items()} if are_pictures(x) else {}


def compared(instruments: Instruments, x: Tensor, *, clamped: bool) -> Tensor:
    """What of samples is compared: the judge's features, or other ones, or the samples themselves.

    Args:
        clamped: samples are pictures of about [-1, 1], of which nothing beyond is seen.
    """
    if instruments.judge is not None:
        return instruments.look(instruments.judge.features, x)
    if instruments.extract is not None:
        return instruments.features(x, instruments.extract)
    return plain(x, clamped=clamped)
