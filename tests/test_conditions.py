"""Every method on a conditional flow, with a reward that is told what each sample was meant to be: conditions follow their
samples into micro-batches, passes and pairs of steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import iterate
from torch import Tensor, nn

from tiltflow.flows.adapter import AdapterOff, base_of
from tiltflow.flows.conditions import select
from tiltflow.flows.flow import Flow
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.methods.orw_cfm_w2 import OrwCfmW2
from tiltflow.methods.score_as_action import ScoreAsAction
from tiltflow.methods.tilt_matching import TiltMatching
from tiltflow.streams import stream

LABELS = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0, 1.0])
METHODS = {
    "adjoint-matching": AdjointMatching(num_inference_steps=4, num_passes=2),
    "score-as-action": ScoreAsAction(num_inference_steps=4, estimator="return", num_passes=2),
    "score-as-action pathwise": ScoreAsAction(num_inference_steps=4, estimator="pathwise", critic={"num_steps": 0}),
    "score-as-action denoised": ScoreAsAction(
        num_inference_steps=4, estimator="closed-form", critic={"form": "constant-skip", "num_steps": 0}
    ),
    "orw-cfm-w2": OrwCfmW2(num_inference_steps=4, num_passes=2),
    "tilt-matching": TiltMatching(num_inference_steps=4, num_passes=2, anchor="old"),
}


class Labelled(nn.Module):
    """A small nonlinear field that depends on the label, given in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor, time: Tensor, condition: Any) -> Tensor:
        label = condition["embeds"][:, :1] if isinstance(condition, dict) else condition[:, None]
        return torch.tanh(self.gain * x + label) + (time[:, None] - 0.5) * label**2


@dataclass(frozen=True)
class TowardLabel:
    labels: Tensor

    def select(self, which: Tensor | slice) -> TowardLabel:
        return TowardLabel(self.labels[which])

    def __call__(self, x: Tensor) -> Tensor:
        return -(x - self.labels[:, None]).square().sum(1)


def condition(kind: str) -> Any:
    labels = LABELS.double()
    return labels if kind == "tensor" else {"embeds": labels[:, None].expand(-1, 3).clone(), "guidance": 3.5}


def gradient(name: str, kind: str, micro: int | None) -> list[Tensor]:
    """Of each optimizer step."""
    method: Any = METHODS[name]
    flow = Flow(Labelled()).bind(condition(kind))
    base = Flow(base_of(flow).network).bind(condition(kind))  # type: ignore[union-attr]
    flow.network.gain.data.fill_(0.4)  # type: ignore[attr-defined]
    x = torch.randn(8, 2, generator=stream(0, "x"), dtype=torch.float64)
    state, found = method.new_state((2,), 0, x.device), []
    if hasattr(state, "value"):
        state.value.network.double()
    reward = TowardLabel(LABELS.double())
    for _ in iterate(method, flow, base, reward, x, stream(1), state, micro_batch_size=micro):
        found.append(flow.network.gain.grad.clone())  # type: ignore[union-attr]
        flow.network.gain.grad = None  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize("name", METHODS)
def test_conditions_follow_their_samples(name: str) -> None:
    whole = gradient(name, "tensor", None)
    assert whole[0] != 0
    for kind, micro in (("tensor", 3), ("mapping", None), ("mapping", 3), ("mapping", 1)):
        for a, b in zip(whole, gradient(name, kind, micro), strict=True):
            assert torch.allclose(a, b, rtol=1e-9), (kind, micro)


def test_returns_are_centred_among_the_samples_of_one_condition() -> None:
    """A reward that is a constant for each label teaches nothing, however much the constants differ."""
    method = ScoreAsAction(num_inference_steps=4, estimator="return", running_reward="none")
    flow = Flow(Labelled()).bind(LABELS.double())

    @dataclass(frozen=True)
    class Constant:
        labels: Tensor

        def select(self, which: Tensor | slice) -> Constant:
            return Constant(self.labels[which])

        def __call__(self, x: Tensor) -> Tensor:
            return 100 * self.labels

    x = torch.randn(8, 2, generator=stream(0, "x"), dtype=torch.float64)
    next(iterate(method, flow, flow, Constant(LABELS.double()), x, stream(1), method.new_state((2,), 0, x.device)))
    assert flow.network.gain.grad.abs() < 1e-10  # type: ignore[union-attr]


def test_what_belongs_to_samples_and_what_to_all() -> None:
    chosen = select({"embeds": torch.arange(6).reshape(3, 2), "size": torch.tensor(5.0), "name": "a"}, torch.tensor([2, 0]))
    assert chosen["embeds"].tolist() == [[4, 5], [0, 1]]
    assert (chosen["size"].item(), chosen["name"]) == (5, "a")
    flow = Flow(Labelled())
    assert [g.tolist() for g in flow.bind(LABELS).groups(8, LABELS.device)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    several = {"embeds": LABELS[:, None].expand(-1, 3), "guidance": torch.arange(8.0)}
    assert [g.tolist() for g in flow.bind(several).groups(8, LABELS.device)] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    assert [g.tolist() for g in flow.bind("a prompt for all").groups(3, LABELS.device)] == [[0, 1, 2]]
    assert AdapterOff(flow.bind(LABELS)).select(slice(2, 4)).flow.condition.tolist() == [2, 0]
