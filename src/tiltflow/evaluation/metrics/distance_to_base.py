"""2-Wasserstein distance between tuned and base samples. Computed by `evaluation.estimates.exact_w2`."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Cost, Metric, Section

METRICS = (
    Metric(
        "w2_base",
        "W2 to the base",
        "2-Wasserstein distance between samples of the two models ({w2_space}).",
        better="down",
        section=Section.VARIED,
        compared=True,
        cost=Cost("w2_floor", "between two samples of the base"),
    ),
    Metric(
        "w2_floor",
        "W2, floor",
        "The same between two samples of the base: what finite samples leave.",
        section=Section.VARIED,
        compared=True,
    ),
)
