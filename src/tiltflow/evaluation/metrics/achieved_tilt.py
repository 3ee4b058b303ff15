"""The tilt that the tuned model has, in units of the one that was asked for; computed by `evaluation.achieved_tilt`."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "achieved_tilt",
        "Achieved tilt",
        "How much of the tilt that was asked for the tuned model has: 1 at the target law, 0 at the base, above 1 if it is"
        " tilted too far. It is the slope of the log of the tuned density over the base's on that of the target's over the"
        " base's, by {achieved_tilt_by}.",
        section=Section.CLOSE,
        compared=True,
    ),
    Metric(
        "achieved_tilt_r2",
        "R² of the tilt",
        "Share of the variance of the log of the tuned density over the base's that this tilt explains, without the noise of"
        " its estimate: 1 if the reward alone has changed the law; the rest is change that nobody asked for.",
        section=Section.CLOSE,
        compared=True,
    ),
    Metric(
        "kl_to_target",
        "KL to the target law",
        "How far the tuned model is from its target law, in nats and to second order: half the variance of the log of the tuned"
        " density over the base's, less that of the target's over the base's, without the noise of its estimate. It needs no"
        " sample of the target law.",
        section=Section.CLOSE,
        compared=True,
    ),
    Metric(
        "achieved_tilt_path",
        "Achieved tilt of the paths",
        "The same of the paths of the memoryless sampler, with the steps of the evaluation. Steps of Gaussian noise leave part"
        " of the tilt out, the fewer the more; where the velocity has more of it, an ODE draws samples that are nearer.",
        section=Section.CLOSE,
    ),
    Metric(
        "achieved_tilt_path_r2",
        "R² of the paths",
        "Share of the variance of the paths' log ratio to the base's that the tilt explains: in many steps 1 if the control is"
        " optimal.",
        section=Section.CLOSE,
    ),
    Metric(
        "achieved_tilt_samples",
        "Samples of the tilt",
        "Number of samples of the tuned model over which the achieved tilt is measured.",
        section=Section.SURE,
    ),
)

measure = nothing
