r"""The conditional laws pushed apart: how much a sample says of the condition that it was drawn for."""

# Mutation tests: test_utilities.py

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from tiltflow.errors import InputError
from tiltflow.evaluation.estimates import Estimate
from tiltflow.rewards.functions.prompted import OfPrompts
from tiltflow.utilities import Utility
from tiltflow.utilities.estimation.first_variation import FirstVariation, of_samples
from tiltflow.utilities.estimation.known import Known, Need, OfSamples


class SpreadConditions(Utility):
    """The mean over conditions z of KL(p_z | p), p the mixture of all: the mutual information of sample and condition, in nats,
    at most the log of the number of conditions. Its first variation for a sample of z is log p_z / p, with the gradient s_z -
    s.

    It is made of the log densities of the conditional laws, or of anything that differs from them by the same number for all
    conditions, such as the log odds of a classifier less those of the labels. Each condition keeps its share.
    """

    words: ClassVar[str] = "conditions whose samples can be told apart"
    needs: ClassVar[tuple[Need, ...]] = ("log_odds", "labels")
    concave: ClassVar[bool] = False

    name: Literal["spread-conditions"] = "spread-conditions"

    def _log_shares(self, at: Known) -> Tensor:
        """The log of the share of each condition: [conditions]."""
        assert at.labels is not None
        assert at.log_odds is not None
        conditions = at.log_odds(at.x[:1]).shape[1]
        if int(at.labels.min()) < 0 or int(at.labels.max()) >= conditions:
            raise InputError(f"utility spread-conditions: labels must be 0 to {conditions - 1}, the conditions of log_odds")
        return at.p.new_zeros(conditions).index_add(0, at.labels, at.p).log()

    def _value(self, at: Known) -> Estimate:
        assert at.labels is not None
        assert at.log_odds is not None
        with torch.no_grad():
            values = information(at.log_odds, self._log_shares(at), at.x, at.labels)
        return at.estimate(at.mean(values), values)

    def _first_variation(self, at: Known) -> FirstVariation:
        log_odds, log_shares = at.log_odds, self._log_shares(at)
        assert log_odds is not None
        return of_samples(OfPrompts(lambda x, labels: information(log_odds, log_shares, x, labels), ("labels",)))


def information(log_odds: OfSamples, log_shares: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """log p_z(x) / p(x) of samples x [batch, *event] of the conditions z [batch]."""
    logs = log_odds(x)
    return logs.gather(1, labels[:, None])[:, 0] - torch.logsumexp(logs + log_shares.to(logs), 1)
