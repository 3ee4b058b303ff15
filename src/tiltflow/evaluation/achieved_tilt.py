r"""How much of the tilt that was asked for a model has: a regression of the log ratio of its law to the base's on that tilt.

Under the target law the log ratio log p_tuned / p_base is the log tilt, r / beta, up to a constant. So over samples of the
tuned model

    achieved tilt   the slope of the log ratio on the log tilt: 1 at the target law, 0 at the base
    R^2             the share of the log ratio's variance that the tilt explains: below 1, part of what changed is no tilt.

The log ratio is an estimate with noise, which adds to its variance. Two independent estimates of each sample share all but
that noise, so their covariance stands for the variance: R^2 = slope^2 Var(tilt) / Cov(L_1, L_2). The noise is larger for some
samples than for others, so standard errors are those that allow for it (MacKinnon & White 1985, HC3).

Half the variance of what is left, L - r / beta, is the KL of the model from the target law in nats, to second order: of a model
whose log ratio is off by a Gaussian variable exactly. It needs no sample of the target law and no weight, so it says how far a
model is from a law that no base sample resembles.

Every prompt, and every class, has a constant of its own: the regression is within groups. Where groups are a sample of more,
such as prompts, standard errors are of sums over each group, from which its constant drops out: residuals as they are.
"""

# Mutation tests: test_achieved_tilt.py

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.log_ratio import END, by_flow_matching, by_ode
from tiltflow.flows.field import VelocityField
from tiltflow.formatting import decimal

FEW_DIMENSIONS = 3
"""Up to so many, the log ratio is computed by the ODE with its divergence, where its start is standard normal noise."""
OF_TILT = ("achieved_tilt", "achieved_tilt_error", "achieved_tilt_r2", "achieved_tilt_r2_error", "achieved_tilt_by")
KEYS = (*OF_TILT, "kl_to_target", "kl_to_target_error")
FAR = 0.005
"""Nats from a target law that nothing else can check from which on a run says so: a thousand samples of each are then enough to
tell the two laws apart."""


@dataclass(frozen=True)
class AchievedTilt:
    """The tilt of a model in units of the tilt that was asked for.

    Args:
        slope: 1 at the target law.
        r2: None if the log ratio hardly varies between samples.
        kl: of the model from the target law, in nats, to second order.
        by: the log ratio's estimator.
    """

    slope: Estimate
    r2: Estimate | None
    kl: Estimate
    by: str

    def entries(self) -> dict[str, Any]:
        """Return the entries of a summary, `KEYS`."""
        r2 = (None, None) if self.r2 is None else (self.r2.value, self.r2.standard_error)
        values = (self.slope.value, self.slope.standard_error, *r2, self.by, self.kl.value, self.kl.standard_error)
        return dict(zip(KEYS, values, strict=True))


def measure(
    tuned: VelocityField,
    base: VelocityField,
    x1: Tensor,
    log_tilt: Tensor,
    generator: torch.Generator,
    *,
    groups: int = 1,
    strata: bool = True,
    start: float = 0.0,
    end: float = END,
    batch_size: int | None = None,
) -> AchievedTilt | None:
    """Measure the achieved tilt over samples x1 [n, *event] of the tuned model. None if the tilt is the same for all samples of
    each group.

    Args:
        tuned, base: bound to the conditions of the samples.
        log_tilt: log density of the target law over the base's, up to a constant of each group [n]; see `Target.log_tilt`.
        groups: number of groups of equal size, one after the other, each with a base law of its own.
        strata: True if the groups are all that exist, and not a sample of more.
        start: time at which both models start from pure noise.
        end: last time at which their sampler asks for their velocities.
        batch_size: samples that a network sees at once.
    """
    if x1[0].numel() <= FEW_DIMENSIONS and start == 0:
        estimates, by = by_ode(tuned, base, x1, batch_size=batch_size)[None], "the ODE with its divergence"
    else:
        estimates = by_flow_matching(tuned, base, x1, generator, start=start, end=end, batch_size=batch_size)
        by = "differences of flow matching losses"
    found = regression(estimates, log_tilt, groups, strata=strata)
    return None if found is None else AchievedTilt(*found, divergence(estimates, log_tilt, groups, strata=strata), by)


def regression(
    estimates: Tensor, log_tilt: Tensor, groups: int = 1, *, strata: bool = True
) -> tuple[Estimate, Estimate | None] | None:
    """Regress log ratios on the log tilt: (slope, R^2). None if the tilt does not vary within any group.

    Args:
        estimates: independent estimates of the log ratio [k, n], one without noise or two.
        log_tilt: [n]; samples where it is infinite are left out.
        groups, strata: see `measure`. Unless they are strata, standard errors are over groups.
    """
    z, ratios = log_tilt.double().cpu(), estimates.double().cpu()
    known = (z.isfinite() & ratios.isfinite().all(0)).reshape(groups, -1)
    z, first, second = (_centred(each.reshape(groups, -1), known) for each in (z, ratios[0], ratios[-1]))
    spread = z.square().sum()
    if not float(spread) > 1e-20 * float(log_tilt[known.flatten()].double().square().sum()):
        return None
    ratio = (first + second) / 2
    slope = (z * ratio).sum() / spread
    residual, clusters = ratio - slope * z, groups > 1 and not strata
    if not clusters:
        leverage = z.square() / spread + known / known.sum(1, keepdim=True).clamp(min=1)
        residual = residual / (1 - leverage).clamp(min=1e-6)

    def error(influence: Tensor) -> float:
        """The standard error of a statistic, from the influence of each sample on it [groups, size]."""
        parts, small = (influence.sum(1), groups / (groups - 1)) if clusters else (influence.flatten(), 1.0)
        return math.sqrt(float(parts.square().sum()) * small)

    of_slope = Estimate(slope.item(), error(z * residual / spread))
    both = first * second
    common, of_common = both.sum(), error(both - both.sum() / known.sum() * known)
    if not float(common) > 2 * of_common:
        return of_slope, None
    r2 = slope.square() * spread / common
    # the derivative of log R^2 = 2 log sum z L - log sum z^2 - log sum L_1 L_2; without a slope its square has none
    influence = r2 * (z.square() / spread - both / common) + 2 * slope * z * residual / common
    return of_slope, Estimate(r2.item(), error(influence))


def divergence(estimates: Tensor, log_tilt: Tensor, groups: int = 1, *, strata: bool = True) -> Estimate:
    """Estimate the KL of the model from the target law in nats, to second order: half the variance, within groups, of the log
    ratio less the log tilt, without the noise of the estimates. Arguments as in `regression`."""
    z, ratios = log_tilt.double().cpu(), estimates.double().cpu()
    known = (z.isfinite() & ratios.isfinite().all(0)).reshape(groups, -1)
    first, second = (_centred((each - z).reshape(groups, -1), known) for each in (ratios[0], ratios[-1]))
    product = first * second
    degrees = (known.sum(1) - 1).clamp(min=1).sum()
    off = _centred(product, known)
    if groups > 1 and not strata:
        sums = product.sum(1)
        off = (sums - sums.mean()) * math.sqrt(groups / (groups - 1))
    return Estimate((product.sum() / degrees / 2).item(), (off.square().sum().sqrt() / degrees / 2).item())


def far_in_words(found: Mapping[str, Any], *, rounds: bool) -> list[str]:
    """The sentence that says how far a model is from a target law that base samples do not resemble, if it is far: by its log
    ratio, as nothing else can.

    Args:
        found: the entries of `AchievedTilt`.
        rounds: whether the method raised the inverse temperature in rounds.
    """
    kl, error = found["kl_to_target"], found["kl_to_target_error"]
    if kl is None or kl - 2 * error <= FAR:
        return []
    said = (
        "Too few base samples resemble the target law to check the model by them. By its log ratio to the base the model is"
        f" about {decimal(kl, error)} nats from that law."
    )
    why = (
        " The inverse temperature was measured from round to round, and the errors of rounds add up where the base cannot"
        " correct them: path-reweighted that begins with this method (method.first) weighs paths instead, absolutely."
    )
    return [said + why * rounds]


def _centred(values: Tensor, known: Tensor) -> Tensor:
    """Subtract from values [groups, size] the mean of those of each group that are known; the others become 0."""
    kept = torch.where(known, values, 0.0)
    mean = kept.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return torch.where(known, kept - mean, 0.0)
