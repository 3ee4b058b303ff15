r"""The laws p_base exp(eta r) / Z(eta), and what samples of some of them say of any other by their rewards alone.

With N_j of N samples from the law at tilt eta_j, all of them together are N samples of the mixture m = sum_j (N_j / N) p_j, and

    p_eta / m = exp(eta r) / (Z(eta) M(r)),     M(r) = sum_j (N_j / N) exp(eta_j r) / Z(eta_j),

so that the weights of any law of the family need Z alone, which the samples themselves give: Z(eta) is the mean of
exp(eta r) / M(r). For the eta_j themselves this is a fixed point, that of the multistate Bennett acceptance ratio (Shirts and
Chodera, J. Chem. Phys. 129, 124105, 2008; here in one dimension). No weight of the law of batch j exceeds N / N_j.
"""

# Mutation tests: test_exponential_family.py

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 2**20
"""The parts of the way to a tilt that `next_tilt` counts in: a number of them does not depend on how sums are rounded."""
TOLERANCE, MOST_ITERATIONS = 1e-10, 1000


@dataclass(frozen=True)
class Pooled:
    """Samples of several laws of the family, all float64 on the CPU.

    Args:
        rewards: [n].
        log_mixture: log M(r) of each [n], up to a constant.
    """

    rewards: Tensor
    log_mixture: Tensor

    @classmethod
    def of(cls, rewards: Tensor, tilts: Tensor) -> Pooled:
        """The samples with these rewards [n], each of the law at its tilt [n]."""
        r, tilts = rewards.double().cpu(), tilts.double().cpu()
        levels, counts = torch.unique(tilts, return_counts=True)
        log_share = counts.double().log().log_softmax(0)  # log N_j / N
        exponents, log_z = levels * r[:, None], torch.zeros_like(levels)
        for _ in range(MOST_ITERATIONS):
            log_mixture = torch.logsumexp(exponents + log_share - log_z, 1)
            before, log_z = log_z, torch.logsumexp(exponents - log_mixture[:, None], 0)
            log_z = log_z - log_z[0]
            if torch.allclose(log_z, before, rtol=0, atol=TOLERANCE):
                break
        return cls(r, log_mixture)

    def weights(self, tilt: float) -> Tensor:
        """p_eta / m of each sample [n], of mean 1: exactly 1 where all rewards are equal."""
        logs = tilt * self.rewards - self.log_mixture
        weights = (logs - logs.max()).exp()
        return weights / weights.mean()

    def log_partition(self, tilt: float) -> float:
        """log Z(eta), up to the same constant for every eta."""
        return float(torch.logsumexp(tilt * self.rewards - self.log_mixture, 0))

    def mean(self, tilt: float) -> float:
        """E[r] under the law at this tilt: it never falls as the tilt rises."""
        return float((self.weights(tilt) * self.rewards).mean())

    def within(self, rewards: Tensor) -> Tensor:
        """Other rewards [n] no farther out than these samples': a single one that is, of a sample that went astray, would
        decide a mean, and these samples cannot tell what it says of the law."""
        return rewards.double().cpu().clamp(self.rewards.min(), self.rewards.max())

    def divergence(self, tilt: float) -> float:
        """KL(p_eta | p_base) = eta E_eta[r] - log Z(eta) / Z(0), in nats."""
        return tilt * self.mean(tilt) - self.log_partition(tilt) + self.log_partition(0.0)


def effective_share(weights: Tensor) -> float:
    """Effective sample size of weights [n] over their number: (sum w)^2 / (n sum w^2)."""
    w = weights.double()
    return float(w.sum().square() / (len(w) * w.square().sum()))


def next_tilt(rewards: Sequence[Tensor], tilt: float, wanted: float, share: float) -> float:
    """The tilt nearest to `wanted` for which samples of the law at `tilt` still have this effective share, when they are
    weighted by exp(h r), h the difference; found by bisection of the way there in `STEPS` parts.

    Args:
        rewards: those of each group [n], float64; weights are normalised within it.
        share: in [0, 1].

    Raises ValueError if the first part is too far already.
    """

    def keeps(part: int) -> bool:
        logs = [(wanted - tilt) * part / STEPS * r for r in rewards]
        return effective_share(torch.cat([torch.softmax(each, 0) * len(each) for each in logs])) >= share

    if wanted == tilt or keeps(STEPS):
        return wanted
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    if low == 0:
        raise ValueError(f"the rewards spread too far: a tilt of {(wanted - tilt) / STEPS:.2g} more leaves less than {share:g}")
    return tilt + (wanted - tilt) * low / STEPS


def tilt_of(samples: Sequence[tuple[Pooled, float]], near: float) -> float:
    """The tilt at which the mean rewards of samples are what they are: where they come short of one that they were meant to
    have, the law nearest to theirs in the family.

    Args:
        samples: of each group, earlier ones, whose tilts are known, and the mean reward of those in question.
        near: the tilt that was meant; the one found is between half and one and a half times that.
    """
    low, high = sorted((near / 2, near * 1.5))
    for _ in range(40):
        middle = (low + high) / 2
        short = sum(family.mean(middle) - mean for family, mean in samples) < 0
        low, high = (middle, high) if short else (low, middle)
    return (low + high) / 2
