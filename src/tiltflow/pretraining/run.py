"""Pretraining: train what a recipe describes on data, and write it with its card and scores into a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from tiltflow.errors import InputError, Interrupted
from tiltflow.files import check_room, filling, write_text
from tiltflow.models.model_folder import CARD, load_network, model_folder, read_config
from tiltflow.pretraining.card import card, with_scores
from tiltflow.pretraining.loop import Progress, train
from tiltflow.pretraining.recipe import Pretraining, Scores
from tiltflow.runs.lock import working_in
from tiltflow.runs.run_files import claim
from tiltflow.training.signals import noted


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
    are small. A signal (`tiltflow.training.signals`) ends it early, and the model is written as it then is.

    Args:
        name: of the recipe, for the card.
        watch: callback that sees the record of each optimizer step.

    Raises InputError, with nothing trained or written, if the folder is occupied or cannot be written to, or if the data or a
    judge do not fit; Interrupted after a signal, with the model written if each of its networks was trained at all.
    """
    with working_in(folder):
        claim(folder)
        task = recipe.prepare(path, device)
        size = sum(parameter.nbytes for network in task.networks.values() for parameter in network.parameters())
        check_room(folder, size, size)
        scores, steps, seconds = Scores(), Counter[str](), 0.0
        with noted() as signal:
            for progress in train(task.stages(), recipe.seed, lambda: signal() is not None):
                watch(progress)
                steps[progress.stage] += 1
                scores[f"{progress.stage}_loss"], seconds = progress.loss, progress.seconds
        for network in task.networks.values():
            network.cpu()
        stop = signal()
        if stop is not None and not all(steps[stage] for stage in recipe.schedules):
            raise Interrupted(f"stopped by signal {stop} before each network was trained; nothing was saved", stop)
        about = partial(card, recipe, task, name, path, steps=steps, seconds=seconds, device=device, stopped=stop is not None)
        with filling(folder) as draft:
            task.save(draft, about(scores))
        if stop is not None:
            raise Interrupted(
                f"stopped by signal {stop} after {steps.total()} steps; the model is in {folder}, not measured", stop
            )
        if more := task.scores():
            scores |= more
            write_text(folder / CARD, about(scores))
        return scores


def score_again(recipe: Pretraining, path: Path, folder: Path) -> Scores:
    """Measure a model that this recipe has trained, here, and write its scores into its card. Returns the scores.

    Raises InputError if the folder has no such model, or the recipe's task gives no scores.
    """
    with working_in(folder):
        task, config = recipe.prepare(path, "cpu"), read_config(model_folder(folder))
        saved = load_network(folder, config, "cpu")
        if [shapes_of(saved)] != [shapes_of(network) for network in task.networks.values()]:
            raise InputError(f"{folder}: has another network than the recipe")
        for network in task.networks.values():
            network.load_state_dict(saved.state_dict())
            network.requires_grad_(False).eval()
        scores = task.scores()
        if not scores:
            raise InputError("this recipe gives no scores")
        place = folder / CARD
        write_text(place, with_scores(place.read_text(encoding="utf-8"), scores, str(place)))
        return scores


def shapes_of(network: nn.Module) -> Mapping[str, Any]:
    """The class of a network, and the shapes of its tensors by name."""
    return {"class": type(network), **{key: value.shape for key, value in network.state_dict().items()}}
