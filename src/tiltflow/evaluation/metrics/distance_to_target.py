"""Distances between the tuned samples and the target law, with their floors for finite samples.

Computed by `evaluation.distances` and `ImportanceWeights.null_distances`.
"""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "target_distance",
        "Distance to the target law",
        "{kind}. ± is its standard deviation from sample to sample, not an interval for the distance, which finite"
        " samples increase by about the floor.",
        better="down",
        section=Section.CLOSE,
        compared=True,
    ),
    Metric(
        "target_distance_base",
        "Distance of the base",
        "The same for the base model, from which training started.",
        section=Section.CLOSE,
    ),
    Metric(
        "target_distance_floor",
        "Floor",
        "The expected distance if the tuned model follows the target law: between samples drawn from the weighted base"
        " samples and a resample of these.",
        section=Section.CLOSE,
    ),
    Metric(
        "reward_distance",
        "Distance in reward",
        "Largest gap between the distribution functions of r, tuned and target (Kolmogorov-Smirnov): 0 equal, 1 disjoint.",
        better="down",
        section=Section.CLOSE,
    ),
    Metric(
        "reward_distance_floor",
        "Distance in reward, floor",
        "The expected distance if the tuned model follows the target law.",
        section=Section.CLOSE,
    ),
)

measure = nothing
