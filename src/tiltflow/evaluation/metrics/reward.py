"""Mean rewards: of the base, of the tuned model, under the target law, and of each training batch."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "reward_base",
        "Mean reward, base",
        "Mean of r over samples of the base model.",
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
        "failed_base",
        "Failed rewards, base",
        "Share of samples whose reward could not be computed, and that count with the value that the reward has for failures.",
        unit="share",
        section=Section.SURE,
    ),
    Metric(
        "failed_tuned",
        "Failed rewards, tuned",
        "The same for the tuned model.",
        better="down",
        unit="share",
        section=Section.SURE,
    ),
    Metric(
        "failed_training",
        "Failed rewards, training",
        "The same for all samples that training drew.",
        better="down",
        unit="share",
        section=Section.SURE,
    ),
    Metric(
        "reward_gain",
        "Gain in reward",
        "Mean of tuned minus base over pairs of pictures from the same prompt and noise.",
        better="up",
        section=Section.CLOSE,
    ),
    Metric(
        "reward_target",
        "Mean reward, target",
        "Mean of r under the target law: the tuned model should have this value, neither less nor more.",
        section=Section.CLOSE,
    ),
    Metric(
        "reward_target_bias",
        "Bias taken from it",
        "Bias of the weighted mean toward the base, from few samples of a group, that was subtracted (jackknife).",
        section=Section.CLOSE,
    ),
    Metric(
        "reward",
        "Reward",
        "Mean reward of each training batch, with the standard deviation of samples as a band and the target's mean dashed.",
        better="up",
        expect="rises and levels off at the dashed line. Below it, train longer. Far above it, the reward is over-optimised.",
        source="training",
    ),
)

measure = nothing
