"""How many samples the numbers of an evaluation rest on. Computed by `evaluation.estimates.ImportanceWeights`."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "effective_sample_size",
        "Effective sample size",
        "Samples of equal weight that would tell as much about the target law.",
        better="up",
        section=Section.SURE,
        compared=True,
    ),
    Metric(
        "effective_sample_size_of_group",
        "Effective sample size of a group",
        "The same of one prompt, or one condition: the harmonic mean over all of them.",
        better="up",
        section=Section.SURE,
    ),
    Metric("num_samples", "Samples", "Drawn from each of the two models for this evaluation.", section=Section.SURE),
    Metric("num_prompts", "Prompts", "Held out from training.", section=Section.SURE),
)

measure = nothing
