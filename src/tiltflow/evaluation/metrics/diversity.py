"""How much pictures of one prompt differ, for each sampling point."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric

METRICS = (
    Metric(
        "variance",
        "Variance",
        "Sum of the variances of the features of pictures of one prompt.",
        better="up",
        source="table",
        compared=True,
    ),
    Metric(
        "vendi",
        "Vendi score",
        "Effective number of different pictures of a prompt (arXiv 2210.02410).",
        better="up",
        short="Vendi",
        source="table",
        compared=True,
    ),
)
