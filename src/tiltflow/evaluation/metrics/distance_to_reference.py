"""Distances of pictures to reference pictures, for each sampling point. Computed by `evaluation.features`."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Cost, Metric

METRICS = (
    Metric(
        "fid",
        "FID to the reference",
        "Fréchet distance between Gaussian fits to the features of the pictures and of the reference.",
        better="down",
        short="FID",
        source="table",
        compared=True,
        cost=Cost("fid_base", "the base's own"),
    ),
    Metric(
        "kid",
        "KID to the reference",
        "Unbiased squared maximum mean discrepancy between the features of the pictures and of the reference.",
        better="down",
        short="KID",
        source="table",
        compared=True,
    ),
)
