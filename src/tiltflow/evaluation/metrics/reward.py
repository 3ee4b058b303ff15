"""Mean rewards: of the base, of the tuned model, under the target law, and of each training batch."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "reward_base",
        "Mean reward, base",
        "Mean of r over samples of the untouched model.",
        section=Section.CLOSE,
        compared=True,
    ),
    Metric(
        "reward_tuned",
        "Mean reward, tuned",
        "Mean of r over samples of the tuned model, drawn afresh after training.",
        better="up",
        section=Section.CLOSE,
        compared=True,
    ),
    Metric(
        "reward_gain",
        "Gain in reward",
        "Tuned minus base, picture by picture: of the same prompts and noise.",
        better="up",
        section=Section.CLOSE,
    ),
    Metric(
        "reward_target",
        "Mean reward, target",
        "Mean of r under the target law: neither less nor more is asked for.",
        section=Section.CLOSE,
    ),
    Metric(
        "reward_target_bias",
        "Bias taken from it",
        "By how much the weighted mean was off, as few samples of a group pull it toward the base (jackknife).",
        section=Section.CLOSE,
    ),
    Metric(
        "reward",
        "Reward",
        "Mean reward of each training batch; the shade is the spread of single samples, the dashed line the target law's mean.",
        better="up",
        expect="rises and levels off at the dashed line. Below it: train longer. Far above it: the reward is followed"
        " too hard.",
        source="training",
    ),
)

measure = nothing
