r"""Optimal design: a law whose samples say as much as they can of the coefficients of their features."""

# Mutation tests: test_utilities.py

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.plugins import import_function
from tiltflow.settings import FunctionOrName
from tiltflow.user_code import explained
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_samples
from tiltflow.utilities.estimation.known import Known

Criterion = Literal["log-determinant", "trace", "eigenvalue"]


class OptimalDesign(Utility):
    """With M = E f f^T + ridge I for features f: log det M (D-optimal), -tr M^-1 (A-optimal) or the smallest eigenvalue of M
    (E-optimal). Their first variations are f^T M^-1 f, f^T M^-2 f and (v.f)^2 with the eigenvector v of that eigenvalue; where
    several are equal it is one of many slopes."""

    name: Literal["optimal-design"] = "optimal-design"
    criterion: Criterion = "log-determinant"
    """What is made large: `log-determinant`, `trace` for minus the trace of the inverse, or `eigenvalue`, the smallest."""
    ridge: Annotated[float, Field(ge=0)] = 1e-3
    """Added to the diagonal of M."""
    features: FunctionOrName = "samples"
    """`samples`, their numbers as they are, or your function `package.module:function`, x [batch, *event] -> [batch,
    features]."""

    @property
    def words(self) -> str:
        return f"samples that are informative of linear models: a high {self.criterion}"

    @property
    def features_of(self) -> Callable[[Tensor], Tensor]:
        """x [batch, *event] -> [batch, features]."""
        if self.features == "samples":
            return lambda x: x.flatten(1)
        function = import_function(self.features, "features")

        def features(x: Tensor) -> Tensor:
            with explained("features"):
                found: Any = function(x)
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(x):
                raise InputError(f"features {self.features} must return a tensor [{len(x)}, features]")
            return found

        return features

    def _information(self, at: Known) -> tuple[Tensor, Tensor]:
        """The features [n, k] of the samples, and M [k, k]."""
        with torch.no_grad():
            f = self.features_of(at.x).double()
        m = f.T @ (at.p[:, None] * f)
        m.diagonal().add_(self.ridge)
        if not torch.linalg.eigvalsh(m)[0] > 1e-12 * m.diagonal().max():
            raise InputError("utility optimal-design: the features are linearly dependent: give a larger ridge")
        return f, m

    def _form(self, m: Tensor) -> Tensor:
        """W of the first variation f^T W f: [k, k]."""
        if self.criterion == "eigenvalue":
            lowest = torch.linalg.eigh(m)[1][:, 0]
            return torch.outer(lowest, lowest)
        inverse: Tensor = torch.linalg.inv(m)
        return inverse if self.criterion == "log-determinant" else inverse @ inverse

    def _value(self, at: Known) -> Estimate:
        f, m = self._information(at)
        if self.criterion == "log-determinant":
            value = torch.logdet(m)
        else:
            value = torch.linalg.eigvalsh(m)[0] if self.criterion == "eigenvalue" else -torch.linalg.inv(m).trace()
        return at.estimate(value, torch.einsum("ni,ij,nj->n", f, self._form(m), f))

    def _first_variation(self, at: Known) -> FirstVariation:
        return of_samples(QuadraticForm(self.features_of, self._form(self._information(at)[1])))


@dataclass(frozen=True)
class QuadraticForm:
    """f^T W f for the features f of samples."""

    features: Callable[[Tensor], Tensor]
    form: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        f = self.features(x)
        value: Tensor = torch.einsum("ni,ij,nj->n", f, self.form.to(f), f)
        return value
