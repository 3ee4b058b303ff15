r"""AWM: advantage-weighted flow matching with a penalty on leaving the base (arXiv 2509.25050).

    loss = A |v - u|^2 + beta |v - v_base|^2,      A = r - mean r, at least -0.9 beta,

on samples of the model that are noised afresh. Its gradient is that of `ram` times beta, and so its law is that of `ram`.
As published the first term is a ratio as of PPO, which is this before the first update, and a second penalty is on leaving an
average of the weights.
"""

# Mutation tests: test_advantage_regressions.py

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tiltflow.methods.regressions.advantage_regression import AdvantageRegression


class Awm(AdvantageRegression):
    """AWM. Any reward, no gradient; aims at p_base(x) exp(r(x) / beta), to first order in 1 / beta."""

    name: Literal["awm"] = "awm"
    num_inference_steps: Annotated[int, Field(ge=2)] = 14
    """Steps of the solver, from noise to data."""
    num_passes: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps on each batch, each with fresh noise and times."""

    @property
    def optimizer_defaults(self) -> Mapping[str, Any]:
        """The published one."""
        return {"learning_rate": 3e-4}

    @property
    def _residual(self) -> Literal["network", "anchor"]:
        return "network"
