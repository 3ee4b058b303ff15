"""Load, tune, train, evaluate: what works alike for image models (`Model`) and for pipelines of diffusers (`TextToImage`).

This is the one place that tells them apart; what it calls is of one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tiltflow import model as pixels
from tiltflow.errors import InputError
from tiltflow.model import Model
from tiltflow.recipe import is_text_to_image
from tiltflow.reward import Reward, from_function
from tiltflow.run import Recipe, Training, evaluate_run, steps
from tiltflow.run import run as run_pixels
from tiltflow.run_folder import RECIPE
from tiltflow.run_text_to_image import (
    TextToImageRecipe,
    evaluate_text_to_image,
    load_run,
    load_text_to_image,
    read_run,
    run_text_to_image,
)
from tiltflow.settings import read_yaml, validate
from tiltflow.shipped import INDEX, assets, by_name
from tiltflow.text_to_image import TextToImage, from_diffusers
from tiltflow.trainer import Record

AnyRecipe = Recipe | TextToImageRecipe


def read_recipe(tree: Mapping[str, Any], where: str) -> AnyRecipe:
    """A training recipe from its settings. Raises InputError, naming `where`, for the first thing that is wrong."""
    return validate(TextToImageRecipe, tree, where) if is_text_to_image(tree) else validate(Recipe, tree, where)


def run(recipe: AnyRecipe, folder: Path, **options: Any) -> dict[str, Any]:
    """Train by `recipe` into `folder`, and evaluate; see `tiltflow.run.run` for the options. Returns the summary."""
    if isinstance(recipe, TextToImageRecipe):
        return run_text_to_image(recipe, folder, **options)
    return run_pixels(recipe, folder, **options)


def evaluate(folder: Path, *, device: str = "cpu", num_samples: int | None = None) -> dict[str, Any]:
    """Measure a run again, from its folder alone; writes its summary, pictures and report anew.

    Raises InputError if `folder` is no run, and for `num_samples` of a pipeline.
    """
    if not is_run_of_pipeline(folder):
        return evaluate_run(folder, device=device, num_samples=num_samples)
    if num_samples is not None:
        raise InputError("num_samples: a run of a pipeline has evaluation.num_prompts and num_generations instead")
    recipe = read_run(folder)
    return evaluate_text_to_image(recipe, folder, *load_run(recipe, folder, device), device=device)


def load(name_or_path: str | Path, device: str = "cpu") -> Model | TextToImage:
    """A model that can be sampled and tuned: one that ships with tiltflow, by its name, or what lies in a folder: a model, the
    tuned model of a run, or a pipeline of diffusers.

    >>> load("digits-flow").event_shape
    (1, 28, 28)

    A str without a separator is a name first, so `./digits-flow` is the folder; a Path is always a folder. `from_diffusers`
    takes a pipeline from the hub too, and has its options.

    Raises InputError if there is none, if it is a classifier, or if its files cannot be read.
    """
    shipped = by_name(name_or_path, assets(INDEX) | assets(pixels.CONFIG), "model")
    folder = shipped or Path(name_or_path)
    if (folder / INDEX).exists():
        return from_diffusers(folder, device=device)
    if is_run_of_pipeline(folder):
        return load_text_to_image(folder, device)
    return pixels.load(shipped or name_or_path, device)


def tune(
    model: Model,
    reward: Reward,
    method: Any,
    training: Training | None = None,
    *,
    seed: int = 0,
    watch: Callable[[Record], None] = lambda record: None,
) -> Model:
    """Fine-tune `model` toward p_base(x) exp(r(x) / beta).

    Args:
        reward: x [batch, *event] -> [batch], higher is better.
        method: the settings of a method, such as `AdjointMatching(beta=0.5)`.
        watch: is shown every training record.

    Returns a tuned copy, `model` being the base; a model with a peft adapter is its own base and is tuned in place.
    """
    tuned, records = steps(model, from_function(reward), method, training or Training(), seed=seed)
    for record in records:
        watch(record)
    return tuned


def is_run_of_pipeline(folder: Path) -> bool:
    """Whether `folder` is that of a training run of a pipeline."""
    path = folder / RECIPE
    return path.is_file() and is_text_to_image(read_yaml(path))
