"""Pretraining: train what a recipe describes on data, and write it with its card and scores into a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tiltflow.files import check_room, filling, write_text
from tiltflow.models.model_folder import CARD
from tiltflow.pretraining.card import card
from tiltflow.pretraining.loop import Progress, train
from tiltflow.pretraining.recipe import Pretraining, Scores
from tiltflow.runs.lock import working_in
from tiltflow.runs.run_files import claim


def run_pretraining(
    recipe: Pretraining,
    path: Path,
    folder: Path,
    *,
    name: str,
    device: str = "cpu",
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Scores:
    """Train on the data at `path` and write the model and its card into `folder`. Returns the scores.

    The model is written as soon as it is trained; its scores follow. Training is neither checkpointed nor resumed: the models
    are small, and a run that was stopped begins again.

    Args:
        name: of the recipe, for the card.
        watch: callback that sees the record of each optimizer step.

    Raises InputError, with nothing trained or written, if the folder is occupied or cannot be written to, or if the data or a
    judge do not fit.
    """
    with working_in(folder):
        claim(folder)
        task = recipe.prepare(path, device)
        size = sum(parameter.nbytes for network in task.networks.values() for parameter in network.parameters())
        check_room(folder, size, size)
        scores, seconds = Scores(), 0.0
        for progress in train(task.stages(), recipe.seed):
            watch(progress)
            scores[f"{progress.stage}_loss"], seconds = progress.loss, progress.seconds
        for network in task.networks.values():
            network.cpu()
        about = partial(card, recipe, task, name, path, seconds=seconds, device=device)
        with filling(folder) as draft:
            task.save(draft, about(scores))
        if more := task.scores():
            scores |= more
            write_text(folder / CARD, about(scores))
        return scores
