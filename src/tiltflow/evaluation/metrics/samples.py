"""Numbers of samples of an evaluation; computed by `evaluation.importance_weights`."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "effective_sample_size",
        "Effective sample size",
        "Number of samples of the target law that would give the same precision.",
        better="up",
        section=Section.SURE,
        compared=True,
    ),
    Metric(
        "effective_sample_size_of_group",
        "Effective sample size of a group",
        "The same for one prompt or class: harmonic mean over all of them.",
        better="up",
        section=Section.SURE,
    ),
    Metric(
        "num_samples",
        "Samples",
        "Number of samples drawn from each of the two models for this evaluation.",
        section=Section.SURE,
    ),
    Metric("num_prompts", "Prompts", "Number of prompts that are held out from training.", section=Section.SURE),
    Metric("num_observations", "Observations", "Number of observations that are held out from training.", section=Section.SURE),
)

measure = nothing
