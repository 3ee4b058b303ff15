r"""ADRPO: advantages and a penalty that adapts to them (arXiv 2510.18053).

    loss = A |v - u|^2 + (beta - A) |v - v_base|^2,      A = r - mean r,

on samples of the model that are noised afresh: beta times d = v_base - v + (A / beta) (u - v_base). The advantages cancel in
what is quadratic in v, so the regression is convex whatever they are.
"""

# Mutation tests: test_advantage_regressions.py

from __future__ import annotations

from typing import Literal

from tiltflow.methods.regressions.advantage_regression import AdvantageRegression


class Adrpo(AdvantageRegression):
    """ADRPO. Any reward, no gradient; aims at p_base(x) exp(r(x) / beta), to first order in 1 / beta."""

    name: Literal["adrpo"] = "adrpo"

    @property
    def _residual(self) -> Literal["network", "anchor"]:
        return "anchor"
