"""Checks of the target law: can the base reach it, and has the evaluation samples enough to estimate it."""

# Mutation tests: none: forecasts, and words for them

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from tiltflow.evaluation.importance_weights import FEW, FEW_IN_GROUP, ImportanceWeights
from tiltflow.evaluation.settings import Evaluation
from tiltflow.rewards import LearnedReward
from tiltflow.runs.doctor.patient import Finding, Patient


def temperature(patient: Patient) -> Iterator[Finding]:
    """Check that the tilt is neither too strong for base samples to resemble the target law nor too weak to matter, and that
    the evaluation has enough samples to estimate it."""
    if isinstance(patient.reward, LearnedReward):
        return
    found = patient.rewards(patient.samples()).cpu()
    rewards = found[found.isfinite()]
    if len(rewards) < 2:
        why = f"the reward is finite for {len(rewards)} of {patient.size} base samples"
        yield Finding("temperature", "red", why, "is it the right one? training drops all others")
    elif not float(rewards.std(correction=0)) > 0:
        same = f"the reward is {rewards[0].item():g} for all {len(rewards)} samples"
        yield Finding("temperature", "red", same, "is it the right one?")
    else:
        yield _of_weights(patient, effective_samples(patient, found), len(rewards))


def effective_samples(patient: Patient, rewards: Tensor) -> float:
    """The effective number of base samples under the target law, from their rewards [n], NaN where one is dropped."""
    finite = rewards.isfinite()
    tilt = torch.full((len(rewards),), -math.inf, dtype=torch.float64)
    tilt[finite] = patient.target.log_tilt(rewards[finite]).double()
    # each prompt, and each class, has a target law of its own
    members = [each.cpu() for each in patient.bound(patient.base).groups(len(rewards), patient.device)]
    weights = [torch.softmax(tilt[each], 0) for each in members if finite[each].any()]
    return ImportanceWeights(torch.cat(weights) / len(weights)).effective_sample_size


def _of_weights(patient: Patient, effective: float, count: int) -> Finding:
    """The finding for this effective number of `count` base samples."""
    share = effective / count
    text = f"{effective:.1f} of {count} base samples carry the weight of the target law, {patient.target.words}"
    if share < 0.02 or effective < 1.5:
        weaker = "a weaker tilt (a larger beta; a smaller tau) is a law that the base can reach, and the report can check"
        return Finding("temperature", "amber", f"{text}: so strong a tilt that few base samples resemble its target", weaker)
    if share > 0.98:
        return Finding("temperature", "amber", text + ": the target is nearly the base", "a smaller beta tilts more")
    if (unknown := too_few_to_know(patient.recipe.evaluation, share)) is not None:
        return Finding("temperature", "amber", f"{text}. {unknown[0]}: the report will have no verdict", unknown[1])
    return Finding("temperature", "green", text)


def too_few_to_know(evaluation: Evaluation, share: float) -> tuple[str, str] | None:
    """Why an evaluation has too few samples to estimate the target law if this share of its base samples carries the weight,
    and the remedy; None if it has enough."""
    if evaluation.num_samples is not None:
        expected, needed = share * evaluation.num_samples, math.ceil(FEW / share)
        if expected >= FEW:
            return None
        remedy = f"evaluation.num_samples={needed} or more, or a weaker tilt"
        return f"Of the evaluation's {evaluation.num_samples} that would be {expected:.0f}, and {FEW} are needed", remedy
    assert evaluation.num_generations is not None
    count, needed = evaluation.num_generations, math.ceil(FEW_IN_GROUP / share)
    if share * count >= FEW_IN_GROUP:
        return None
    remedy = f"evaluation.num_generations={needed} or more, or a weaker tilt"
    said = f"Of the evaluation's {count} pictures of a prompt that would be {share * count:.1f}, and {FEW_IN_GROUP} are needed"
    return said, remedy
