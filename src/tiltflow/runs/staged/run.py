"""Running a recipe of stages: `tiltflow.stages` on what the recipe names, into one folder, and the summary of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiltflow import processes
from tiltflow.conditions import Item
from tiltflow.errors import InputError
from tiltflow.files import read_json, write_json
from tiltflow.models.protocol import GenerativeModel
from tiltflow.reports.stages import FILE
from tiltflow.runs.fingerprints import BASE, absolute, check_unchanged, fingerprints
from tiltflow.runs.fingerprints import FILE as FINGERPRINTS
from tiltflow.runs.lock import working_in
from tiltflow.runs.resume import refuse_changes
from tiltflow.runs.run_files import RECIPE, write_yaml
from tiltflow.runs.staged.outer_loop import Stage, stages
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.runs.staged.results import SUMMARY, load_parts, summarize
from tiltflow.training.callbacks import Callback
from tiltflow.training.trainer import Record


def run_stages(
    recipe: StagedRecipe,
    folder: Path,
    *,
    device: str = "cpu",
    callbacks: Sequence[Callback] = (),
    watch: Callable[[Stage[Any]], None] = lambda stage: None,
    note: Callable[[str], None] = lambda text: None,
    handle_signals: bool = False,
) -> dict[str, Any]:
    """Train all stages of `recipe` into `folder`, which must be new or empty, and measure the utility. Returns the summary.
    With `training.resume_from_checkpoint` it goes on with the stages that are in the folder.

    Args:
        watch: called with every stage that is finished.
        note, handle_signals: as of `run`.

    Raises InputError, with nothing written, for what cannot be had or does not fit; and what `tiltflow.stages` raises.
    """
    recipe = absolute(recipe)
    with working_in(folder, note):
        going_on = recipe.training.resume_from_checkpoint is not None and (folder / RECIPE).exists()
        if going_on:
            processes.from_main(lambda: refuse_changes(folder, recipe))
            processes.from_main(lambda: check_unchanged(folder, recipe))
        utility, model, items, _ = load_parts(recipe, device)

        def begun(record: Record) -> None:
            """Once a step has shown that the recipe works, it is written, with what it names."""
            if record.step == 1 and not (folder / RECIPE).exists():
                tree = recipe.model_dump(mode="json")
                tree["training"]["resume_from_checkpoint"] = None
                recipe.source.keep(folder / BASE)
                write_json(folder / FINGERPRINTS, fingerprints(recipe))
                write_yaml(folder / RECIPE, tree)

        plan, last = recipe.stages, model
        assert plan.count is not None
        for stage in stages(
            model,
            utility,
            recipe.method,
            recipe.training,
            count=plan.count,
            base=plan.base,
            price=plan.price,
            mixing=plan.mixing,
            one_shot=plan.one_shot,
            warm=plan.warm,
            stop=plan.stop,
            optimizer=recipe.optimizer,
            conditions=conditions_of(model, items, recipe),
            callbacks=[begun, *callbacks],
            evaluation=recipe.evaluation,
            output=folder,
            description=recipe.description,
            note=note,
            progress=False,
            handle_signals=handle_signals,
            seed=recipe.seed,
        ):
            last = stage.model
            watch(stage)
        rows = read_json(folder / FILE)["stages"]
        return summarize(recipe, folder / SUMMARY, utility, model, last, items, rows)


def conditions_of(model: GenerativeModel, items: Sequence[Item], recipe: StagedRecipe) -> list[Any] | None:
    """The items of a recipe as `conditions` of `tiltflow.tune`. Raises InputError for those that it does not take."""
    if model.prompted:
        return [{"prompt": item.text, **item.metadata} for item in items]
    if not items or recipe.conditions is None:
        return None  # all classes, or those of training.classes
    labels = [item.metadata.get("label") for item in items]
    if None in labels:
        raise InputError(f"conditions: stages take prompts and classes, and {items[0].text!r} is neither")
    return labels
