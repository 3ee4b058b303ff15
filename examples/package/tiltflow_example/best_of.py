"""A method: learn the best half of each batch by flow matching. It aims at no known law, and says so."""

from collections.abc import Iterator
from typing import Literal

import torch

from tiltflow.flows.interpolant import expand
from tiltflow.laws.target import Target, exponential_tilt
from tiltflow.methods import Tilting
from tiltflow.rewards.functions.checked import evaluate
from tiltflow.samplers.grid import Start
from tiltflow.samplers.rollout import sample
from tiltflow.samplers.sampling import Sampling
from tiltflow.training.batch import Batch


class BestOf(Tilting):
    """Flow matching on the samples whose reward is above the median."""

    name: Literal["best-of"] = "best-of"
    num_inference_steps: int = 4
    """Steps from noise to data."""

    @property
    def sampling(self) -> Sampling:
        return Sampling(solver="midpoint", num_inference_steps=self.num_inference_steps)

    def target(self, steps: int, start: Start = 0.0) -> Target:
        return exponential_tilt(self.beta, ["No law is known that the best half of each batch leads to."])

    def new_state(self, *shape_seed_device: object) -> None:
        """Nothing is kept between batches."""

    def gradients(self, batch: Batch, state: None) -> Iterator[dict[str, float]]:
        x1 = sample(batch.whole(batch.tuned), batch.x, self.sampling, batch.generator, start=batch.start)
        rewards = evaluate(batch.reward, x1).detach()
        best = (rewards >= rewards.median()).nonzero()[:, 0]
        x0 = torch.randn(x1.shape, generator=batch.generator)
        t = torch.rand(len(x1), generator=batch.generator)

        def terms_of(part: slice) -> dict[str, torch.Tensor]:
            i = best[part]
            x = expand(1 - t[i], x0[i]) * x0[i] + expand(t[i], x1[i]) * x1[i]
            return {"loss": (batch.tuned.select(i)(x, t[i]) - (x1[i] - x0[i])).square().flatten(1).mean(1)}

        sums = batch.accumulate(terms_of, len(best), over=len(best))
        yield {"reward": rewards.mean().item(), "kept": float(len(best)), **sums}
