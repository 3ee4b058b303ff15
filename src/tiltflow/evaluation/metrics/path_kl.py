"""KL divergence of the tuned sampler's paths from the base's; computed by `control.path_kl`."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Cost, Metric, Section, nothing

METRICS = (
    Metric(
        "path_kl",
        "Path KL to the base",
        "KL divergence of the tuned memoryless sampler's paths from the base's, in nats per sample, on fresh paths.",
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
        "KL divergence of the target law from the base's, from the weights: the path KL of an exact tilt with many steps.",
        unit="nats",
        section=Section.CLOSE,
    ),
    Metric(
        "target_kl",
        "KL budget",
        "KL divergence from the base that was to be spent: the temperature was adapted to it, and held in the last quarter.",
        unit="nats",
        section=Section.CLOSE,
    ),
    Metric(
        "kl_reached",
        "KL reached",
        "Mean of the KL divergence from the base that the batches of the last quarter measured, at the temperature held then.",
        unit="nats",
        section=Section.CLOSE,
    ),
    Metric(
        "path_kl",
        "Distance from the base",
        "Path KL of the sampler that is trained from the base's, in nats per sample, on each training batch. The dashed line is"
        " the KL divergence of the target law from the base's.",
        unit="nats",
        expect="starts at 0, rises with the reward and settles near the dashed line, or above it where the temperature was"
        " lowered.",
        source="training",
    ),
)

measure = nothing
