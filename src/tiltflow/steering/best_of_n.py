"""The best of n: of n samples the one with the largest reward."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from tiltflow.laws.other_laws import best_of
from tiltflow.settings import Settings
from tiltflow.steering import Chosen, SteeredLaw
from tiltflow.steering.drawing.source import Source


class BestOfN(Settings):
    """The best of n samples: the largest mean reward that choosing among n gives, and no tilt."""

    name: Literal["best-of-n"] = "best-of-n"
    n: Annotated[int, Field(ge=2)] = 4
    """Samples that each is chosen from."""

    def law(self, num_samples: int) -> SteeredLaw:
        """n F(r)^(n - 1) p_base, F the distribution function of the reward: its KL from the base is log n - (n - 1) / n where
        no two rewards are equal, and less where some are."""
        n = self.n
        most = math.log(n) - (n - 1) / n
        words = (
            f"p_base(x) {n} F(r(x))^{n - 1}, F the distribution function of the reward: at most {most:.3f} nats from the base,"
            " and no tilt"
        )
        return SteeredLaw(words, exact=lambda base, reward: best_of(base, reward, n))

    def check(self, source: Source) -> None:
        """Any model and any reward will do."""

    def draw(self, source: Source, num_samples: int) -> Chosen:
        """Draw n samples for each, and keep the first of those with the largest reward: independent samples."""
        x, rewards = source.independent(self.n * num_samples)
        best = rewards.reshape(num_samples, self.n).argmax(1)
        kept = best + self.n * best.new_tensor(range(num_samples))
        return Chosen(x[kept], rewards[kept], len(x), float(num_samples))
