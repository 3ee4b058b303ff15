"""How near a method with a law of its own is to that law: the pull of the reward over the penalty."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "own_law_balance",
        "Balance",
        "Pull of the reward over the penalty: 1 at the law at which the rounds settle. Above: on its way. Below: noise.",
        section=Section.CLOSE,
    ),
    Metric(
        "own_law_balance_expected",
        "Balance, expected",
        "Of so many rounds, each fitted perfectly, to first order.",
        section=Section.CLOSE,
    ),
)

measure = nothing
