"""What a recipe of stages has left in its folder: the models of its stages, and a summary with the utility drawn once more.

recipe.yaml, fingerprints.json, base/      as those of a run; see `tiltflow.runs.run`
summary.json     the utility of the first and the last model, from samples of their own, the rows of the stages, caveats
stage-NN/utility.json      the same of the model of a stage and those before it, where that was evaluated
and what `tiltflow.runs.staged.folder` writes
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tiltflow import __version__, processes
from tiltflow.conditions import Item
from tiltflow.control.path_kl import tuned_paths
from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.monitor import over_groups
from tiltflow.files import final_name, trusted, write_json
from tiltflow.models.protocol import GenerativeModel
from tiltflow.reports.stages import DAMAGED, FILE, read_stages
from tiltflow.runs.evaluate import asked_of_paths, no_paths
from tiltflow.runs.fingerprints import BASE, check_unchanged
from tiltflow.runs.prepare import asked_of, build_reward, load_asked
from tiltflow.runs.recipe import read_recipe
from tiltflow.runs.run import sampled_at
from tiltflow.runs.run_files import MODEL, RECIPE, refuse_links
from tiltflow.runs.staged.folder import STAGE, stage_folder
from tiltflow.runs.staged.of_law import OfLaw, misnamed
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.settings import read_yaml
from tiltflow.streams import stream
from tiltflow.training.optimizer import move_old_keys

SUMMARY, OF_STAGE = "summary.json", "utility.json"


def is_staged(folder: Path) -> bool:
    """Whether `folder` is that of a recipe of stages."""
    return (folder / FILE).is_file() and (folder / RECIPE).is_file()


def read_staged(folder: Path) -> tuple[StagedRecipe, list[dict[str, Any]]]:
    """The recipe of stages, and the rows of those that are finished. Raises InputError if none is."""
    refuse_links(folder)
    recipe = read_recipe(move_old_keys(read_yaml(folder / RECIPE)), str(folder / RECIPE))
    if not isinstance(recipe, StagedRecipe):
        raise InputError(f"{folder}: is a run, and not one of stages")
    content = read_stages(folder)
    with trusted(folder / FILE, DAMAGED):
        rows = list(content["stages"])
    if not rows:
        raise InputError(f"{folder}: no stage is finished yet; rerun `tiltflow train` with --resume")
    return recipe, rows


def law_of(recipe: StagedRecipe, device: str, *, decoded: bool = False) -> OfLaw:
    """The utility with what it is estimated from. Raises InputError for rewards that it does not have or that do not fit."""
    if why := misnamed(recipe.utility, recipe.rewards):
        raise InputError(f"rewards: {why}")
    stages, rewards = recipe.stages, {}
    for name, each in recipe.rewards.items():
        if each.learned:
            raise InputError(
                f"rewards.{name}: {each.name} learns while it is used, and the rewards of a utility must not change"
            )
        rewards[name] = build_reward(each, recipe.method, device, decoded=decoded)
    sampling = recipe.evaluation.first.sampling
    return OfLaw(recipe.utility, rewards=rewards, num_samples=stages.num_samples, eps=stages.eps, sampling=sampling)


def load_parts(recipe: StagedRecipe, device: str) -> tuple[OfLaw, Any, Sequence[Item], Sequence[Item]]:
    """(utility, first model, what samples are asked for, prompts that are held out).

    Raises InputError for what cannot be had, or does not fit; what is wrong with a reward before a large model is loaded.
    """
    utility = law_of(recipe, device, decoded=recipe.source.prompted)
    return utility, *load_asked(recipe, device)


def load_stage(recipe: StagedRecipe, folder: Path, number: int, device: str) -> tuple[Any, Any]:
    """(first model, that of a finished stage)."""
    check_unchanged(folder, recipe, only="model")
    source = recipe.source.kept_in(folder / BASE)
    loaded: tuple[Any, Any] = source.load_tuned(source.load(device), stage_folder(folder, number) / MODEL, recipe.seed)
    return loaded


def load_last(folder: Path, device: str = "cpu") -> Any:
    """The model of the last stage, to sample from: by default as the first point of the evaluation says."""
    recipe, rows = read_staged(folder)
    _, tuned = load_stage(recipe, folder, len(rows), device)
    return sampled_at(recipe.evaluation.first, tuned)


def stage_of(folder: Path) -> tuple[Path, int] | None:
    """The folder of a recipe of stages and the number of the one that `folder` is, if it is one."""
    number = STAGE.fullmatch(folder.name)
    return (folder.parent, int(number[1])) if number and is_staged(folder.parent) else None


def evaluate_staged(
    folder: Path, number: int | None = None, *, device: str = "cpu", num_samples: int | None = None
) -> dict[str, Any]:
    """Draw the utility again, of the first model and of the last one; writes the summary anew.

    Args:
        number: of the stage whose model is measured in place of the last one; then utility.json in its folder is written.
        num_samples: of each model, in place of `stages.num_samples`.

    Raises InputError if `folder` has no finished stage, or that one is not.
    """
    recipe, rows = read_staged(folder)
    check_unchanged(folder, recipe)
    if number is not None and not 0 < number <= len(rows):
        raise InputError(f"{stage_folder(folder, number)}: this stage is not finished; rerun `tiltflow train` with --resume")
    rows = rows[:number]
    first, last = load_stage(recipe, folder, len(rows), device)
    utility = law_of(recipe, device, decoded=first.has_decoder)
    if num_samples is not None:
        utility = replace(utility, num_samples=num_samples)
    items, _ = recipe.asked_for.items(first.class_names, recipe.seed)
    to = folder / SUMMARY if number is None else stage_folder(folder, number) / OF_STAGE
    return summarize(recipe, to, utility, first, last, items, rows)


@torch.no_grad()
def summarize(
    recipe: StagedRecipe,
    to: Path,
    utility: OfLaw,
    first: GenerativeModel,
    last: GenerativeModel,
    items: Sequence[Item],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Measure the utility of both models from samples of their own, and write the summary into a file. Returns it."""
    began, settings = time.perf_counter(), recipe.evaluation
    seed = stream(recipe.seed, "evaluation of stages").initial_seed()
    before, after = (utility.known_value(utility.known(model, first, items, seed)) for model in (first, last))
    asked = asked_of_paths(asked_of(items, items if first.prompted else (), settings))
    absent = no_paths(recipe.method, last)
    costs = None
    if absent is None:
        paths = tuned_paths(last, first, asked.items, settings.first, seed=recipe.seed, batch_size=settings.at_once)
        costs = over_groups(paths.costs.cpu(), asked.together)
    seconds = sum(row["seconds"] for row in rows)
    summary = {
        "tiltflow": __version__,
        "torch": torch.__version__,
        "device": str(first.device),
        "threads": torch.get_num_threads(),
        "name": final_name(to.parent),
        "description": recipe.description,
        "model": recipe.model_name,
        "method": recipe.method.name,
        "utility": recipe.utility.name,
        "utility_words": recipe.utility.words,
        "base": recipe.stages.base,
        "alpha": recipe.alpha,
        "seed": recipe.seed,
        "num_samples": utility.num_samples,
        **named("utility_before", before),
        **named("utility_after", after),
        **named("path_kl", costs),
        "path_kl_absent": absent,
        "stages": list(rows),
        "stopped": rows[-1]["stopped"],
        "caveats": list(recipe.utility.caveats(recipe.alpha)),
        "iterations": sum(row["iterations"] for row in rows),
        "seconds": seconds,
        "seconds_total": seconds + time.perf_counter() - began,
    }
    processes.by_main(lambda: write_json(to, summary))
    return summary


def named(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    """Two entries of a summary, None for what is not known."""
    return {name: None, f"{name}_error": None} if estimate is None else {**estimate.named(name)}
