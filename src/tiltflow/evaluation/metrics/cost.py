"""Cost of a run: time, network evaluations, samples, steps; counted by the training loop."""

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
        "Wall-clock time with loading, sampling and evaluation.",
        better="down",
        unit="seconds",
        section=Section.COST,
    ),
    Metric(
        "network_evaluations",
        "Network evaluations",
        "Inputs of the base and the tuned network in training, together.",
        better="down",
        section=Section.COST,
    ),
    Metric(
        "samples_drawn",
        "Samples drawn",
        "Samples that the model drew to learn from, each counted once.",
        better="down",
        section=Section.COST,
    ),
    Metric(
        "evaluations_per_iteration",
        "Evaluations per iteration",
        "Network evaluations per optimizer step.",
        better="down",
        section=Section.COST,
    ),
    Metric("iterations", "Iterations", "Optimizer steps.", section=Section.COST),
    Metric(
        "max_train_steps",
        "Iterations asked for",
        "Steps that the recipe asks for; an interrupted run did fewer.",
        section=Section.COST,
    ),
)

measure = nothing
