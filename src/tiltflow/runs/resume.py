"""Resuming a run: the settings that may change, the checkpoint to resume from, and what differs since."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tiltflow import processes
from tiltflow.errors import CheckpointError, InputError
from tiltflow.runs import checkpoint
from tiltflow.runs.fingerprints import absolute, dotted, externals, fingerprints, put, read_fingerprints
from tiltflow.runs.run_files import RECIPE
from tiltflow.settings import Settings, read_yaml, validate
from tiltflow.tensor_file import Tree
from tiltflow.training.optimizer import move_old_keys

FREE_TO_CHANGE = (
    "description",
    "evaluation",
    "model.prompt_cache_gb",
    "model.text_encoders",
    "stages.count",
    "stages.stop",
    "training.checkpointing_steps",
    "training.checkpoints_total_limit",
    "training.max_skipped_steps",
    "training.monitor",
    "training.report_to",
    "training.micro_batch_size",
    "training.resume_from_checkpoint",
)
"""Settings that may differ in a resumed run: they do not change what is computed, or only after training."""
STEPS = "training.max_train_steps"
"""May differ too, where nothing is scheduled by it."""
SCHEDULED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "learning rate": lambda flat: flat["optimizer.lr_scheduler"] != "constant",
    "temperature": lambda flat: flat["training.target_kl"] is not None,
}
"""What may depend on the number of steps, and whether it does by the settings of a run."""


def refuse_changes(path: Path, recipe: Settings) -> None:
    """Raise InputError if `recipe` differs from that of the run in `path` in a setting that matters.

    A setting that an earlier version did not have counts as its default, and a file that was moved is still the same.
    """
    then, now = flat(_recipe_before(path, recipe)), flat(recipe.model_dump(mode="json"))
    changed = [key for key in sorted(then.keys() | now.keys()) if then.get(key) != now.get(key)]
    scheduled = [name for name, depends in SCHEDULED.items() if depends(now)]
    free = [*FREE_TO_CHANGE, *([] if scheduled else [STEPS])]
    unsafe = [key for key in changed if not any(key == name or key.startswith(f"{name}.") for name in free)]
    if unsafe:
        listed = "; ".join(f"{key} {then.get(key)!r} -> {now.get(key)!r}" for key in unsafe[:5])
        more = f" and {len(unsafe) - 5} more" if len(unsafe) > 5 else ""
        why = f" (its {scheduled[0]} depends on it)" if unsafe == [STEPS] else ""
        raise InputError(
            f"{path}: the run was started with another recipe: {listed}{more}{why}; change it back, or train into a new folder"
        )


def _recipe_before(path: Path, recipe: Settings) -> dict[str, Any]:
    """The recipe in a run folder, with today's defaults, and the names that `recipe` has for what was only moved."""
    before = move_old_keys(read_yaml(path / RECIPE))
    with suppress(InputError):
        known = absolute(validate(type(recipe), before, str(path / RECIPE)))
        before = known.model_dump(mode="json")
        prints, own = read_fingerprints(path) or {}, fingerprints(recipe)
        names = {place: value for place, value, _ in externals(recipe)}
        for place, _, _ in externals(known):
            if place in names and (key := dotted(place)) in prints and prints[key] == own.get(key):
                put(before, place, names[place])
    return before


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    joined: dict[str, Any] = {}
    for key, value in tree.items():
        joined |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return joined


def find_checkpoint(path: Path, wanted: str, note: Callable[[str], None]) -> Path | None:
    """The checkpoint of a run to resume from: its newest intact one if `wanted` is "latest", or the one of that name. None if
    there is none yet.

    Args:
        note: is told which damaged checkpoints were skipped.

    Raises InputError if there is none of that name; CheckpointError if the newest was written by a later version.
    """
    root = path / checkpoint.FOLDER
    processes.by_main(lambda: checkpoint.remove_litter(root))
    if wanted == "latest":
        newest, skipped = checkpoint.latest_checkpoint(root)
        for problem in skipped:
            note(f"skipped {problem}")
        return newest
    chosen = root / Path(wanted).name
    if not chosen.is_dir():
        known = ", ".join(folder.name for folder in checkpoint.checkpoints(root)) or "none"
        raise InputError(f"training.resume_from_checkpoint: {path} has no checkpoint {wanted!r}; it has {known}")
    return chosen


def read_state(chosen: Path, note: Callable[[str], None]) -> Tree:
    """The content of a run's checkpoint: `loop`, `environment` and, except for early versions, `fingerprints`.

    Args:
        note: is told what differs from the environment in which it was written.

    Raises CheckpointError if it is damaged, or not a checkpoint of a training run.
    """
    saved = checkpoint.load_checkpoint(chosen)
    loop = saved.get("loop")
    if not isinstance(saved.get("environment"), dict) or not isinstance(loop, dict) or type(loop.get("step")) is not int:
        raise CheckpointError(f"{chosen}: is not the checkpoint of a training run")
    for key, now in environment().items():
        if (then := saved["environment"].get(key)) != now:
            note(f"{key} was {then}, now {now}: the same numbers up to rounding, but not bit for bit")
    return saved


def environment() -> dict[str, Any]:
    """What determines, beside the recipe, how numbers are rounded."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cuda": torch.cuda.is_available()}
    return machine | {"processes": processes.count()}
