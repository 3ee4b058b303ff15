"""Checks of the reward: deterministic, finite, of each sample alone, and with the gradient of its own slope."""

# Mutation tests: none: thresholds, and words for them

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from tiltflow.rewards import select
from tiltflow.rewards.functions.checked import evaluate, value_and_gradient
from tiltflow.runs.doctor.patient import Finding, Patient
from tiltflow.streams import stream


def reward_itself(patient: Patient) -> Iterator[Finding]:
    """Check that the reward is deterministic, finite and a function of each sample alone; report its range and its cost."""
    x = patient.samples()
    began = time.perf_counter()
    first = patient.rewards(x)
    seconds = time.perf_counter() - began
    again = patient.rewards(x)
    alone = torch.cat([patient.rewards(x[i : i + 1], slice(i, i + 1)) for i in range(min(4, len(x)))])
    finite = first[first.isfinite()]
    if not len(finite):
        return  # the check of the temperature says so
    spread = float(finite.std(correction=0)) or 1.0
    low, high = finite.min().item(), finite.max().item()
    unit = patient.unit
    price = f"{seconds / len(x):.2g} s a sample"
    text = f"{finite.mean().item():.4g} ± {spread:.2g} {unit} at the base, {low:.4g} to {high:.4g}; {price}"
    if not torch.allclose(first, again, rtol=0, atol=0, equal_nan=True):
        change = (first - again).abs().nan_to_num(torch.inf).max().item()
        fix = "put it in evaluation mode, and give it its own seeded generator"
        yield Finding("reward", "amber", f"{text}. Two calls on the same samples differ by up to {change:.2g}", fix)
    elif not torch.allclose(first[: len(alone)], alone, rtol=0, atol=0.01 * spread, equal_nan=True):
        fix = "the reward of a sample must not depend on the others: no batch statistics, no ranks"
        yield Finding("reward", "red", f"{text}. It gives a sample another value when it is alone", fix)
    elif len(finite) < len(first):
        left_out = f"It is finite for {len(finite)} of {len(first)} base samples"
        yield Finding("reward", "amber", f"{text}. {left_out}", "training drops the others, as non_finite_rewards says")
    else:
        yield Finding("reward", "green", f"{text}; deterministic")


def reward_gradient(patient: Patient) -> Iterator[Finding]:
    """Compare the gradient of autograd with finite differences along a random direction."""
    if not patient.method.needs.reward_gradient:
        return
    ends = patient.samples()
    kept = patient.rewards(ends).isfinite().nonzero()[:4, 0]
    x, reward = ends[kept].float(), select(patient.bound_reward, kept)
    if not len(x):
        return
    _, gradient = value_and_gradient(reward, x)
    direction = torch.randn(x.shape, generator=stream(0, "direction", device=x.device), device=x.device)
    expected = (gradient * direction).flatten(1).sum(1)
    differences = []
    with torch.no_grad():
        for h in (1e-2, 3e-3, 1e-3):  # a long step is not the slope, a short one is rounding error
            differences.append((evaluate(reward, x + h * direction) - evaluate(reward, x - h * direction)) / (2 * h))
    scale = expected.abs().max().item()
    error = min((difference - expected).abs().max().item() for difference in differences)
    if scale == 0:
        fix = "is it detached, or rounded? use a method that needs no gradient"
        yield Finding("gradient", "red", "the gradient of the reward is zero", fix)
    elif error > 0.2 * scale:
        fix = "is something in it rounded, clipped or detached? score-as-action and orw-cfm-w2 need no gradient"
        text = f"autograd and finite differences differ by {error / scale:.0%} of the slope"
        yield Finding("gradient", "red" if error > 0.9 * scale else "amber", text, fix)
    else:
        yield Finding("gradient", "green", f"autograd matches finite differences within {error / scale:.1%}")
