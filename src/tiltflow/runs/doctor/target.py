"""Checks of the target law: can the base reach it, and has the evaluation samples enough to estimate it."""

# Mutation tests: none: forecasts, and words for them

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tiltflow.evaluation.importance_weights import FEW, FEW_IN_GROUP, ImportanceWeights
from tiltflow.evaluation.settings import Evaluation
from tiltflow.laws.target import Target
from tiltflow.methods.tilt_matching import TiltMatching
from tiltflow.rewards import LearnedReward
from tiltflow.runs.doctor.patient import Finding, Patient

TIES = 3
"""Samples of a group with the largest reward from which on they are taken for a share of the base, and not for chance."""


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
        return
    if not float(rewards.std(correction=0)) > 0:
        same = f"the reward is {rewards[0].item():g} for all {len(rewards)} samples"
        yield Finding("temperature", "red", same, "is it the right one?")
        return
    if patient.target.maximises:
        yield Finding("temperature", "green", f"none: {patient.method.name} raises the mean reward for as long as it trains")
        return
    # each prompt, and each class, has a target law of its own
    members = patient.bound(patient.base).groups(len(found), patient.device)
    groups = [each[each.isfinite()].double() for each in (found[some.cpu()] for some in members) if each.isfinite().any()]
    budget = patient.recipe.training.target_kl
    if budget is None:
        yield _of_weights(patient, patient.target, groups)
    elif (beta := temperature_of(budget, groups)) is None:
        yield _out_of_reach(budget, groups)
    else:
        said = f"by {len(rewards)} base samples, a tilt of {budget:g} nats is one at a temperature of {beta:.3g}"
        yield Finding("KL budget", "green", said)
        method = patient.method.at_temperature(beta)
        yield _of_weights(patient, method.target(patient.recipe.training.max_train_steps, patient.start), groups)


def divergence(eta: float, groups: Sequence[Tensor]) -> float:
    """KL of the tilt by exp(eta r) from the base, by its rewards [n] in each group: the mean over groups."""
    weights = [torch.softmax(eta * each, 0) for each in groups]
    return sum(float(torch.special.xlogy(w, w * len(w)).sum()) for w in weights) / len(weights)


def temperature_of(budget: float, groups: Sequence[Tensor]) -> float | None:
    """The temperature at which the tilt has a KL of so many nats, by the base's rewards; None if none has."""
    spread = max(float(each.std(correction=0)) for each in groups)
    low, high = 1e-6 / spread, 1e6 / spread
    if divergence(high, groups) <= budget:
        return None
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if divergence(middle, groups) < budget else (low, middle)
    return 1 / high


def _out_of_reach(budget: float, groups: Sequence[Tensor]) -> Finding:
    """The finding for a KL budget that no tilt of these rewards spends: many samples have the largest of them, or the samples
    are too few to have such a tilt."""
    best = sum(float((each == each.max()).double().mean()) for each in groups) / len(groups)
    most, count = divergence(1e6 / max(float(each.std(correction=0)) for each in groups), groups), len(torch.cat(list(groups)))
    if best * count / len(groups) < TIES:
        text = f"{count} base samples are too few to have a tilt of {budget:g} nats: few base samples resemble such a law"
        return Finding("KL budget", "amber", text, "a smaller training.target_kl is a law that the report can check")
    text = (
        f"no tilt by this reward has a KL of {budget:g} nats: {best:.0%} of {count} base samples have the largest reward, and"
        f" the most that can be spent is {most:.3g}"
    )
    return Finding("KL budget", "red", text, "lower training.target_kl")


def effective_samples(target: Target, groups: Sequence[Tensor]) -> float:
    """The effective number of base samples under the target law, from their rewards [n] in each group."""
    weights = [torch.softmax(target.log_tilt(each).double(), 0) for each in groups]
    return ImportanceWeights(torch.cat(weights) / len(weights)).effective_sample_size


def _of_weights(patient: Patient, target: Target, groups: Sequence[Tensor]) -> Finding:
    """The finding for the weights of base samples under the target law."""
    effective, count = effective_samples(target, groups), len(torch.cat(list(groups)))
    share = effective / count
    text = f"{effective:.1f} of {count} base samples carry the weight of the target law, {target.words}"
    if share < 0.02 or effective < 1.5:
        weaker = "a weaker tilt (a larger beta; a smaller tau) is a law that the base can reach, and the report can check"
        if isinstance(patient.method, TiltMatching):
            weaker += (
                ". Or begin with this method, and let path-reweighted end (method.first): errors of rounds add up so far out"
            )
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
