r"""RAM: regression on advantages around the base, on samples of the model that are noised afresh (arXiv 2605.10759).

    d = v_base - v + c (u - v),      c = (r - mean r) / beta, at least -0.9.

As published the residual has v as it was when the samples were drawn, an average of weights; where that settles it is v, and so
is the law. Without the clip it has a pole at c = -1 given x_t, and no law where some samples are that bad. The path-cost
correction, which the paper drops from its main loss, is not here.
"""

# Mutation tests: test_advantage_regressions.py

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tiltflow.methods.regressions.advantage_regression import AdvantageRegression


class Ram(AdvantageRegression):
    """RAM. Any reward, no gradient; aims at p_base(x) exp(r(x) / beta), to first order in 1 / beta."""

    name: Literal["ram"] = "ram"
    num_passes: Annotated[int, Field(ge=1)] = 8
    """Optimizer steps on each batch, each with fresh noise and times."""

    @property
    def _residual(self) -> Literal["network", "anchor"]:
        return "network"
