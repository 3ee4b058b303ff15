"""Distances between the tuned samples and the target law, with the floor that finite samples leave.

Computed by `evaluation.estimates`: `histogram_distance`, `reward_distance`, `null_distances`.
"""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "target_distance",
        "Distance to the target law",
        "{kind}. After ± stands how much it varies from sample to sample: no interval for the distance, which finite"
        " samples make larger, by about the floor.",
        better="down",
        section=Section.CLOSE,
        compared=True,
    ),
    Metric(
        "target_distance_base",
        "Distance of the base",
        "The same for the untouched model: where the run began.",
        section=Section.CLOSE,
    ),
    Metric(
        "target_distance_floor",
        "Floor",
        "The mean of the same where nothing is wrong: between samples drawn from the weighted base samples, and these drawn"
        " again.",
        section=Section.CLOSE,
    ),
    Metric(
        "reward_distance",
        "Distance in reward",
        "Largest gap between the cumulative curves of r, tuned against target (Kolmogorov-Smirnov): 0 equal, 1 disjoint.",
        better="down",
        section=Section.CLOSE,
    ),
    Metric(
        "reward_distance_floor",
        "Distance in reward, floor",
        "The mean of the same where nothing is wrong.",
        section=Section.CLOSE,
    ),
)

measure = nothing
