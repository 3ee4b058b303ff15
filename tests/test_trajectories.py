"""How many copies of steps x batch x latents are alive at the peak of an iteration: with a network that needs no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiltflow.flows.flow import Flow
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.deterministic_adjoint_matching import DeterministicAdjointMatching
from tiltflow.methods.path_reweighted import PathReweighted
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.streams import stream
from tiltflow.training.batch import Batch
from tiltflow.training.memory import PeakMemory

STEPS, SIZE, LATENTS = 40, 8, 500
SLACK = 0.2
"""For what is of a few steps alone."""
CRITIC = {
    "network": {"name": "mlp", "dimension": LATENTS, "outputs": 1, "hidden": 1, "layers": 1},
    "num_steps": 1,
    "train_batch_size": 1,
}
METHODS: dict[str, Any] = {
    "adjoint-matching": AdjointMatching(num_inference_steps=STEPS),
    "bootstrap": AdjointMatching(num_inference_steps=STEPS, bootstrap=1.0, num_passes=2),
    "official-code": AdjointMatching(preset="official-code", num_inference_steps=STEPS),
    "paper": AdjointMatching(preset="paper", num_inference_steps=STEPS),
    "late": AdjointMatching(num_inference_steps=STEPS, control_from=0.5),
    "reweight": AdjointMatching(num_inference_steps=STEPS, num_passes=2, reweight_passes=True),
    "control-variate": AdjointMatching(num_inference_steps=STEPS, control_variate=True),
    "deterministic": DeterministicAdjointMatching(num_inference_steps=STEPS),
    "score-as-action": ScoreAsAction(num_inference_steps=STEPS, critic=CRITIC),
    "ddpo": ScoreAsAction(preset="ddpo", num_inference_steps=STEPS),
    "pathwise": ScoreAsAction(estimator="pathwise", num_inference_steps=STEPS, critic=CRITIC),
    "closed-form": ScoreAsAction(solver="euler", num_inference_steps=STEPS, critic=CRITIC),
    "path-reweighted": PathReweighted(
        num_inference_steps=STEPS, path_steps=STEPS, num_passes=2, beta=1e6, min_effective_sample_size=1
    ),
}
FEW = {"adjoint-matching", "bootstrap", "official-code", "paper", "path-reweighted"}
"""Those with three copies at most."""


class Multiple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), -0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * x


@pytest.mark.parametrize(
    ("name", "micro_batch_size"), [*((name, None) for name in METHODS), ("adjoint-matching", 2), ("score-as-action", 2)]
)
def test_copies_of_the_trajectories(name: str, micro_batch_size: int | None) -> None:
    method, tuned, base = METHODS[name], Flow(Multiple()), Flow(Multiple().requires_grad_(False))
    x, parameters = torch.randn(SIZE, LATENTS, generator=stream(0)), tuple(tuned.parameters())
    batch = Batch(
        x,
        tuned,
        base,
        lambda x: -x.square().mean(1),
        stream(1),
        micro_batch_size=micro_batch_size,
        parameters=parameters,
    )
    with PeakMemory() as memory:
        for _ in method.gradients(batch, method.new_state((LATENTS,), 0, x.device)):
            pass
    copies = memory.peak / (STEPS * x.nbytes)
    assert copies <= method.needs.trajectory_copies + SLACK
    assert name not in FEW or copies <= 3 + SLACK
