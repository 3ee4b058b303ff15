"""Pairs of pictures to vote on: of a run before and after, of two models, or of two samplings of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.evaluation.pictures import are_pictures
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards.serving.votes import Votes
from tiltflow.runs.run import load_run, read_run
from tiltflow.runs.run_files import RECIPE
from tiltflow.streams import stream

BEFORE, ITSELF = "before", "itself"


def draw_pairs(
    folder: Path,
    model: GenerativeModel,
    other: GenerativeModel | None,
    names: tuple[str, str],
    *,
    count: int,
    prompts: Sequence[str] = (),
    seed: int = 0,
) -> Votes:
    """Draw `count` pairs of pictures and write them into a new folder.

    Args:
        other: drawn from the same noise; None for the model itself, from other noise.
        names: of both.
        prompts: in turn; of a class-conditional model the classes.

    Raises InputError if the samples are no pictures, or if the models ask for different things.
    """
    items = items_of(model, prompts, count)
    if other is not None and (other.sample_shape != model.sample_shape or items_of(other, prompts, count) != items):
        raise InputError(f"{names[1]}: its pictures are not of the size, or not of the classes, of {names[0]}")
    seeds = [stream(seed, "ballot", side).initial_seed() for side in range(2)]

    def drawn(one: GenerativeModel, with_seed: int) -> Tensor:
        return one.draw(items, seed=with_seed)

    both = drawn(model, seeds[0]), drawn(model, seeds[1]) if other is None else drawn(other, seeds[0])
    if not are_pictures(both[0]):
        raise InputError(f"{names[0]}: its samples are no pictures, but of shape {list(both[0].shape[1:])}")
    return Votes.create(folder, names, [item.text for item in items], [dict(item.metadata) for item in items], both, seed)


def items_of(model: GenerativeModel, prompts: Sequence[str], count: int) -> list[Item]:
    """What the pictures are asked for. Raises InputError if a pipeline has no prompt."""
    if isinstance(model, TextToImage):
        if not prompts:
            raise InputError('--prompt: a pipeline needs at least one, for example --prompt "a red cat"')
        return [Item(prompts[i % len(prompts)]) for i in range(count)]
    if names := model.class_names:
        return [Item(names[i % len(names)], {"label": i % len(names)}) for i in range(count)]
    return [Item("")] * count


def before_and_after(run: Path, device: str) -> tuple[Any, Any]:
    """(base, tuned) of a run, both as its evaluation samples them. Raises InputError if it is none."""
    if not (run / RECIPE).is_file():
        raise InputError(f"{run}: is no training run; name a second model, or `{ITSELF}` for two samplings of this one")
    recipe = read_run(run)
    point = recipe.evaluation.first
    scale = {} if point.guidance_scale is None else {"guidance_scale": point.guidance_scale}
    base, tuned = (replace(model, sampling=point.sampling, **scale) for model in load_run(recipe, run, device))
    return base, tuned


def prompts_of_run(run: Path) -> list[str]:
    """The prompts that a run was evaluated on, if there are any."""
    path = run / "prompts.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
