"""How many copies of steps x batch x latents are alive at the peak of an iteration: with a network that needs no memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiltflow.flows.flow import Flow
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.deterministic_adjoint_matching import DeterministicAdjointMatching
from tiltflow.methods.endpoint_adjoint_matching import EndpointAdjointMatching
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.path_reweighted import PathReweighted
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.methods.tilt_matching import TiltMatching
from tiltflow.streams import stream
from tiltflow.training.batch import Batch
from tiltflow.training.memory import PeakMemory

STEPS, SIZE, LATENTS = 40, 8, 500
SLACK = 0.2
"""For what is of a few steps alone."""
CRITIC = {
    "network": {"name": "mlp", "dimension": LATENTS, "outputs": 1, "hidden": 1, "layers": 1},
    "num_steps": 0,
}
"""It is not trained: its own activations are no copies of trajectories."""
METHODS: dict[str, Any] = {
    "adjoint-matching": AdjointMatching(num_inference_steps=STEPS),
    "bootstrap": AdjointMatching(num_inference_steps=STEPS, bootstrap=1.0, num_passes=2),
    "official-code": AdjointMatching(preset="official-code", num_inference_steps=STEPS),
    "paper": AdjointMatching(preset="paper", num_inference_steps=STEPS),
    "late": AdjointMatching(num_inference_steps=STEPS, control_from=0.5),
    "reweight": AdjointMatching(num_inference_steps=STEPS, num_passes=2, reweight_passes=True),
    "control-variate": AdjointMatching(num_inference_steps=STEPS, control_variate=True),
    "deterministic": DeterministicAdjointMatching(num_inference_steps=STEPS),
    "endpoint": EndpointAdjointMatching(num_inference_steps=STEPS, num_passes=1),
    "orw-cfm-w2": OrwCfmW2(num_inference_steps=STEPS),
    "tilt-matching": TiltMatching(num_inference_steps=STEPS, num_passes=1),
    "score-as-action": ScoreAsAction(num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "ddpo": ScoreAsAction(preset="ddpo", num_inference_steps=STEPS, num_passes=1),
    "clip": ScoreAsAction(update="clip", num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "dxmi": ScoreAsAction(preset="dxmi", num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "pathwise": ScoreAsAction(estimator="pathwise", num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "closed-form": ScoreAsAction(solver="euler", num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "path-reweighted": PathReweighted(
        num_inference_steps=STEPS, path_steps=STEPS, num_passes=2, beta=1e6, min_effective_sample_size=1
    ),
}
MORE = {"late", "reweight", "control-variate", "pathwise", "closed-form"}
"""Those with four copies; all others have three at most."""


class Multiple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), -0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * x


def copies_of(method: Any, non_finite: Any = "error") -> float:
    """Copies of the trajectories at the peak of an iteration. Score as Action's loss needs ten tensors of a micro-batch."""
    micro_batch_size = SIZE // 2 if isinstance(method, ScoreAsAction) else None
    tuned, base = Flow(Multiple()), Flow(Multiple().requires_grad_(False))
    x, parameters = torch.randn(SIZE, LATENTS, generator=stream(0)), tuple(tuned.parameters())

    def reward(x: Tensor) -> Tensor:
        values = -x.square().mean(1)
        worst = (values.detach() == values.detach().min()) & (non_finite == "drop")
        return torch.where(worst, torch.nan, values)

    batch = Batch(
        x,
        tuned,
        base,
        reward,
        stream(1),
        micro_batch_size=micro_batch_size,
        non_finite=non_finite,
        parameters=parameters,
    )
    with PeakMemory() as memory:
        for _ in method.gradients(batch, method.new_state((LATENTS,), 0, x.device)):
            pass
    return memory.peak / (STEPS * x.nbytes)


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_the_trajectories(name: str) -> None:
    method = METHODS[name]
    assert copies_of(method) <= method.needs.trajectory_copies + SLACK
    assert method.needs.trajectory_copies <= 3 + (name in MORE)


@pytest.mark.parametrize("name", ["adjoint-matching", "deterministic", "score-as-action"])
def test_samples_are_left_out_in_place(name: str) -> None:
    method = METHODS[name]
    assert copies_of(method, "drop") <= method.needs.trajectory_copies + SLACK
