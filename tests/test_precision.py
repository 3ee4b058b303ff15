"""Mixed precision: when it is used, what comes back, and that it leaves the method alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import UNET
from torch.testing import assert_close

from tiltflow.api import steps
from tiltflow.flows.flow import Flow
from tiltflow.flows.interpolant import VariancePreserving
from tiltflow.flows.precision import autocast_dtype
from tiltflow.methods.adjoint_matching import AdjointMatching
from tiltflow.models.model import Model
from tiltflow.streams import new_network, stream
from tiltflow.training.optimizer import Optimizer
from tiltflow.training.settings import Training


def image_flow() -> Flow:
    network = new_network(UNET, 0)
    for parameter in network.parameters():  # the last layer starts at zero
        torch.nn.init.normal_(parameter, std=0.2, generator=stream(1, parameter.numel()))
    return Flow(network.requires_grad_(False))


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({"amx_bf16": True}, torch.bfloat16), ({"avx512_bf16": True}, torch.bfloat16), ({"avx512_f": True}, None), ({}, None)],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(
    capabilities: dict[str, bool], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert autocast_dtype("auto", "cpu") is dtype
    assert autocast_dtype("bf16", "cpu") is torch.bfloat16
    assert autocast_dtype("no", "cpu") is None


def test_auto_is_full_precision_on_a_torch_that_cannot_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert autocast_dtype("auto", "cpu") is None


@pytest.mark.parametrize("prediction", ["velocity", "epsilon"])
def test_a_flow_in_bf16_is_the_flow_to_rounding(prediction: str) -> None:
    flow = replace(image_flow(), prediction=prediction, interpolant=VariancePreserving())
    x, t = torch.randn(16, 1, 28, 28, generator=stream(2)), torch.tensor(0.4)
    exact, rounded = flow(x, t), replace(flow, autocast=torch.bfloat16)(x, t)
    assert rounded.dtype == torch.float32
    # eight bits of mantissa through six layers, of errors that do not conspire
    error = (rounded - exact).norm() / exact.norm()
    assert 0 < error < 6**0.5 * 2**-8


def test_bf16_does_not_make_the_base_differ_from_its_copy() -> None:
    """The control of an untuned copy is zero, not rounding: the first step costs no path KL, and then there is some."""
    model = Model(image_flow(), (1, 28, 28))
    method, training = AdjointMatching(num_inference_steps=4), Training(train_batch_size=4, mixed_precision="bf16")
    _, records = steps(model, lambda x: x.mean((1, 2, 3)), method, training, optimizer=Optimizer(lr_warmup_steps=0))
    first, second = next(records).metrics, next(records).metrics
    assert first["path_kl"] == 0 < second["path_kl"]
    records.close()


def test_weights_and_samples_stay_in_their_own_dtype() -> None:
    model = Model(image_flow(), (1, 28, 28))
    method = AdjointMatching(num_inference_steps=4)
    tuned, records = steps(model, lambda x: x.mean((1, 2, 3)), method, Training(train_batch_size=4, mixed_precision="bf16"))
    next(records)
    records.close()
    assert {p.dtype for p in tuned.flow.network.parameters()} == {torch.float32}  # type: ignore[attr-defined]
    assert_close(tuned.sample(2), tuned.sample(2), rtol=0, atol=0)
    assert tuned.sample(2).dtype == torch.float32
