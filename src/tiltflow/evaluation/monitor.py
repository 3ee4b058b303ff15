"""The alarm for reward hacking: looks at the tuned model while it trains, on fixed noise, and a rule that a person can read.

A look measures the reward, held-out rewards, which training has never seen, and how much samples differ. The rule:

    since an earlier look the reward has risen, and something else has fallen, both beyond their noise,
    and what has fallen is below what the target law itself would have.

The last line is what only a known target law allows. A tilt towards one class has less variety than the base, and should:
base samples weighted by exp(r / beta) say how much is left when nothing is wrong. Where too few of them carry the weight to
say so, the rule is its first two lines.
"""

# Mutation tests: test_monitor.py

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate, ImportanceWeights, mean_estimate
from tiltflow.files import read_rows
from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]
LOOKS = "monitor.jsonl"
BEYOND = 3.0
"""Standard errors of a difference that count as more than noise."""


class Monitor(Settings):
    """Looks at the model while it trains."""

    steps: Count = 50
    """A look after so many optimizer steps."""
    num_samples: Annotated[int, Field(ge=8)] = 256
    """Samples of a look, always from the same noise; for a pipeline, the evaluation's prompts and generations instead."""
    stop: bool = False
    """End the training at an alarm, and evaluate what is there."""


@dataclass(frozen=True)
class Look:
    """What was measured after `step` optimizer steps: `reward`, and what must not fall."""

    step: int
    reward: Estimate
    held_out: Mapping[str, Estimate]


Samples = Mapping[str, Tensor]
"""Of each measure, a number for each sample [n]; `reward` among them."""


def look_at(step: int, samples: Samples, group: int = 1) -> Look:
    """A look from the measures of its samples; standard errors are over groups of so many that belong together."""
    means = {name: over_groups(values, group) for name, values in samples.items()}
    return Look(step, means.pop("reward"), means)


def over_groups(values: Tensor, group: int) -> Estimate:
    """Mean of values [n], its standard error over the means of groups of `group`; over values where there is one group. Values
    that are NaN are left out.

    >>> import torch
    >>> over_groups(torch.tensor([1.0, 3.0, torch.nan, 5.0, torch.nan, torch.nan]), 2).value
    3.5
    """
    means = values.double().reshape(-1, group).nanmean(1)
    several = means if len(means) > 1 else values
    return mean_estimate(several[several.isfinite()])


def target_measures(base: Samples, log_tilt: Tensor, classes: int = 1) -> dict[str, Estimate] | None:
    """What each measure is under the target law, from base samples whose log weights are `log_tilt` [n], of so many classes one
    after another, each with a target law of its own; None where they cannot say it, see `ImportanceWeights.unknown`."""
    weights = ImportanceWeights.from_log_tilt(log_tilt, classes, strata=True)
    if weights.unknown() is not None:
        return None
    found = {}
    for name, values in base.items():
        mean, error = weights.mean(values.double())
        found[name] = Estimate(mean.item(), error.item())
    return found


def spread(features: Tensor) -> Tensor:
    """How far each sample is from the mean, squared, so that the mean is the variance of features [n, width]: [n]."""
    x = features.flatten(1).double()
    return (x - x.mean(0)).square().sum(1) * (len(x) / max(len(x) - 1, 1))


def spread_of_target(features: Tensor, log_tilt: Tensor, classes: int = 1) -> Tensor:
    """The same from the mean of the target law, so that their weighted mean is the variance under it: [n]."""
    x, weights = features.flatten(1).double(), ImportanceWeights.from_log_tilt(log_tilt, classes).weights
    return (x - weights @ x).square().sum(1)


def find_alarm(looks: Sequence[Look], target: Mapping[str, Estimate] | None = None) -> str | None:
    """What is wrong at the last look, in words, if the rule says so.

    Args:
        looks: the first one at the base.
        target: each measure under the target law, where it is known.
    """
    *earlier, now = looks
    for name, value in now.held_out.items():
        below_target = target is None or name not in target or _above(target[name], value)
        for look in earlier:
            if below_target and _above(look.held_out[name], value) and _above(now.reward, look.reward):
                aim = f", where the target law has {target[name]}" if target is not None and name in target else ""
                return (
                    f"step {now.step}: the reward rose from {look.reward} to {now.reward} since step {look.step}, but {name}"
                    f" fell from {look.held_out[name]} to {value}{aim}"
                )
    return None


def _above(one: Estimate, other: Estimate) -> bool:
    """Whether one is higher than the other beyond the noise of both."""
    noise: float = (one.standard_error**2 + other.standard_error**2) ** 0.5
    return one.value - other.value > BEYOND * noise


# ---- as lines of a file ----


def to_row(look: Look, alarm: str | None, **more: Any) -> dict[str, Any]:
    """A look as a line of monitor.jsonl."""
    return {"step": look.step, "measures": named({"reward": look.reward, **look.held_out}), "alarm": alarm, **more}


def named(measures: Mapping[str, Estimate] | None) -> dict[str, list[float]] | None:
    """Estimates as they are written down."""
    return None if measures is None else {name: [each.value, each.standard_error] for name, each in measures.items()}


def from_row(row: Mapping[str, Any]) -> Look:
    """The look of such a line."""
    measures = {name: Estimate(*pair) for name, pair in row["measures"].items()}
    return Look(row["step"], measures.pop("reward"), measures)


def read_looks(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's monitor.jsonl that are as they were written; none if it has no monitor."""
    return read_rows(folder / LOOKS, _check_row)[0]


def _check_row(row: Any) -> None:
    """Raises an exception if this is no line of monitor.jsonl."""
    if not {"alarm", "measures"} <= row.keys() or not isinstance(row["alarm"], str | None):
        raise ValueError("no look")
    for measures in (row["measures"], row.get("target") or {}):
        for name, (value, error) in measures.items():
            if not isinstance(name, str) or not _are_numbers(value, error):
                raise ValueError("no measure")
    from_row(row)


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)
