r"""Optimal design: a law whose samples say as much as they can of the coefficients of their features."""

# Mutation tests: test_utilities.py

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.evaluation.features import FUNCTION
from tiltflow.models.model_folder import load_classifier
from tiltflow.plugins import import_function
from tiltflow.settings import External
from tiltflow.user_code import explained
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_samples
from tiltflow.utilities.estimation.known import Known

BATCH = 512
"""Samples whose features are computed at once."""
Criterion = Literal["log-determinant", "trace", "eigenvalue"]
PRECISION = 1e-9
"""Of `one_shot`: how far below its maximum the objective may be, in units of alpha."""


class OptimalDesign(Utility):
    """With M = E f f^T + ridge I for features f: log det M (D-optimal), -tr M^-1 (A-optimal) or the smallest eigenvalue of M
    (E-optimal). Their first variations are f^T M^-1 f, f^T M^-2 f and (v.f)^2 with the eigenvector v of that eigenvalue; where
    several are equal it is one of many slopes."""

    name: Literal["optimal-design"] = "optimal-design"
    criterion: Criterion = "log-determinant"
    """What is made large: `log-determinant`, `trace` for minus the trace of the inverse, or `eigenvalue`, the smallest."""
    ridge: Annotated[float, Field(ge=0)] = 1e-3
    """Added to the diagonal of M."""
    features: Annotated[str, External(but=("samples",))] = "samples"
    """`samples`, their numbers as they are; a classifier, by the name that ships with tiltflow or its folder, for the features
    below its last layer; or your function `package.module:function`, x [batch, *event] -> [batch, features]."""

    @property
    def words(self) -> str:
        return f"samples that are informative of linear models: a high {self.criterion}"

    @property
    def features_of(self) -> Callable[[Tensor], Tensor]:
        """x [batch, *event] -> [batch, features]."""
        if self.features == "samples":
            return lambda x: x.flatten(1)
        if FUNCTION.fullmatch(self.features):
            function = import_function(self.features, "features")
        else:
            network: Any = load_classifier(self.features)[0]
            dtype = next(network.parameters()).dtype

            def function(x: Tensor) -> Tensor:
                found: Tensor = network.to(x.device).features(x.to(dtype))
                return found

        def features(x: Tensor) -> Tensor:
            with explained("features"):
                found: Any = function(x)
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(x):
                raise InputError(f"features {self.features} must return a tensor [{len(x)}, features]")
            return found

        return features

    @torch.no_grad()
    def _of_samples(self, at: Known) -> Tensor:
        """The features [n, k] of the samples."""
        features = self.features_of
        return torch.cat([features(part).double() for part in at.x.split(BATCH)])

    def _information(self, f: Tensor, p: Tensor) -> Tensor:
        """M [k, k], of features [n, k] of samples with these probabilities [n]."""
        m = f.T @ (p[:, None] * f)
        m.diagonal().add_(self.ridge)
        return m

    def _known_information(self, f: Tensor, p: Tensor) -> Tensor:
        """The same; raises InputError if it has no inverse."""
        if not regular(m := self._information(f, p)):
            raise InputError("utility optimal-design: the features are linearly dependent: give a larger ridge")
        return m

    def _of(self, m: Tensor) -> Tensor:
        """The utility, of M."""
        value: Tensor
        if self.criterion == "log-determinant":
            value = torch.logdet(m)
        else:
            value = torch.linalg.eigvalsh(m)[0] if self.criterion == "eigenvalue" else -torch.linalg.inv(m).trace()
        return value

    def _form(self, m: Tensor) -> Tensor:
        """W of the first variation f^T W f: [k, k]."""
        if self.criterion == "eigenvalue":
            lowest = torch.linalg.eigh(m)[1][:, 0]
            return torch.outer(lowest, lowest)
        inverse: Tensor = torch.linalg.inv(m)
        return inverse if self.criterion == "log-determinant" else inverse @ inverse

    def _value(self, at: Known) -> Estimate:
        f = self._of_samples(at)
        m = self._known_information(f, at.p)
        return at.estimate(self._of(m), quadratic(f, self._form(m)))

    def _first_variation(self, at: Known) -> FirstVariation:
        return self._at(self._known_information(self._of_samples(at), at.p))

    def _at(self, m: Tensor) -> FirstVariation:
        return of_samples(QuadraticForm(self.features_of, self._form(m)))

    def one_shot(self, base: Known, alpha: float) -> FirstVariation:
        """The reward whose tilt of the base at the temperature alpha maximises this utility less alpha KL, in one stage: the
        first variation at M of that law, which is found on samples of the base.

        Mirror ascent on their weights: log p moves by a share s of the way to log p_base + g / alpha, g the first variation at
        p, and s is halved where the objective would fall. It is concave, so that alpha KL(p | p_base exp(g / alpha)) bounds
        what is missing of its maximum.

        Raises InputError for the smallest eigenvalue, which has no slope where it is best, and where the optimum rests on fewer
        than two samples for each feature.
        """
        if self.criterion == "eigenvalue":
            raise InputError("utility optimal-design: the smallest eigenvalue has no one reward of one stage; take stages")
        f, logs, share = self._of_samples(base), torch.zeros_like(base.p), 1.0
        p, m = base.p, self._known_information(f, base.p)
        height = float(self._of(m)) / alpha
        while share > PRECISION:
            aim = quadratic(f, self._form(m)) / alpha
            if kl(p, torch.softmax(aim + base.p.log(), 0)) < PRECISION:
                break
            moved = logs + share * (aim - logs)
            there = torch.softmax(moved + base.p.log(), 0)
            information = self._information(f, there)
            reached = float(self._of(information)) / alpha - float(kl(there, base.p)) if regular(information) else -math.inf
            if reached < height:
                share /= 2
                continue
            logs, p, m, height = moved, there, information, reached
        if (effective := 1 / float(p.square().sum())) < 2 * f.shape[1]:
            raise InputError(
                f"utility optimal-design: the best law at the temperature {alpha:g} rests on {effective:.0f} of {len(p)}"
                f" samples, and there are {f.shape[1]} features: raise the temperature, or draw more samples"
            )
        return self._at(m)


def regular(m: Tensor) -> bool:
    """Whether M has an inverse, as far as double precision can tell."""
    return bool(torch.linalg.eigvalsh(m)[0] > 1e-12 * m.diagonal().max())


def quadratic(f: Tensor, form: Tensor) -> Tensor:
    """f^T W f [n], of features [n, k]."""
    value: Tensor = ((f @ form) * f).sum(1)
    return value


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p | q) of probabilities [n]."""
    value: Tensor = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()
    return value


@dataclass(frozen=True)
class QuadraticForm:
    """f^T W f for the features f of samples."""

    features: Callable[[Tensor], Tensor]
    form: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        f = self.features(x)
        return quadratic(f, self.form.to(f))
