"""`tiltflow doctor`: check a recipe for problems before the run is paid for.

A check is a function of a `Patient` that yields findings: green, amber (it runs, but look at this) or red (it cannot work).
Amber and red come with a remedy. The last check is one real iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from tiltflow.conditions import Item
from tiltflow.errors import InputError, TiltflowError
from tiltflow.runs.common_recipe import CommonRecipe
from tiltflow.runs.doctor import iteration, memory, network, reward, sampler, target, utility
from tiltflow.runs.doctor.patient import Finding, Level, Patient
from tiltflow.runs.recipe import Recipe
from tiltflow.runs.run import Ready, ready
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.streams import stream

__all__ = ["CHECKS", "Finding", "Level", "Patient", "admit", "examine", "foresee", "refuse", "verdict"]

Check = Callable[[Patient], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    network.denoising,
    target.temperature,
    reward.reward_itself,
    reward.reward_gradient,
    network.ratio,
    sampler.memoryless,
    sampler.parity,
    memory.memory,
    iteration.iteration,
)
"""The checks, in the order in which they are run."""
OF_REWARDS: tuple[Check, ...] = (target.temperature, reward.reward_itself, reward.reward_gradient)
"""Those in whose place recipes of stages have checks of the utility."""
FIRST = "fix this first; the other checks were not run"


def examine(recipe: Recipe | StagedRecipe, device: str = "cpu") -> Iterator[Finding]:
    """Run the checks and yield their findings one by one; a recipe whose parts cannot be loaded ends it."""
    yield iteration.geometry(recipe)
    checks: Sequence[Check] = CHECKS
    try:
        if isinstance(recipe, StagedRecipe):
            stage = utility.first_stage(recipe, device)
            patient, checks = patient_of(recipe, stage.made, stage.items, ""), of_stage(stage)
        else:
            patient = admit(recipe, device)
    except TiltflowError as error:
        yield Finding("parts", "red", str(error), FIRST)
        return
    of_what = "utility" if isinstance(recipe, StagedRecipe) else "reward"
    yield Finding("parts", "green", f"model, {of_what} and method load and fit each other ({patient.device.type})")
    for check in checks:
        try:
            yield from check(patient)
        except torch.OutOfMemoryError as error:
            smaller = "lower training.micro_batch_size: the result is the same"
            yield Finding(check.__name__, "red", str(error).splitlines()[0], smaller)
        except TiltflowError as error:
            yield Finding(check.__name__.replace("_", " "), "red", str(error), "fix this first")


def of_stage(stage: utility.Stage) -> list[Check]:
    """The checks of a stage: those of the utility in place of those of a reward."""

    def rewards(patient: Patient) -> Iterator[Finding]:
        return utility.rewards(stage, patient)

    def value(patient: Patient) -> Iterator[Finding]:
        return utility.value(stage)

    def first_variation(patient: Patient) -> Iterator[Finding]:
        return utility.first_variation(stage)

    found: list[Check] = []
    for check in CHECKS:
        if check not in OF_REWARDS:
            found.append(check)
        elif check == OF_REWARDS[0]:
            found += [rewards, value, first_variation]
    return found


def foresee(recipe: Recipe | StagedRecipe, device: str = "cpu", gigabytes: float | None = None) -> Iterator[Finding]:
    """What the configs of a pipeline say of a recipe: its batch, and its memory.

    Args:
        gigabytes: of the memory of a GPU that is not here; of the device by default.
    """
    yield iteration.geometry(recipe)
    if isinstance(recipe, StagedRecipe):
        yield Finding("memory", "red", "--config-only is for recipes of one run, and this is one of stages", "leave it out")
        return
    here = torch.device(device)
    available = memory.whole_memory(here) if gigabytes is None else gigabytes * 2**30
    try:
        yield memory.of_configs(recipe, available, on_gpu=gigabytes is not None or here.type == "cuda")
    except TiltflowError as error:
        yield Finding("memory", "red", str(error), FIRST)


def admit(recipe: Recipe, device: str) -> Patient:
    """Load the parts of a recipe. Raises InputError for what cannot be loaded or does not fit."""
    made = ready(recipe, device)
    items = recipe.asked_for.items(made.parts.untuned.class_names, recipe.seed)[0]
    return patient_of(recipe, made, items, recipe.reward.unit)


def patient_of(recipe: CommonRecipe, made: Ready, items: Sequence[Item], unit: str) -> Patient:
    """A recipe with its parts.

    Args:
        items: what samples are asked for.
        unit: of the reward.
    """
    parts, model = made.parts, made.parts.untuned
    batch = parts.draw(stream(recipe.seed, "start", 0, device=model.device))
    return Patient(
        recipe,
        parts.flow,
        parts.base,
        parts.reward,
        batch,
        model.grid,
        model.device,
        model,
        items,
        made.instruments,
        made.asked,
        parts.loop,
        unit,
    )


def refuse(error: InputError) -> Finding:
    """The finding for a recipe that cannot be read."""
    return Finding("recipe", "red", str(error), FIRST)


def verdict(findings: Sequence[Finding]) -> Level:
    """The worst level among the findings."""
    levels = [finding.level for finding in findings]
    return "red" if "red" in levels else "amber" if "amber" in levels else "green"
