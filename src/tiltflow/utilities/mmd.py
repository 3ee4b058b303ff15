"""Minus the squared maximum mean discrepancy from a reference: near it in the means of smooth functions."""

# Mutation tests: test_utilities.py

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_samples
from tiltflow.utilities.estimation.known import Known, Need, spread_of_mean


class Mmd(Utility):
    """-MMD^2(p, reference) = -(E k(x, x') - 2 E k(x, y) + E k(y, y')), estimated without bias. Its first variation is
    -2 (E_p k(x, .) - E_ref k(x, .))."""

    words: ClassVar[str] = "a law near the reference, by the means of smooth functions"
    needs: ClassVar[tuple[Need, ...]] = ("reference",)

    name: Literal["mmd"] = "mmd"
    kernel: Literal["gaussian", "energy"] = "gaussian"
    """gaussian: exp(-|x - y|^2 / (2 h^2)). energy: -|x - y|, whose MMD^2 is the energy distance; it has no bandwidth."""
    bandwidth: Annotated[float, Field(gt=0)] | None = None
    """h of the Gaussian kernel; the median distance between samples of the reference where it is left out."""

    def _witness(self, at: Known) -> Witness:
        y = at.reference
        assert y is not None
        y = y.flatten(1).double()
        if self.kernel == "energy":
            return Witness(at.x.flatten(1).double(), at.p, y, None)
        bandwidth = self.bandwidth or float(torch.pdist(y).median())
        if bandwidth == 0:
            raise InputError("utility mmd: half of the samples of the reference are equal: give a bandwidth")
        return Witness(at.x.flatten(1).double(), at.p, y, bandwidth)

    def _value(self, at: Known) -> Estimate:
        witness = self._witness(at)
        p, q = at.p, torch.full_like(witness.y[:, 0], 1 / len(witness.y))
        ours, theirs = (
            # without the terms of a sample with itself
            (w @ (k - k.diagonal().diag()) @ w) / (1 - (w**2).sum())
            for w, k in ((p, witness.kernel(witness.x, witness.x)), (q, witness.kernel(witness.y, witness.y)))
        )
        both = p @ witness.kernel(witness.x, witness.y) @ q
        return at.estimate(2 * both - ours - theirs, 2 * witness(at.x), spread_of_mean(2 * witness(witness.y)))

    def _first_variation(self, at: Known) -> FirstVariation:
        return of_samples(self._witness(at)) * -2


@dataclass(frozen=True)
class Witness:
    """E_p k(x, .) - E_ref k(x, .), for samples x [n, d] with probabilities p [n] and y [m, d]; without a bandwidth k is minus
    the distance."""

    x: Tensor
    p: Tensor
    y: Tensor
    bandwidth: float | None

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return -distances if self.bandwidth is None else (-(distances**2) / (2 * self.bandwidth**2)).exp()

    def __call__(self, x: Tensor) -> Tensor:
        z = x.flatten(1).double()
        return (self.kernel(z, self.x) @ self.p - self.kernel(z, self.y).mean(1)).to(x.dtype)
