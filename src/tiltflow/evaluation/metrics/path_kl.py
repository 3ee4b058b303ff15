"""KL divergence of the tuned sampler's paths from the base's. Computed by `control.path_kl`."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Cost, Metric, Section, nothing

METRICS = (
    Metric(
        "path_kl",
        "Path KL to the base",
        "How far the tuned memoryless sampler has moved away from the base's, in nats per sample, on fresh paths.",
        better="down",
        unit="nats",
        short="Path KL",
        section=Section.CLOSE,
        compared=True,
        cost=Cost(),
    ),
    Metric(
        "path_kl_target",
        "KL of the target",
        "Of the target law from the base's, in nats, from the weights: what the path KL is at an exact tilt in many steps.",
        unit="nats",
        section=Section.CLOSE,
    ),
    Metric(
        "path_kl",
        "Distance from the base",
        "How far the sampler has moved away from the base model's, in nats per sample (path KL): one batch each, of the chain"
        " that is trained. The dashed line is the KL divergence of the target law from the base's.",
        unit="nats",
        expect="starts at 0, rises with the reward and settles near the dashed line, or above it where the temperature was"
        " lowered.",
        source="training",
    ),
)

measure = nothing
