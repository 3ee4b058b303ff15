"""Importance resampling: samples of the base, chosen with weights exp(r / beta) (Rubin 1987)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from tiltflow.laws.other_laws import importance_resampled
from tiltflow.settings import Settings
from tiltflow.steering import Chosen, SteeredLaw
from tiltflow.steering.drawing.resampling import effective_sample_size, systematic, without_replacement
from tiltflow.steering.drawing.source import Source


class ImportanceResampling(Settings):
    """Samples chosen among many by weights exp(r / beta): the tilt as their number grows."""

    name: Literal["importance-resampling"] = "importance-resampling"
    beta: Annotated[float, Field(gt=0)] = 1.0
    """Temperature, in units of reward."""
    n: Annotated[int, Field(ge=2)] = 16
    """Candidates for each sample; the samples of a condition are chosen from all of theirs together."""
    replacement: bool = True
    """Whether a candidate can be chosen more than once. Without, all samples differ, and their law is nearer to the base."""

    def law(self, num_samples: int) -> SteeredLaw:
        """With replacement, that of one of N = n num_samples by its weight: p_base E[N w / (w + the others')], O(1 / N) from
        the tilt."""
        beta, of = self.beta, self.n * num_samples
        if not self.replacement:
            words = f"between p_base(x) and p_base(x) exp(r(x) / beta): {num_samples} of {of} by their weights, all different"
            return SteeredLaw(words, beta)
        words = f"p_base(x) exp(r(x) / beta) up to O(1 / {of}): one of {of} by its weight"
        return SteeredLaw(words, beta, exact=lambda base, reward: importance_resampled(base, reward, beta, of))

    def check(self, source: Source) -> None:
        """Any model and any reward will do."""

    def draw(self, source: Source, num_samples: int) -> Chosen:
        """Draw all candidates, and choose."""
        x, rewards = source.independent(self.n * num_samples)
        log_weights = (rewards / self.beta)[None]
        choose = systematic if self.replacement else without_replacement
        (kept,) = choose(log_weights, num_samples, source.generator("choice"))
        normaliser = log_weights.logsumexp(1).item() - math.log(len(x))
        return Chosen(x[kept], rewards[kept], len(x), effective_sample_size(log_weights).item(), normaliser)
