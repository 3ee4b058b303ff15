"""What a run cost: time, evaluations of the networks, samples, steps. Counted by the training loop."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "seconds",
        "Training time",
        "Wall-clock time of the training loop.",
        better="down",
        unit="seconds",
        section=Section.COST,
        compared=True,
    ),
    Metric(
        "seconds_total",
        "Total time",
        "With loading, sampling and evaluation.",
        better="down",
        unit="seconds",
        section=Section.COST,
    ),
    Metric(
        "network_evaluations",
        "Network evaluations",
        "Samples that the two networks saw in training, counted together.",
        better="down",
        section=Section.COST,
    ),
    Metric(
        "samples_drawn",
        "Samples drawn",
        "By the model in training, to learn from; each counted once.",
        better="down",
        section=Section.COST,
    ),
    Metric(
        "evaluations_per_iteration",
        "Evaluations per iteration",
        "The same for one step of the optimizer.",
        better="down",
        section=Section.COST,
    ),
    Metric("iterations", "Iterations", "Steps of the optimizer.", section=Section.COST),
    Metric(
        "max_train_steps",
        "Iterations asked for",
        "Fewer were done where the run was interrupted.",
        section=Section.COST,
    ),
)

measure = nothing
