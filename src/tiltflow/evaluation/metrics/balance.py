"""Balance of a method with a limit law of its own: ratio of the reward's pull to the penalty."""

from __future__ import annotations

from tiltflow.evaluation.metrics import Metric, Section, nothing

METRICS = (
    Metric(
        "own_law_balance",
        "Balance",
        "Ratio of the reward's pull to the penalty: 1 at the rounds' limit law, above before convergence, below by noise.",
        section=Section.CLOSE,
    ),
    Metric(
        "own_law_balance_expected",
        "Balance, expected",
        "Balance after this number of rounds with perfect fits, to first order.",
        section=Section.CLOSE,
    ),
)

measure = nothing
