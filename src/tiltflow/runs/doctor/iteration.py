"""The size of a batch, and one real iteration: does it learn, and how long will the whole run take."""

# Mutation tests: none: thresholds, and words for them

from __future__ import annotations

from collections.abc import Iterator

from tiltflow.formatting import duration
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.doctor.patient import Finding, Patient

SLOW = 20.0
"""Seconds of an iteration above which it is not repeated to be timed warm."""


def geometry(recipe: CommonRecipe) -> Finding:
    """Describe the batch of an iteration. It was checked when the recipe was read, so this is green."""
    training = recipe.training
    size, part = training.samples_per_step, training.micro_batch_size or training.samples_per_step
    made = f"{size} samples in an iteration"
    if training.prompts_per_step is not None:
        made += f" = {training.prompts_per_step} prompts x {training.num_generations} generations"
    parts = "all at once" if part >= size else f"{part} at a time, {-(-size // part)} times"
    return Finding("batch", "green", f"{made}, {parts}")


def iteration(patient: Patient) -> Iterator[Finding]:
    """Train for an iteration, check that it learns, and extrapolate the duration of the run."""
    training, needs = patient.recipe.training, patient.method.needs
    count = min(needs.passes, training.max_train_steps)
    seconds, first = timed(patient, count)
    whole, runs = seconds / count * training.max_train_steps, patient.recipe.runs
    text = f"{duration(seconds)} for {count} step{'s' if count > 1 else ''}, {duration(whole)} for all"
    text += f" {training.max_train_steps}," if runs == 1 else f" of a stage, {duration(runs * whole)} for all {runs} stages,"
    text += " evaluation not counted; " + ", ".join(
        f"{key.replace('_', ' ')} {first[key]:.4g}" for key in ("reward", "loss", "gradient_norm") if key in first
    )
    if "skipped" in first:
        yield Finding("iteration", "red", f"{text}. A number in it was not finite", "max_skipped_steps: 0 says which")
    elif first.get("path_kl", 0) > 0.1:
        fix = "mixed precision rounds the difference; mixed_precision: no is exact"
        yield Finding("iteration", "amber", f"{text}. The path KL is {first['path_kl']:.2g} before the first update", fix)
    elif first["gradient_norm"] == 0 and not needs.warmup_steps and "reward_loss" not in first:  # or the reward alone learns
        yield Finding("iteration", "red", f"{text}. Nothing would be learned", "is the reward the same for all samples?")
    else:
        yield Finding("iteration", "green", text)


def timed(patient: Patient, count: int) -> tuple[float, dict[str, float]]:
    """Train for an iteration of `count` steps, and for another one if it was fast, as the first one warms up. Returns the
    seconds of the last iteration and the metrics of the first step."""
    training = patient.recipe.training
    records, before, first = patient.loop(), 0.0, dict[str, float]()
    for attempt in range(2):
        several = [next(records) for _ in range(count)]
        seconds, before = several[-1].seconds - before, several[-1].seconds
        first = first or several[0].metrics
        if seconds > SLOW or training.max_train_steps < 2 * count or attempt:
            break
    records.close()
    return seconds, first
