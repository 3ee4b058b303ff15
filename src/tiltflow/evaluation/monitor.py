"""The alarm for reward hacking: measurements during training ("looks") on fixed noise, and a rule that a person can check.

A look measures the reward, held-out rewards, which training never uses, the diversity of samples, and of pictures how much is
in them. The rule:

    since an earlier look the reward has risen, and another measure has fallen, both beyond their noise,
    and that measure is below its value under the target law.

The last line needs a known target law. A tilt towards one class has less diversity than the base, and should: base samples
weighted by exp(r / beta) say how much remains under the target law. If their effective number is too small, the rule is its
first two lines.
"""

# Mutation tests: test_monitor.py

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate, mean_estimate
from tiltflow.evaluation.importance_weights import ImportanceWeights
from tiltflow.files import read_rows
from tiltflow.settings import Settings

Count = Annotated[int, Field(ge=1)]
LOOKS = "monitor.jsonl"
BEYOND = 3.0
"""Number of standard errors beyond which a difference is more than noise."""


class Monitor(Settings):
    """Settings of the looks during training."""

    steps: Count = 50
    """Number of optimizer steps between looks."""
    num_samples: Annotated[int, Field(ge=8)] = 256
    """Number of samples of a look, always from the same noise; a pipeline uses the evaluation's prompts and generations
    instead."""
    stop: bool = False
    """Stop training at an alarm, and evaluate the model."""


@dataclass(frozen=True)
class Look:
    """Measurements after `step` optimizer steps: the reward, and measures that must not fall."""

    step: int
    reward: Estimate
    held_out: Mapping[str, Estimate]


Samples = Mapping[str, Tensor]
"""Values [n] of each measure for each sample, by name; `reward` is among them."""


def look_at(step: int, samples: Samples, group: int = 1) -> Look:
    """Make a look of the measures of its samples; standard errors are over groups of `group` consecutive samples."""
    means = {name: over_groups(values, group) for name, values in samples.items()}
    return Look(step, means.pop("reward"), means)


def over_groups(values: Tensor, group: int) -> Estimate:
    """Return the mean of values [n], and its standard error over the means of groups of `group` consecutive values, or over the
    values if there is one group. NaN values are ignored.

    >>> import torch
    >>> over_groups(torch.tensor([1.0, 3.0, torch.nan, 5.0, torch.nan, torch.nan]), 2).value
    3.5
    """
    means = values.double().reshape(-1, group).nanmean(1)
    several = means if len(means) > 1 else values
    return mean_estimate(several[several.isfinite()])


def target_measures(base: Samples, log_tilt: Tensor, classes: int = 1) -> dict[str, Estimate] | None:
    """Estimate each measure under the target law from base samples; None if that is unknown, see `ImportanceWeights.unknown`.

    Args:
        log_tilt: log weights [n] of the base samples.
        classes: number of classes, equally many samples of each one after another, each with a target law of its own.
    """
    weights = ImportanceWeights.from_log_tilt(log_tilt, classes, strata=True)
    if weights.unknown() is not None:
        return None
    found = {}
    for name, values in base.items():
        mean, error = weights.mean(values.double())
        found[name] = Estimate(mean.item(), error.item())
    return found


def spread(features: Tensor) -> Tensor:
    """Return the squared distances [n] of features [n, width] to their mean, scaled so that their mean is the variance."""
    x = features.flatten(1).double()
    return (x - x.mean(0)).square().sum(1) * (len(x) / max(len(x) - 1, 1))


def spread_of_target(features: Tensor, log_tilt: Tensor, classes: int = 1) -> Tensor:
    """Return the squared distances [n] of features [n, width] to the mean of the target law: their weighted mean is the
    variance under it."""
    x, weights = features.flatten(1).double(), ImportanceWeights.from_log_tilt(log_tilt, classes).weights
    return (x - weights @ x).square().sum(1)


def surprise(labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return -log p [n] of the class of each sample, p being the share of its class among them: their mean is the entropy of
    the classes, in nats, and their spread gives its standard error (delta method).

    Args:
        labels: int64 [n].
        weights: of the samples, which sum to one; all equal by default. The weighted mean is then the entropy.
    """
    if weights is None:
        weights = torch.full(labels.shape, 1 / len(labels), dtype=torch.float64)
    shares = torch.bincount(labels, weights)
    return -shares[labels].log()


def find_alarm(looks: Sequence[Look], target: Mapping[str, Estimate] | None = None) -> str | None:
    """Return a sentence on the alarm at the last look; None if the rule raises none.

    Args:
        looks: in order, the first one at the base.
        target: measures under the target law, as far as known.
    """
    *earlier, now = looks
    for name, value in now.held_out.items():
        below_target = target is None or name not in target or _above(target[name], value)
        for look in earlier:
            if name not in look.held_out:  # a look of an earlier version, which did not measure it
                continue
            if below_target and _above(look.held_out[name], value) and _above(now.reward, look.reward):
                aim = f", where the target law has {target[name]}" if target is not None and name in target else ""
                return (
                    f"step {now.step}: the reward rose from {look.reward} to {now.reward} since step {look.step}, but {name}"
                    f" fell from {look.held_out[name]} to {value}{aim}"
                )
    return None


def _above(one: Estimate, other: Estimate) -> bool:
    """Return whether `one` is higher than `other` beyond the noise of both."""
    noise: float = (one.standard_error**2 + other.standard_error**2) ** 0.5
    return one.value - other.value > BEYOND * noise


# ---- as lines of a file ----


def to_row(look: Look, alarm: str | None, **more: Any) -> dict[str, Any]:
    """Return a look as a line of monitor.jsonl."""
    return {"step": look.step, "measures": named({"reward": look.reward, **look.held_out}), "alarm": alarm, **more}


def named(measures: Mapping[str, Estimate] | None) -> dict[str, list[float]] | None:
    """Return estimates as pairs [value, standard error] for JSON."""
    return None if measures is None else {name: [each.value, each.standard_error] for name, each in measures.items()}


def from_row(row: Mapping[str, Any]) -> Look:
    """Return the look of a line of monitor.jsonl."""
    measures = {name: Estimate(*pair) for name, pair in row["measures"].items()}
    return Look(row["step"], measures.pop("reward"), measures)


def read_looks(folder: Path) -> list[dict[str, Any]]:
    """Return the valid lines of a run's monitor.jsonl; none if the run has no monitor."""
    return read_rows(folder / LOOKS, _check_row)[0]


def _check_row(row: Any) -> None:
    """Raise an exception if this is not a line of monitor.jsonl."""
    if not {"alarm", "measures"} <= row.keys() or not isinstance(row["alarm"], str | None):
        raise ValueError("not a look")
    for measures in (row["measures"], row.get("target") or {}):
        for name, (value, error) in measures.items():
            if not isinstance(name, str) or not _are_numbers(value, error):
                raise ValueError("not a measure")
    from_row(row)


def _are_numbers(*values: object) -> bool:
    return all(isinstance(value, int | float) for value in values)
