"""Cost of a run: time, by phase too, network evaluations, samples, steps, memory; counted by the training loop."""

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
    Metric(
        "samples_per_second",
        "Samples per second",
        "Samples drawn to learn from, per second of training after the first batch, with all that training does.",
        better="up",
        section=Section.SPEED,
    ),
    Metric(
        "network_evaluations_per_second",
        "Network evaluations per second",
        "Inputs of the base and the tuned network, together, per second of training after the first batch.",
        better="up",
        section=Section.SPEED,
    ),
    *(
        Metric(f"seconds_by_phase.{key}", title, meaning, better="down", unit="seconds", section=Section.SPEED)
        for key, title, meaning in (
            ("rollout", "Time of paths", "Of the training time: drawing paths or samples, without their rewards."),
            ("adjoint", "Time of adjoints", "Of the training time: running adjoints back along the paths, without rewards."),
            ("reward", "Time of rewards", "Of the training time: rewards, with decoding and their gradient."),
            ("update", "Time of updates", "Of the training time: gradients of the loss in the weights, and optimizer steps."),
            ("other", "Time of all else", "Of the training time: the rest, such as looks of the monitor and checkpoints."),
        )
    ),
    Metric(
        "peak_memory_bytes",
        "Peak memory",
        "On a GPU, of tensors since training began; on a CPU, of the whole process. The main process's if there are more.",
        better="down",
        unit="bytes",
        section=Section.SPEED,
    ),
)

measure = nothing
