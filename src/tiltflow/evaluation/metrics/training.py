"""Curves of the training: what each line of metrics.jsonl has beside the reward and the path KL. Yielded by the methods."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, nothing

METRICS = (
    Metric(
        "loss",
        "Loss",
        "What the optimizer lowers.",
        better="down",
        expect="falls, then stays above zero: the rest is noise in what it is fitted to, which no model can remove.",
        source="training",
    ),
    Metric(
        "objective",
        "Objective",
        "Mean reward minus β times the path KL: what the policy is trained to raise.",
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
        "Squared error of the value function, in units of the first batch's spread of rewards.",
        better="down",
        expect="falls from one half to the part of the reward that is still undecided along a trajectory.",
        source="training",
    ),
    Metric(
        "gradient_norm",
        "Gradient norm",
        "Length of the gradient before it is clipped.",
        expect="noisy, but bounded. Growing spikes mean that the learning rate is too high.",
        source="training",
    ),
    Metric(
        "effective_sample_size",
        "Effective sample size",
        "Samples of equal weight that would teach as much as the weighted ones of a round.",
        better="up",
        expect="a good part of the batch. Where it falls to a few samples, the model learns to make those few.",
        source="training",
    ),
    Metric(
        "velocity_distance",
        "Distance of the velocities",
        "Mean square of v - v_base, summed over dimensions: the Wasserstein penalty before its weight.",
        expect="rising from 0, then flat: the rounds have settled.",
        source="training",
    ),
    Metric(
        "clipped",
        "Clipped terms",
        "Share of the terms of the loss that are too large to be used.",
        better="down",
        expect="small, and falling: a clipped term teaches nothing.",
        source="training",
    ),
)

measure = nothing
