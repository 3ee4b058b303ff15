"""How many copies of steps x batch x latents are alive at the peak of an iteration, with a network that needs no memory; and
what storing them elsewhere, or in 16 bits, does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiltflow
from tiltflow.errors import InputError
from tiltflow.flows.flow import Flow
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.deterministic_adjoint_matching import DeterministicAdjointMatching
from tiltflow.methods.draft import Draft
from tiltflow.methods.dxmi import Dxmi
from tiltflow.methods.endpoint_adjoint_matching import EndpointAdjointMatching
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.path_reweighted import PathReweighted
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.methods.tilt_matching import TiltMatching
from tiltflow.methods.vgg_flow import VggFlow
from tiltflow.samplers.stored import AS_COMPUTED, Storage
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
    "later": AdjointMatching(num_inference_steps=STEPS, control_from=0.9, control_variate=True),
    "reweight": AdjointMatching(num_inference_steps=STEPS, num_passes=2, reweight_passes=True),
    "control-variate": AdjointMatching(num_inference_steps=STEPS, control_variate=True),
    "deterministic": DeterministicAdjointMatching(num_inference_steps=STEPS),
    "vgg-flow": VggFlow(num_inference_steps=STEPS, network={"name": "mlp", "dimension": LATENTS, "hidden": 1, "layers": 1}),
    "draft": Draft(num_inference_steps=STEPS, truncation=None),
    "endpoint": EndpointAdjointMatching(num_inference_steps=STEPS, num_passes=1),
    "orw-cfm-w2": OrwCfmW2(num_inference_steps=STEPS),
    "tilt-matching": TiltMatching(num_inference_steps=STEPS, num_passes=1),
    "score-as-action": ScoreAsAction(num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "ddpo": ScoreAsAction(preset="ddpo", num_inference_steps=STEPS, num_passes=1),
    "clip": ScoreAsAction(update="clip", num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "dxmi": Dxmi(num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "pathwise": ScoreAsAction(estimator="pathwise", num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "closed-form": ScoreAsAction(solver="euler", num_inference_steps=STEPS, critic=CRITIC, num_passes=1),
    "path-reweighted": PathReweighted(
        num_inference_steps=STEPS, path_steps=STEPS, num_passes=2, beta=1e6, min_effective_sample_size=1
    ),
}


class Multiple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((LATENTS,), -0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * x


def run(method: Any, non_finite: Any = "error", storage: Storage = AS_COMPUTED) -> tuple[float, Tensor]:
    """Copies of the trajectories at the peak of an iteration, and its gradient. The losses of Score as Action, DxMI, VGG-Flow
    and self-distillation need ten tensors of a micro-batch, and what is stored in 16 bits is computed in 32."""
    many = isinstance(method, ScoreAsAction | Dxmi | VggFlow) or getattr(method, "control_from", 0) > 0
    micro_batch_size = SIZE // 2 if many or storage.dtype else None
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
        storage=storage,
    )
    with PeakMemory() as memory:
        for _ in method.gradients(batch, method.new_state((LATENTS,), 0, x.device)):
            pass
    (gradient,) = (p.grad for p in parameters)
    assert gradient is not None
    return memory.peak / (STEPS * x.nbytes), gradient


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_the_trajectories(name: str) -> None:
    method = METHODS[name]
    assert run(method)[0] <= method.needs.trajectory_copies + SLACK
    assert method.needs.trajectory_copies <= 3


@pytest.mark.parametrize("name", ["adjoint-matching", "late", "deterministic", "draft", "score-as-action", "closed-form"])
def test_samples_are_left_out_in_place(name: str) -> None:
    method = METHODS[name]
    assert run(method, "drop")[0] <= method.needs.trajectory_copies + SLACK


@pytest.mark.parametrize("name", ["adjoint-matching", "deterministic"])
def test_in_16_bits_they_take_half_the_memory_and_round_the_gradient(name: str) -> None:
    """In proportion to the rounding of a number: bfloat16 has three bits less than float16."""
    method, errors = METHODS[name].at_temperature(0.01), []
    exact = run(method)[1]
    for dtype in (torch.bfloat16, torch.float16):
        copies, gradient = run(method, storage=Storage(dtype))
        assert copies <= method.needs.trajectory_copies / 2 + SLACK
        errors.append(float((gradient - exact).norm() / exact.norm()))
    assert errors[0] == pytest.approx(8 * errors[1], rel=0.2)


def test_what_is_stored_is_read_as_it_was_computed() -> None:
    """On its own device and in its own dtype, rounded once; a device that computes elsewhere is stood in for by `meta`."""
    written = torch.randn(3, 4, 5, generator=stream(0))
    stored = Storage(torch.bfloat16).new(3, written[0])
    for k, value in enumerate(written):
        stored[k] = value
    rounded, pairs = written.bfloat16().float(), (torch.tensor([2, 0, 2]), torch.tensor([3, 1, 0]))
    assert stored.data.dtype == torch.bfloat16
    assert torch.equal(torch.stack(list(stored)), rounded)
    assert torch.equal(stored.at(*pairs), rounded[pairs])
    stored[1:].of(slice(2, 4))[0] = torch.ones(2, 5)
    rounded[1, 2:4] = 1
    kept = stored.keep(torch.tensor([0, 2, 3]))
    assert torch.equal(torch.stack(list(kept)), rounded[:, [0, 2, 3]])
    assert kept.data.data_ptr() == stored.data.data_ptr()
    there = Storage(device="cpu").new(3, written[0].to("meta"))
    assert (there.data.device.type, there[0].device.type, there.at(*pairs).device.type) == ("cpu", "meta", "meta")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (ScoreAsAction(update="clip", num_inference_steps=4), "method.update 'clip'"),
        (AdjointMatching(reweight_passes=True, num_inference_steps=4), "method.reweight_passes"),
    ],
)
def test_paths_that_are_weighted_by_their_densities_are_not_rounded(method: Any, said: str) -> None:
    training = tiltflow.Training(max_train_steps=1, train_batch_size=4, trajectory_dtype="bfloat16")
    with pytest.raises(InputError, match=f"training.trajectory_dtype bfloat16: {said} weighs paths by their densities"):
        tiltflow.tune(tiltflow.Model(Flow(nn.Linear(1, 1)), (1,)), lambda x: x[:, 0], method, training)
