"""The implementation of attention is that of `model.attention_backend`, and computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers.models import attention_dispatch
from tiny import tiny_flow
from tiny_pipelines import tiny_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import tiltflow
from tiltflow.errors import InputError
from tiltflow.flows.precision import without_cudnn_attention
from tiltflow.models.sources.diffusers import Diffusers
from tiltflow.models.text_to_image import TextToImage


def load(folder: Path, name: str, backend: str | None) -> TextToImage:
    source = folder / name
    if not source.exists():
        tiny_pipeline(name, folder).save_pretrained(source)
    return Diffusers(diffusers=str(source), height=16, width=16, attention_backend=backend).load("cpu")


def test_another_implementation_of_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = load(tmp_path, "flux", None), load(tmp_path, "flux", "_native_math")
    registry, name = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName._NATIVE_MATH
    assert registry.get_active_backend()[0] != name  # that of all other networks
    called, function = [], registry._backends[name]

    def watched(*arguments: object, **options: object) -> object:
        called.append(True)
        return function(*arguments, **options)

    monkeypatch.setitem(registry._backends, name, watched)
    expected = own.sample(["a red cat"])
    assert not called
    assert_close(other.sample(["a red cat"]), expected)
    assert called
    called.clear()
    base, tuned = other.trainable(None)
    for model in (base, tuned):  # a copy too
        condition, _ = model.encode(["a red cat"])
        with torch.no_grad():
            model.flow.bind(condition)(torch.zeros(1, *model.event_shape), torch.tensor(0.5))
        assert called
        called.clear()


@pytest.mark.parametrize(
    ("name", "backend", "said"),
    [
        ("flux", "_native_mth", "diffusers knows none of this name, did you mean '_native_math'?"),
        ("flux", "flash_hub", "would run code that it fetches"),
        ("flux", "sage", "it has no gradient"),
        ("flux", "xformers", "cannot be used here .*xformers"),
        ("stable-diffusion", "native", "the attention of UNet2DConditionModel cannot be changed"),
    ],
)
def test_an_implementation_that_cannot_be(name: str, backend: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^model\.attention_backend {backend}: .*{said}"):
        load(tmp_path, name, backend)


def test_training_leaves_cudnns_attention_out_on_cuda_alone() -> None:
    """Its gradients are wrong on some GPUs; asked for by its name it is there all the same."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    assert enabled()
    for device, expected in (("cuda", False), ("cpu", True)):
        with without_cudnn_attention(torch.device(device)):
            assert enabled() == expected
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # as diffusers' _native_cudnn does
                assert enabled()
            assert enabled() == expected
        assert enabled()


def test_a_run_trains_without_cudnns_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = list[str]()

    @contextmanager
    def watched(device: torch.device) -> Iterator[None]:
        devices.append(device.type)
        with without_cudnn_attention(torch.device("cuda")):
            yield

    monkeypatch.setattr("tiltflow.runs.prepare.without_cudnn_attention", watched)
    seen = list[bool]()

    def reward(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return x.flatten(1).mean(1)

    model = tiltflow.load(tiny_flow(tmp_path))
    training = tiltflow.Training(max_train_steps=1, train_batch_size=4)
    tiltflow.tune(model, reward, tiltflow.AdjointMatching(num_inference_steps=3), training)
    assert devices == ["cpu"]
    assert not seen[-1]  # earlier calls try it
    assert torch.backends.cuda.cudnn_sdp_enabled()
