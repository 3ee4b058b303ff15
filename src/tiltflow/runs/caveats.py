"""Caveats of a run's summary: what its numbers are not, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tiltflow.evaluation.estimates import mean_estimate
from tiltflow.evaluation.importance_weights import FEW
from tiltflow.laws.target import Target
from tiltflow.models.protocol import GenerativeModel
from tiltflow.models.text_to_image import TextToImage
from tiltflow.rewards import LearnedReward, Reward
from tiltflow.rewards.functions.failures import MANY
from tiltflow.training.calibration import LIMIT, gain_at_limit
from tiltflow.training.kl_budget import FREEZE, MEASURED
from tiltflow.training.method import Method
from tiltflow.training.records import failed_in_training
from tiltflow.training.settings import GuidanceMode

MISSED = 0.1
"""Relative deviation of a KL from its budget that is said, beyond two standard errors."""
UNEVEN = 0.05
"""Relative effective sample size below which a run says that its law is that of few samples."""

FAR = 0.5
"""Share of the target law's KL, and of the tilt, below which a run says that it has not found its target."""


def left_out_in_words(of_base: int, of_tuned: int, count: int) -> list[str]:
    """The sentence that says which samples the numbers of a summary are not of, if any."""
    if not of_base and not of_tuned:
        return []
    return [
        f"Samples whose reward is not finite, {of_base} of the base's {count} and {of_tuned} of the tuned model's, are left out"
        " of every number: the laws are those of the others."
    ]


def failed_in_words(of_base: int, of_tuned: int, count: int, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For how many samples the reward has a value that stands for none: their shares in the evaluation and in training, and the
    sentences that say so (`limits`). Nothing where there are none.

    Args:
        records: of the optimizer steps.
    """
    found, limits = dict[str, Any](), list[str]()
    if of_base or of_tuned:
        found |= {"failed_base": of_base / count, "failed_tuned": of_tuned / count}
        limits.append(
            f"The reward could not be computed for {of_base} of the base's {count} samples and {of_tuned} of the tuned model's:"
            " they count with the value that it has for failures."
        )
    failed, drawn = failed_in_training(records), records[-1].get("samples_drawn")
    if failed and drawn:
        found["failed_training"] = failed / drawn
    if max(found.values(), default=0) > MANY:
        limits.append(
            f"More than {MANY:.0%} of the samples, in training or here, have no reward of their own: the law that was"
            " learned is in part that of the value for failures."
        )
    return found | {"limits": limits}


def learned_in_words(reward: Reward) -> list[str]:
    """The sentence that says what the rewards of a summary are, of a reward that learned while the model was trained."""
    if not isinstance(reward, LearnedReward):
        return []
    return [
        "The reward was learned along the way: rewards and target law are those of the reward at the end, which the model has"
        " followed as it changed."
    ]


def calibration_in_words(beta: float | None, working_beta: float | None) -> dict[str, Any]:
    """Of a run that worked at `working_beta` at its end: whether that is at its limit (`calibration_at_limit`, None if it was
    not calibrated), and the sentence that says so (`limits`)."""
    if beta is None or working_beta is None:
        return {"calibration_at_limit": None, "limits": []}
    at_limit = gain_at_limit(beta / working_beta)
    sentence = (
        f"Calibration ended at its limit: the run worked at a temperature of {working_beta:.3g} where {beta:g} was asked for,"
        f" and it may not be more than {LIMIT:g} times lower or higher. The mean reward is then not made right: the run is far"
        " from converged, or its sampler cannot reach the target."
    )
    return {"calibration_at_limit": at_limit, "limits": [sentence] if at_limit else []}


def budget_in_words(budget: float | None, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of a run with a KL budget: the KL in the quarter in which the temperature was held (`kl_reached`), and the sentence that
    says that it is not the budget (`limits`).

    Args:
        records: of the optimizer steps.
    """
    if budget is None:
        return {"target_kl": None, "limits": []}
    beta = records[-1]["beta"]
    held = [row for row in records if row["beta"] == beta and row["step"] > FREEZE * records[-1]["step"]]
    kls = [next((row[key] for key in MEASURED if key in row), None) for row in held]
    found = [kl for kl in dict.fromkeys(kls) if kl is not None]  # once for all steps on a batch
    if len(found) < 2:
        said = f"The KL budget of {budget:g} nats had no effect in the end: no KL was measured in the last quarter of the run."
        return {"target_kl": budget, "kl_reached": None, "kl_reached_error": None, "limits": [said]}
    reached = mean_estimate(torch.tensor(found, dtype=torch.float64))
    entries = {"target_kl": budget, **reached.named("kl_reached"), "limits": list[str]()}
    if abs(reached.value / budget - 1) > MISSED + 2 * reached.standard_error / budget:
        why = (
            "that is as far from where it began as it may be: the reward cannot be tilted so far, or the run is far from"
            " converged"
            if records[-1]["beta_at_limit"]
            else "a longer run has more time to find it"
        )
        said = (
            f"The KL budget of {budget:g} nats was not met: at the temperature {beta:.3g}, which the run ended with, the KL is"
        )
        entries["limits"] = [f"{said} {reached}; {why}."]
    return entries


def modes_in_words(summary: Mapping[str, Any]) -> list[str]:
    """The sentence that says that a run has found little of its target law: its paths cost far less than those of that law, and
    its samples have far less of the tilt.

    Args:
        summary: of the run, its limits apart.
    """
    keys = ("path_kl", "path_kl_target", "achieved_tilt")
    paths, target, tilt = (summary.get(key) for key in keys)
    if paths is None or target is None or tilt is None:
        return []
    of_paths, of_target, of_tilt = (summary[f"{key}_error"] for key in keys)
    if paths + 2 * of_paths >= FAR * (target - 2 * of_target) or tilt + 2 * of_tilt >= FAR:
        return []
    return [
        f"The paths spend {paths:.2g} of the {target:.2g} nats that the target law costs, and the model has {tilt:.2f} of the"
        " tilt that was asked for: it has not found what the reward prefers, such as a mode far from the others. More steps may"
        " find it, or a method that weighs base samples: tilt-matching, path-reweighted."
    ]


def annealing_in_words(beta: float | None, record: Mapping[str, Any]) -> list[str]:
    """The sentence that says how far a method that raises the inverse temperature came, if not to the end.

    Args:
        beta: the temperature that was asked for.
        record: of the last optimizer step.
    """
    reached = record.get("inverse_temperature")
    asked = 1 / (record.get("beta") or beta or math.inf)
    if reached is None or reached >= asked * (1 - 1e-6):
        return []
    return [
        f"Training ended before its inverse temperature had risen to {asked:.3g}: it aimed at p_base(x) exp({reached:.3g} r(x))"
        " by then. More steps, or a lower method.target_effective_sample_size, take it further."
    ]


def reach_in_words(target: Target) -> list[str]:
    """Why the law of the run is not the target law, one sentence each: the method's own reasons, or, where it gives none, how
    near to an exponential tilt it comes."""
    if target.caveats or target.reaches == "exact":
        return list(target.caveats)
    if target.reaches == "none":
        return ["No exponential tilt is near the law that this method reaches: its target law shows a direction only."]
    return [
        "The method reaches its target law only to first order in the strength of the tilt: the stronger it is, the further its"
        " own law is from that."
    ]


def weights_in_words(metrics: Mapping[str, float]) -> list[str]:
    """The sentence that says that few of the weighted samples that a run learned from carried the law, if they were few.

    Args:
        metrics: of the last optimizer step.
    """
    size, share = metrics.get("effective_sample_size"), metrics.get("relative_size")
    if size is None or share is None or (size >= FEW and share >= UNEVEN):
        return []
    return [
        f"The weighted samples that the model last learned from were worth {size:.0f} equally weighted ones, {share:.1%} of"
        " their number: it has the law of those few. Raise beta, draw more samples, or begin with a method that comes nearer"
        " (method.first)."
    ]


def guidance_limits(mode: GuidanceMode | None) -> list[str]:
    """Why the law is not p_base exp(r / beta) for this guidance: one sentence for each reason."""
    match mode:
        case "rollout":
            return ["Pictures were drawn with guidance and learned from without it: no law is known that this aims at."]
        case "full":
            return ["The base of the law is the guided one, whose sampler only approximates a law."]
        case _:
            return []


def few_steps_limits(model: GenerativeModel, method: Method) -> list[str]:
    """What is known of a tilt of a pipeline that was distilled to few steps: one sentence, if this seems to be one."""
    return model.of_few_steps(method.sampling) if isinstance(model, TextToImage) else []
