"""Caveats of a run's summary: what its numbers are not, one sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tiltflow.laws.target import Target
from tiltflow.training.calibration import LIMIT, gain_at_limit
from tiltflow.training.settings import GuidanceMode


def left_out_in_words(of_base: int, of_tuned: int, count: int) -> list[str]:
    """The sentence that says which samples the numbers of a summary are not of, if any."""
    if not of_base and not of_tuned:
        return []
    return [
        f"Samples whose reward is not finite, {of_base} of the base's {count} and {of_tuned} of the tuned model's, are left out"
        " of every number: the laws are those of the others."
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


def guidance_limits(mode: GuidanceMode | None) -> list[str]:
    """Why the law is not p_base exp(r / beta) for this guidance: one sentence for each reason."""
    match mode:
        case "rollout":
            return ["Pictures were drawn with guidance and learned from without it: no law is known that this aims at."]
        case "full":
            return ["The base of the law is the guided one, whose sampler only approximates a law."]
        case _:
            return []
