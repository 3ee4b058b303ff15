"""Checks of the utility of a recipe of stages: its value at the first model, and its first variation as a reward."""

# Mutation tests: none: thresholds, and words for them

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from tiltflow.conditions import Item
from tiltflow.rewards import Reward, select
from tiltflow.rewards.functions.checked import value_and_gradient
from tiltflow.rewards.functions.lifted import from_function
from tiltflow.rewards.functions.prompted import told
from tiltflow.runs.doctor.patient import Finding, Patient
from tiltflow.runs.doctor.reward import reward_gradient, reward_itself
from tiltflow.runs.run import Ready, make_ready
from tiltflow.runs.staged.of_law import OfLaw
from tiltflow.runs.staged.outer_loop import check_reward
from tiltflow.runs.staged.recipe import StagedRecipe
from tiltflow.runs.staged.results import load_parts
from tiltflow.streams import stream
from tiltflow.testing import check_utility
from tiltflow.training.draw import batches
from tiltflow.utilities import Utility
from tiltflow.utilities.cvar import Cvar
from tiltflow.utilities.estimation.first_variation import FirstVariation
from tiltflow.utilities.estimation.known import Known
from tiltflow.utilities.function import Function
from tiltflow.utilities.sum import Sum
from tiltflow.utilities.superquantile import Superquantile

MOST, MOST_DECODED, AT_ONCE = 2000, 16, 64
"""Samples of the law that are drawn, those that are decoded, and those that a gradient is computed of at once."""
ENOUGH, IN_TAIL = 128, 40
"""Samples on which the first variation is held against the value, and those of them in a tail."""


@dataclass(frozen=True)
class Stage:
    """The first stage of a recipe, with its parts in memory.

    Args:
        items: what samples are asked for.
        at: what is known of the law of the first model, from fewer samples than the stage draws.
        slope: the first variation there.
        made: the training of the stage.
    """

    recipe: StagedRecipe
    utility: OfLaw
    items: Sequence[Item]
    at: Known
    slope: FirstVariation
    made: Ready

    def bound(self, reward: Reward) -> Reward:
        """A reward that is told what the samples of the law were asked for."""
        return told(reward, self.utility.asked(self.items))


def first_stage(recipe: StagedRecipe, device: str) -> Stage:
    """Load the parts of the first stage. Raises InputError for what cannot be loaded, or does not fit."""
    utility, model, items, held_out = load_parts(recipe, device)
    most = max(MOST_DECODED if model.has_decoder else MOST, math.ceil(2 / share_of(recipe.utility)))
    utility = replace(utility, num_samples=min(utility.num_samples, most))
    at = utility.known(model, model, items, stream(recipe.seed, "law", 1).initial_seed())
    slope = utility.one_shot(at, recipe.alpha) if recipe.stages.one_shot else utility.first_variation(at)
    check_reward(slope, recipe.method, recipe.training)
    trainable = partial(model.trainable, None, recipe.training.trainable, seed=recipe.seed)
    return Stage(recipe, utility, items, at, slope, make_ready(recipe, model, trainable, slope, items, held_out))


def share_of(utility: Utility) -> float:
    """The share of the samples in the tail that a utility looks at; 1 if it looks at none."""
    if isinstance(utility, Cvar | Superquantile):
        return utility.share
    return min((share_of(term.utility) for term in utility.utilities), default=1.0) if isinstance(utility, Sum) else 1.0


def own_code(utility: Utility) -> bool:
    """Whether a utility is the user's function, or has one in its sum."""
    return isinstance(utility, Function) or (
        isinstance(utility, Sum) and any(own_code(each.utility) for each in utility.utilities)
    )


def rewards(stage: Stage, patient: Patient) -> Iterator[Finding]:
    """Check each reward that the utility is made of."""
    recipe, parts = stage.recipe, stage.made.parts
    for name, reward in stage.utility.named.items():
        lifted = from_function(reward)
        draw = batches(parts.tuned, stage.items, lifted, recipe.method, recipe.training, seed=recipe.seed)
        batch = draw(stream(recipe.seed, "start", 0, device=patient.device))
        of_reward = replace(patient, reward=lifted, batch=batch, unit=recipe.rewards[name].unit)
        for check in (reward_itself, reward_gradient):
            for found in check(of_reward):
                yield found if name == "reward" else replace(found, check=f"{found.check} ({name})")


def value(stage: Stage) -> Iterator[Finding]:
    """Say what the utility is at the first model, and what somebody must know who maximises it."""
    recipe, count = stage.recipe, len(stage.at.x)
    cut = "" if count == recipe.stages.num_samples else f" of the {recipe.stages.num_samples} of a stage"
    found = stage.utility.value(stage.at)
    yield Finding("utility", "green", f"{recipe.utility.name} {found} at the first model, by {count} samples{cut}")
    for caveat in recipe.utility.caveats(recipe.alpha):
        yield Finding("optimum", "amber", caveat, "look at the rise of each stage, and at another number of stages")


def first_variation(stage: Stage) -> Iterator[Finding]:
    """Check that the first variation is the change of the value, and how many samples it has a gradient at."""
    if (wrong := _misfit(stage)) is not None:
        yours = own_code(stage.recipe.utility)
        fix = "the function must be differentiable and depend on the samples as a set; take means with its `weights`"
        yield Finding(
            "first variation", "red" if yours else "amber", wrong, fix if yours else "more samples; are rewards smooth?"
        )
        return
    if not stage.recipe.method.needs.reward_gradient:
        yield Finding("first variation", "green", "it is the change of the value")
        return
    bound, x = stage.bound(stage.slope), stage.at.x
    parts = [slice(i, i + AT_ONCE) for i in range(0, len(x), AT_ONCE)]
    gradients = [value_and_gradient(select(bound, part), x[part])[1].flatten(1).norm(dim=1) for part in parts]
    share, size = float((torch.cat(gradients) > 0).double().mean()), stage.recipe.training.samples_per_step
    text = (
        f"it is the change of the value, and has a gradient at {share:.1%} of samples: {share * size:.1f} of a batch of {size}"
    )
    if share * size < 1:
        larger = "most steps would learn nothing; a larger batch, or a larger share of the samples"
        yield Finding("first variation", "amber", text, larger)
    else:
        yield Finding("first variation", "green", text)


def _misfit(stage: Stage) -> str | None:
    """What is wrong with the first variation, in a sentence."""
    count = min(len(stage.at.x), max(ENOUGH, math.ceil(IN_TAIL / share_of(stage.recipe.utility))))
    few = replace(stage.utility, num_samples=count)
    model = stage.made.parts.untuned
    at = few.known(model, model, stage.items, stream(stage.recipe.seed, "doctor of the utility").initial_seed())
    if at.labels is None:  # which the check tells by itself
        at = replace(at, reward={name: told(each, few.asked(stage.items)) for name, each in at.reward.items()})
    try:
        check_utility(stage.recipe.utility, at)
    except AssertionError as error:
        return str(error)
    return None
