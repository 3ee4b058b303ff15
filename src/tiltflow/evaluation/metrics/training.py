"""Training curves: the numbers of each line of metrics.jsonl besides the reward and the path KL; yielded by the methods."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, nothing

METRICS = (
    Metric(
        "loss",
        "Loss",
        "Loss that the optimizer minimises.",
        better="down",
        expect="falls, then levels off above zero: the rest is noise in the regression targets, which no model can remove.",
        source="training",
    ),
    Metric(
        "objective",
        "Objective",
        "Mean reward minus β times the path KL, which training maximises.",
        better="up",
        expect="rises and levels off. While it falls, the steps are too large, or the critic is wrong.",
        source="training",
    ),
    Metric(
        "step_kl",
        "Size of an update",
        "Path KL between the policies before and after the updates on one batch, in nats.",
        unit="nats",
        expect="stays near or below its target, `target_kl`.",
        source="training",
    ),
    Metric(
        "critic_loss",
        "Critic's loss",
        "Squared error of the value function, in units of the reward's variance in the first batch.",
        better="down",
        expect="falls from one half to the part of the reward's variance that the state on a trajectory does not determine.",
        source="training",
    ),
    Metric(
        "gradient_norm",
        "Gradient norm",
        "Norm of the gradient before clipping.",
        expect="noisy, but bounded. Growing spikes mean that the learning rate is too high.",
        source="training",
    ),
    Metric(
        "effective_sample_size",
        "Effective sample size",
        "Number of equally weighted samples that would be worth as much as the weighted samples of a round.",
        better="up",
        expect="a good part of the batch. If it falls to a few samples, the model learns to reproduce those few.",
        source="training",
    ),
    Metric(
        "relative_size",
        "Relative effective sample size",
        "Effective sample size of the weighted samples that are learned from, over their number.",
        better="up",
        expect="rises as the tuned chain comes near its best, and stays. Below a few percent, few samples carry the law.",
        source="training",
    ),
    Metric(
        "relative_size_of_base",
        "Relative size under base paths",
        "Relative effective sample size that a round of paths of the base's chain alone would have.",
        better="up",
        expect="constant but for noise: it is the base's and the reward's own.",
        source="training",
    ),
    Metric(
        "relative_size_of_tuned",
        "Relative size under tuned paths",
        "Relative effective sample size that a round of paths of the tuned chain alone would have.",
        better="up",
        expect="rises with training. Where it stays below that of the base's paths, those are drawn.",
        source="training",
    ),
    Metric(
        "base_share",
        "Share of base paths",
        "Share of the paths of a round that were drawn by the base's chain.",
        expect="one half in the first round, then what gives the larger effective sample size.",
        source="training",
    ),
    Metric(
        "inverse_temperature",
        "Inverse temperature",
        "Tilt of the law that this round aims at, p_base exp(eta r), in units of 1 / reward.",
        expect="rises in steps to 1 / β, and stays there for the rest of the run.",
        source="training",
    ),
    Metric(
        "tilt_step",
        "Step of the inverse temperature",
        "Rise of the inverse temperature from the last round to this one.",
        expect="above 0 at first, and 0 once the inverse temperature is 1 / β.",
        source="training",
    ),
    Metric(
        "largest_weight",
        "Largest weight",
        "Weight of the sample that weighs most, in units of the mean weight.",
        better="down",
        expect="bounded. If it nears the number of samples, one of them is all that is learned.",
        source="training",
    ),
    Metric(
        "kl",
        "KL of the law",
        "KL divergence from the base of the law that is learned, by its weights or by its velocities, in nats.",
        unit="nats",
        expect="by weights, constant but for noise while the temperature is; by velocities, rises from 0 and levels off.",
        source="training",
    ),
    Metric(
        "velocity_distance",
        "Distance of the velocities",
        "Mean square of v - v_base, summed over dimensions: the Wasserstein penalty before its weight.",
        expect="rises from 0, then levels off once the rounds have converged.",
        source="training",
    ),
    Metric(
        "clipped",
        "Clipped terms",
        "Share of the terms of the loss that are too large to be used.",
        better="down",
        expect="small and falling: a clipped term has no gradient.",
        source="training",
    ),
)

measure = nothing
